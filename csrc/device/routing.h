// Which experts a router of transformers chooses, and with what weights, given its scores. The same
// text runs on the device and, with a group of one lane, in the tests against transformers' routers
// (tests/test_device_routing.py).
//
//   softmax      p = softmax(logits); the k largest; w = p, or p / sum of the chosen p
//                (Mixtral, Qwen-MoE, OLMoE; k = 1 without division: Switch)
//   top_softmax  the k largest logits; w = softmax over those alone (GPT-OSS)
//   sigmoid      s = sigmoid(logits); chosen by s + bias within the best groups, a group's worth
//                being the sum of its two best; w = s, or s / (sum + 1e-20); times scale
//                (DeepSeek-V3, GLM-4-MoE, dots.1)
//
// The k come in falling order; of equal scores the lower index goes first, NaN before all numbers
// (as in torch.topk), so that an index is always in range.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "protocol.h"

namespace comoe {

enum class RouterKind : uint8_t { softmax = 0, top_softmax = 1, sigmoid = 2 };
// What a value is rounded to, in fp32: transformers' routers cast at these places.
enum class RoundTo : uint8_t { fp32 = 0, bf16 = 1, fp16 = 2 };

struct RouterSpec {
  RouterKind kind = RouterKind::softmax;
  bool normalise = false;  // the chosen weights sum to 1
  RoundTo round_logits = RoundTo::fp32;
  RoundTo round_weights = RoundTo::fp32;
  int32_t num_experts = 0, k = 0;
  int32_t num_groups = 1, top_groups = 1;  // sigmoid: num_experts is a multiple of num_groups
  float scale = 1.0f;
  const float* choice_bias = nullptr;  // sigmoid: [num_experts] or null
};

constexpr int kMaxGroups = 64;

// One thread that takes the place of a group of lanes.
struct OneLane {
  COMOE_HD int lane() const { return 0; }
  COMOE_HD int lanes() const { return 1; }
  COMOE_HD void sync() const {}
  COMOE_HD uint64_t max(uint64_t v) const { return v; }
  COMOE_HD float max(float v) const { return v; }
  COMOE_HD float sum(float v) const { return v; }
  COMOE_HD bool any(bool v) const { return v; }
  COMOE_HD void set_bit(uint32_t* words, int i) const { words[i / 32] |= 1u << (i % 32); }
};

COMOE_HD inline uint32_t float_bits(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof(bits));
  return bits;
}
COMOE_HD inline float bits_float(uint32_t bits) {
  float v;
  memcpy(&v, &bits, sizeof(v));
  return v;
}

// Nearest even. fp16 beyond its range becomes infinite, below it subnormal, as torch casts.
COMOE_HD inline float rounded(float v, RoundTo to) {
  if (to == RoundTo::fp32 || v != v) return v;
  const uint32_t bits = float_bits(v);
  if (to == RoundTo::bf16) {
    if ((bits & 0x7F800000u) == 0x7F800000u) return v;
    return bits_float((bits + 0x7FFFu + (bits >> 16 & 1)) & 0xFFFF0000u);
  }
  const float magnitude = bits_float(bits & 0x7FFFFFFFu),
              sign = bits_float((bits & 0x80000000u) | 0x3F800000u);
  if (magnitude >= 65520.0f) return sign * bits_float(0x7F800000u);
  if (magnitude < 6.103515625e-05f)  // steps of 2^-24: adding 0.5 leaves just these bits
    return sign * ((magnitude + 0.5f) - 0.5f);
  return bits_float((bits + 0xFFFu + (bits >> 13 & 1)) & 0xFFFFE000u);
}

// Grows with v, NaN greatest; never 0, which stands for "not to be had".
COMOE_HD inline uint32_t order_key(float v) {
  if (v != v) return 0xFFFFFFFFu;
  const uint32_t bits = float_bits(v == 0.0f ? 0.0f : v);  // -0 equals 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The index of the greatest key in [begin, end), the lowest of equal ones; -1: all are 0.
template <class Group>
COMOE_HD int best_of(const Group& g, const uint32_t* keys, int begin, int end) {
  uint64_t best = 0;
  for (int e = begin + g.lane(); e < end; e += g.lanes()) {
    const uint64_t entry = uint64_t{keys[e]} << 32 | ~static_cast<uint32_t>(e);
    if (keys[e] != 0 && entry > best) best = entry;
  }
  best = g.max(best);
  return best == 0 ? -1 : static_cast<int>(~static_cast<uint32_t>(best));
}

// logits: [E], rounded in place as the router does. keys: [E] scratch. group_keys: [num_groups]
// scratch. chosen, weights: [k]. All lanes of the group call it with the same arguments and may
// read the results after it.
template <class Group>
COMOE_HD void route(const Group& g, const RouterSpec& spec, float* logits, uint32_t* keys,
                    uint32_t* group_keys, int32_t* chosen, float* weights) {
  const int E = spec.num_experts, k = spec.k;
  for (int e = g.lane(); e < E; e += g.lanes()) {
    float score = rounded(logits[e], spec.round_logits);
    if (spec.kind == RouterKind::sigmoid) score = 1.0f / (1.0f + expf(-score));
    logits[e] = score;
    const bool biased = spec.kind == RouterKind::sigmoid && spec.choice_bias != nullptr;
    keys[e] = order_key(biased ? score + spec.choice_bias[e] : score);
  }
  g.sync();
  if (spec.kind == RouterKind::sigmoid && spec.num_groups > 1) {
    const int size = E / spec.num_groups;
    for (int group = g.lane(); group < spec.num_groups; group += g.lanes()) {
      float first = -INFINITY, second = -INFINITY;
      for (int e = group * size; e < (group + 1) * size; ++e) {
        const float bias = spec.choice_bias != nullptr ? spec.choice_bias[e] : 0.0f;
        const float v = logits[e] + bias;
        if (order_key(v) > order_key(first)) {
          second = first;
          first = v;
        } else if (order_key(v) > order_key(second)) {
          second = v;
        }
      }
      group_keys[group] = order_key(size > 1 ? first + second : first);
    }
    g.sync();
    // The best groups' keys become 0; then the experts of all others lose theirs.
    for (int i = 0; i < spec.top_groups; ++i) {
      const int best = best_of(g, group_keys, 0, spec.num_groups);
      g.sync();
      if (g.lane() == 0 && best >= 0) group_keys[best] = 0;
      g.sync();
    }
    // transformers gives them -inf, so that they still come if there are fewer than k others.
    for (int e = g.lane(); e < E; e += g.lanes())
      if (group_keys[e / size] != 0) keys[e] = order_key(-INFINITY);
    g.sync();
  }
  for (int i = 0; i < k; ++i) {
    const int best = best_of(g, keys, 0, E);
    g.sync();
    if (g.lane() == 0) {
      chosen[i] = best;
      keys[best] = 0;
    }
    g.sync();
  }

  // Weights: k is small, so one lane computes them in the order of k.
  float top = 0.0f, total = 1.0f;
  if (spec.kind == RouterKind::softmax) {
    float most = -INFINITY, sum = 0.0f;
    for (int e = g.lane(); e < E; e += g.lanes()) most = logits[e] > most ? logits[e] : most;
    top = g.max(most);
    for (int e = g.lane(); e < E; e += g.lanes()) sum += expf(logits[e] - top);
    total = g.sum(sum);
  }
  if (g.lane() == 0) {
    if (spec.kind == RouterKind::top_softmax) {
      top = logits[chosen[0]];
      total = 0.0f;
      for (int i = 0; i < k; ++i) total += expf(logits[chosen[i]] - top);
    }
    float sum = 0.0f;
    for (int i = 0; i < k; ++i) {
      const float score = logits[chosen[i]];
      weights[i] = spec.kind == RouterKind::sigmoid ? score : expf(score - top) / total;
      sum += weights[i];
    }
    if (spec.kind == RouterKind::sigmoid) sum += 1e-20f;
    for (int i = 0; i < k; ++i) {
      float w = weights[i];
      if (spec.normalise && spec.kind != RouterKind::top_softmax) w /= sum;
      if (spec.kind == RouterKind::sigmoid) w *= spec.scale;
      weights[i] = rounded(w, spec.round_weights);
    }
  }
  g.sync();
}

}  // namespace comoe
