// What a device that chooses its own experts and the host that feeds it tell each other. One text
// for both sides: kernels include it, and so does the test that puts a thread in the device's place
// (csrc/tests/test_device.cpp). In words, with the reasons why nothing deadlocks: docs/device.md.
//
// The device works in *visits*: one MoE layer, or one wave of it, in stream order, one at a time.
//   1. visit_begin     begun = v, and only then is the residency table read
//   2. lookup          each chosen expert: finest resident level, or a miss
//   3. post            every chosen expert and the end of the list into the ring; guesses, if room
//   4. visit_wait      only if something was missing: until arrived >= v, or abort
//   5. compute         reads pages through the table
//   6. visit_end       completed = v
// All counters only grow and live in memory that a captured graph names by address, so that a
// replay behaves like any other launch.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define COMOE_HD __host__ __device__
#else
#define COMOE_HD
#endif

namespace comoe {

// ---- Loads and stores that both sides see -------------------------------------------------------

// Acquire and release at system scope; `ordered` ones are also in one total order among themselves:
// the host's copy engine clears a residency word, then reads `begun`; the device writes `begun`,
// then reads residency words. One of the two sees the other.
COMOE_HD inline uint64_t load_acquire(const uint64_t* at) {
#ifdef __CUDA_ARCH__
  uint64_t value;
  asm volatile("ld.acquire.sys.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
#else
  return __atomic_load_n(at, __ATOMIC_ACQUIRE);
#endif
}
COMOE_HD inline void store_release(uint64_t* at, uint64_t value) {
#ifdef __CUDA_ARCH__
  asm volatile("st.release.sys.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
#else
  __atomic_store_n(at, value, __ATOMIC_RELEASE);
#endif
}
COMOE_HD inline void store_ordered(uint64_t* at, uint64_t value) {
#ifdef __CUDA_ARCH__
  // Device scope: both words lie in device memory, where the copy engine meets them in L2.
  asm volatile("st.relaxed.gpu.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
  asm volatile("fence.sc.gpu;" ::: "memory");
#else
  __atomic_store_n(at, value, __ATOMIC_SEQ_CST);
#endif
}
COMOE_HD inline uint32_t load_ordered(const uint32_t* at) {
#ifdef __CUDA_ARCH__
  uint32_t value;
  asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
#else
  return __atomic_load_n(at, __ATOMIC_SEQ_CST);
#endif
}
// One word of the ring: it says itself that it is there, so that it needs no order with another.
COMOE_HD inline void store_word(uint64_t* at, uint64_t value) {
#ifdef __CUDA_ARCH__
  asm volatile("st.relaxed.sys.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
#else
  __atomic_store_n(at, value, __ATOMIC_RELEASE);
#endif
}

// ---- The ring -----------------------------------------------------------------------------------

enum class RingKind : uint8_t { hit = 0, miss = 1, guess = 2, end = 3 };

// expert: row of the engine's table; of `end`: how many hits and misses the list has.
struct RingEntry {
  RingKind kind;
  int32_t expert;
  uint8_t min_level, want_level;  // of a hit both are the level that is used
  uint8_t distance;               // of a guess, in layers
};

// | lap 24 | distance 4 | want 5 | min 5 | kind 2 | expert 24 |: one store, and the reader knows by
// the lap whether the word is this round's.
constexpr int kRingExpertBits = 24;
constexpr int32_t kMaxRingExpert = (1 << kRingExpertBits) - 1;
constexpr int kMaxDistance = 15;

COMOE_HD inline uint64_t ring_lap(uint64_t position, uint32_t capacity) {
  return (position / capacity + 1) & 0xFFFFFF;
}
COMOE_HD inline uint64_t ring_pack(const RingEntry& e, uint64_t lap) {
  return lap << 40 | uint64_t{e.distance} << 36 | uint64_t{e.want_level} << 31 |
         uint64_t{e.min_level} << 26 | static_cast<uint64_t>(e.kind) << 24 |
         static_cast<uint64_t>(e.expert);
}
COMOE_HD inline RingEntry ring_unpack(uint64_t word) {
  return {static_cast<RingKind>(word >> 24 & 3), static_cast<int32_t>(word & kMaxRingExpert),
          static_cast<uint8_t>(word >> 26 & 31), static_cast<uint8_t>(word >> 31 & 31),
          static_cast<uint8_t>(word >> 36 & 15)};
}

// ---- Memory that both sides know ----------------------------------------------------------------

// In mapped host memory. Each word has one writer and a cache line of its own.
struct Mailbox {
  alignas(64) uint64_t taken;      // host: ring entries read, so far
  alignas(64) uint64_t abort;      // host: waits of visits up to this one end at once, as failed
  alignas(64) uint64_t completed;  // device: visits that read no page any more
  alignas(64) uint64_t failed;     // device: the first visit whose wait failed, 0: none
};

constexpr uint64_t kAbortAll = ~uint64_t{0};

// In device memory. Of the device alone, but for `arrived`, which the copy stream writes, and
// `begun`, which it reads.
struct DeviceState {
  alignas(64) uint64_t begun;    // visits begun
  alignas(64) uint64_t arrived;  // all that visits up to this one miss is in its pages
  alignas(64) uint64_t posted;   // ring entries written
  uint64_t taken;                // Mailbox::taken when last looked at
  uint64_t wait_for;             // the running visit if it misses something, else 0
  uint64_t dropped;              // guesses for which the ring had no room
};

// What a kernel is given, by value. Addresses and sizes never change while a model is loaded.
struct Plane {
  DeviceState* state;
  Mailbox* mailbox;
  uint64_t* ring;          // [ring_capacity], mapped host memory, zeros at first
  uint32_t ring_capacity;  // power of two, at least twice ring_reserve
  uint32_t ring_reserve;   // entries kept for lists; guesses take the rest

  const uint32_t* resident;       // [num_records] 1: the record's pages are in the table
  const uint64_t* page_table;     // addresses of all records' pages, one record after the other
  const int64_t* first_page;      // [num_records] ... where each record's begin
  const int32_t* expert_records;  // [num_experts, records_per_expert], -1: it has no such record
  const uint32_t* level_masks;    // [num_levels]
  const uint8_t* level_bounds;    // [num_experts, 2] least level to compute at, and the one wanted
  int32_t records_per_expert;
  int32_t num_levels;
};

// ---- The device's side --------------------------------------------------------------------------

// The finest level of [min, want] of which every record is resident; -1: none.
COMOE_HD inline int resident_level(const Plane& plane, int32_t expert, int min, int want) {
  const int32_t* records = plane.expert_records + int64_t{expert} * plane.records_per_expert;
  uint32_t here = 0, exist = 0;
  for (int r = 0; r < plane.records_per_expert; ++r) {
    if (records[r] < 0) continue;
    exist |= 1u << r;
    if (load_ordered(plane.resident + records[r]) != 0) here |= 1u << r;
  }
  for (int level = want; level >= min; --level) {
    const uint32_t mask = plane.level_masks[level];
    if ((mask & ~exist) == 0 && (mask & ~here) == 0) return level;
  }
  return -1;
}

// Address of page n of a record that the visit found resident, or waited for.
COMOE_HD inline uint64_t record_page(const Plane& plane, int32_t record, int64_t n) {
  const uint64_t* at = plane.page_table + plane.first_page[record] + n;
#ifdef __CUDA_ARCH__
  return *at;
#else
  return __atomic_load_n(at, __ATOMIC_ACQUIRE);  // a row may be replaced by one that is as good
#endif
}

// By one thread, before any lookup of the visit. Returns its number, from 1 on.
COMOE_HD inline uint64_t visit_begin(const Plane& plane) {
  const uint64_t visit = plane.state->begun + 1;  // no other writer
  store_ordered(&plane.state->begun, visit);
  return visit;
}

COMOE_HD inline void ring_put(const Plane& plane, uint64_t position, const RingEntry& entry) {
  store_word(plane.ring + (position & (plane.ring_capacity - 1)),
             ring_pack(entry, ring_lap(position, plane.ring_capacity)));
}

// How many of `wanted` entries may be written: all, or for guesses none. A list always fits: one
// visit runs at a time, the host takes entries without waiting for anything, and guesses leave
// ring_reserve entries free. So this waits only while the host is behind in reading.
COMOE_HD inline bool ring_room(const Plane& plane, uint32_t wanted, bool guesses) {
  const uint64_t limit = guesses ? plane.ring_capacity - plane.ring_reserve : plane.ring_capacity;
  DeviceState& s = *plane.state;
  if (s.posted + wanted - s.taken <= limit) return true;
  for (;;) {  // mapped memory is a microsecond away: looked at only now
    s.taken = load_acquire(&plane.mailbox->taken);
    if (s.posted + wanted - s.taken <= limit) return true;
    if (guesses || load_acquire(&plane.mailbox->abort) == kAbortAll) return false;
  }
}

// Until what the visit misses has come. False: aborted, by the host's watchdog or for a read that
// failed; then only resident rungs may be used. `patience`: polls after which it gives up by
// itself, in case that the host's process is gone.
COMOE_HD inline bool visit_wait(const Plane& plane, uint64_t patience = ~uint64_t{0}) {
  const uint64_t visit = plane.state->wait_for;
  if (visit == 0) return true;
  for (uint64_t poll = 0; load_acquire(&plane.state->arrived) < visit; ++poll) {
    // Every 64th time: mapped host memory is far.
    if (poll >= patience || (poll % 64 == 63 && load_acquire(&plane.mailbox->abort) >= visit)) {
      if (load_acquire(&plane.mailbox->failed) == 0) store_release(&plane.mailbox->failed, visit);
      return false;
    }
  }
  return true;
}

// By one thread, when every kernel of the visit has ended: nothing of it reads pages any more.
COMOE_HD inline void visit_end(const Plane& plane, uint64_t visit) {
  store_release(&plane.mailbox->completed, visit);
}

}  // namespace comoe
