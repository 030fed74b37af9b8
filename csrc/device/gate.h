// What one launch of gate_prefetch does after the routers' scores are known: this layer's routing,
// the guesses for the next layers, the look-up, the ring. The same text for the device's last block
// (cuda/gate_prefetch.cu) and for the test's thread.
#pragma once

#include "protocol.h"
#include "routing.h"

namespace comoe {

constexpr int kMaxAhead = 4;
constexpr int kMaxExperts = 1024;  // of a layer
constexpr int kMaskWords = kMaxExperts / 32;

// One router on the present hidden state.
struct GateRouter {
  RouterSpec spec;
  int32_t first_expert;  // the layer's first row in the engine's table
  float* logits;         // [T, E] scores
  uint32_t* keys;        // [T, E] scratch
  int32_t* chosen;       // [T, k]
  float* weights;        // [T, k]
};

struct GateArgs {
  int32_t T;
  int32_t ahead;  // routers after the first: layers 1, 2, ... further on
  bool given;     // routers[0].chosen and weights are there already (any family)
  GateRouter routers[1 + kMaxAhead];
  int32_t* items;   // [T * k] the chosen experts of the layer, each once, rising; then -1
  int32_t* levels;  // [T * k] level of each, -1: missing (visit_resolve fills it in)
};

// Scratch of the group, in shared memory on a device.
struct GateScratch {
  uint32_t mask[kMaskWords];
  uint32_t group_keys[kMaxGroups];  // of one token at a time in a group of one; else a warp's own
};

COMOE_HD inline int bit_count(uint32_t v) {
#ifdef __CUDA_ARCH__
  return __popc(v);
#else
  return __builtin_popcount(v);
#endif
}

// Sets the bits of all experts that `chosen` [count] names; others (transformers' sentinel E, say)
// are left out.
template <class Group>
COMOE_HD void mark_chosen(const Group& g, const int32_t* chosen, int count, int num_experts,
                          uint32_t* mask) {
  for (int i = g.lane(); i < kMaskWords; i += g.lanes()) mask[i] = 0;
  g.sync();
  for (int i = g.lane(); i < count; i += g.lanes())
    if (chosen[i] >= 0 && chosen[i] < num_experts) g.set_bit(mask, chosen[i]);
  g.sync();
}

COMOE_HD inline int bits_below(const uint32_t* mask, int e) {
  int count = 0;
  for (int w = 0; w < e / 32; ++w) count += bit_count(mask[w]);
  return count + bit_count(mask[e / 32] & ((1u << (e % 32)) - 1));
}

// One visit's beginning for the experts chosen in router 0: number, look-up, list, guesses. Returns
// the visit's number. The chosen of all routers must be there.
template <class Group>
COMOE_HD uint64_t visit_open(const Group& g, const Plane& plane, const GateArgs& a,
                             GateScratch& scratch) {
  uint64_t visit = plane.state->begun + 1;
  g.sync();  // all lanes have read it
  if (g.lane() == 0) {
    // Kernels of earlier visits lie before this one in the stream: they have ended.
    if (visit > 1) visit_end(plane, visit - 1);
    visit_begin(plane);
  }
  g.sync();

  const GateRouter& own = a.routers[0];
  const int E = own.spec.num_experts, most = a.T * own.spec.k;
  mark_chosen(g, own.chosen, most, E, scratch.mask);
  int count = 0;
  for (int w = 0; w < kMaskWords; ++w) count += bit_count(scratch.mask[w]);
  for (int i = count + g.lane(); i < most; i += g.lanes()) {
    a.items[i] = -1;
    a.levels[i] = -1;
  }
  const uint64_t first = plane.state->posted;
  const bool room = g.any(g.lane() == 0 && ring_room(plane, count + 1, false));
  bool missing = false;
  for (int e = g.lane(); e < E; e += g.lanes()) {
    if ((scratch.mask[e / 32] >> (e % 32) & 1) == 0) continue;
    const int i = bits_below(scratch.mask, e);
    const int32_t expert = own.first_expert + e;
    const uint8_t* bounds = plane.level_bounds + 2 * int64_t{expert};
    const int level = resident_level(plane, expert, bounds[0], bounds[1]);
    a.items[i] = e;
    a.levels[i] = level;
    missing |= level < 0;
    const uint8_t used = static_cast<uint8_t>(level);
    if (room)
      ring_put(plane, first + i,
               level < 0 ? RingEntry{RingKind::miss, expert, bounds[0], bounds[1], 0}
                         : RingEntry{RingKind::hit, expert, used, used, 0});
  }
  missing = g.any(missing);
  if (g.lane() == 0) {
    if (room) ring_put(plane, first + count, {RingKind::end, count, 0, 0, 0});
    plane.state->posted = first + (room ? count + 1 : 0);
    plane.state->wait_for = missing ? visit : 0;
  }
  g.sync();

  for (int d = 1; d <= a.ahead; ++d) {
    const GateRouter& later = a.routers[d];
    mark_chosen(g, later.chosen, a.T * later.spec.k, later.spec.num_experts, scratch.mask);
    int guesses = 0;
    for (int w = 0; w < kMaskWords; ++w) guesses += bit_count(scratch.mask[w]);
    const uint64_t at = plane.state->posted;
    const bool fits = g.any(g.lane() == 0 && ring_room(plane, guesses, true));
    g.sync();
    for (int e = g.lane(); fits && e < later.spec.num_experts; e += g.lanes()) {
      if ((scratch.mask[e / 32] >> (e % 32) & 1) == 0) continue;
      const int32_t expert = later.first_expert + e;
      const uint8_t want = plane.level_bounds[2 * int64_t{expert} + 1];
      ring_put(plane, at + bits_below(scratch.mask, e),
               {RingKind::guess, expert, want, want, static_cast<uint8_t>(d)});
    }
    if (g.lane() == 0) {
      if (fits)
        plane.state->posted = at + guesses;
      else
        plane.state->dropped += guesses;
    }
    g.sync();
  }
  return visit;
}

// After the wait: levels of what was missing. After a failed wait it may stay -1: that expert then
// adds nothing.
template <class Group>
COMOE_HD void visit_resolve(const Group& g, const Plane& plane, const GateArgs& a) {
  const GateRouter& own = a.routers[0];
  for (int i = g.lane(); i < a.T * own.spec.k; i += g.lanes()) {
    if (a.items[i] < 0 || a.levels[i] >= 0) continue;
    const int32_t expert = own.first_expert + a.items[i];
    const uint8_t* bounds = plane.level_bounds + 2 * int64_t{expert};
    a.levels[i] = resident_level(plane, expert, bounds[0], bounds[1]);
  }
  g.sync();
}

}  // namespace comoe
