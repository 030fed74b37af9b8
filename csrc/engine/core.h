// The engine's logic as one state machine: no lock, no thread, no clock. Events come in as calls;
// what has to be done goes out through Backend. It can be copied, so that a test can walk through
// every interleaving of events (csrc/tests/test_engine_model.cpp). States, guards and why nothing
// deadlocks: docs/engine.md.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "backend.h"
#include "pool.h"
#include "transfer.h"
#include "types.h"

namespace comoe {

struct BudgetError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

struct CoreConfig {
  int64_t page_bytes = 0;
  int pages_per_slab = 0;
  std::vector<uint32_t> level_masks;  // [<= 32] bit r of level_masks[l]: level l requires record r
  int64_t slack_pages = 0;  // kept free by speculation, so that demand need not wait for reclaim
  int64_t speculation_pages = 0;  // most pages that running prefetches and upgrades hold together
};

// Counters only grow; bytes are payload bytes.
struct CoreStats {
  int64_t hits = 0, partial_hits = 0;  // needs ready at once, at the level wanted or one below it
  int64_t joined = 0;                  // needs whose missing records were all on their way already
  int64_t misses = 0;
  int64_t waves = 0;  // needs that had to wait for pages
  int64_t reads = 0, bytes_read = 0;
  int64_t demand_reads = 0, demand_bytes = 0;
  int64_t prefetch_reads = 0, prefetch_bytes = 0;
  int64_t upgrade_reads = 0, upgrade_bytes = 0;
  int64_t prefetch_used_bytes = 0;  // speculative bytes used by a need (in memory before it asked)
  int64_t prefetch_joined_bytes = 0;  // ... demanded while on their way
  int64_t wasted_prefetch_bytes = 0;  // ... evicted unused
  int64_t coalesced = 0, cancelled = 0, dropped = 0;
  int64_t failed_reads = 0, corrupt_reads = 0, failed_prefetches = 0;
  int64_t evictions = 0, evicted_bytes = 0, relocated_pages = 0;
};

enum class Next { ready, wait, hold, end, failed };

enum class RecordState : uint8_t { absent = 0, loading = 1, resident = 2 };

class Core {
 public:
  Core(CoreConfig config, Backend* backend);
  void set_backend(Backend* backend) { backend_ = backend; }  // of a copy

  int32_t add_records(const RecordInfo* infos, int64_t count);  // first id
  // table: [count, records_per_expert()] ids, -1 where an expert has no such record. A record may
  // be in several rows (a shared base): it is held once. Returns the first expert.
  int32_t add_experts(const int32_t* table, int64_t count);

  // Sessions. Ids grow, and the oldest session is served first.
  int32_t open_session(const Need* needs, int64_t count);
  // ready: filled `ready`; wait: `take_woken` will name the session; hold: nothing can come before
  // `done` is called for something that the session holds; failed: see `error`.
  Next next(int32_t session, std::vector<Ready>& ready);
  Next peek(int32_t session) const;  // what next() would return
  void done(int32_t session, int32_t need);
  void close_session(int32_t session);
  bool has_session(int32_t session) const { return sessions_.count(session) > 0; }
  const std::string& error(int32_t session) const { return sessions_.at(session).error; }
  bool is_budget_error(int32_t session) const { return sessions_.at(session).budget_error; }
  std::vector<int32_t> take_woken();

  // Speculation and control.
  void request(int32_t record, Priority priority, int32_t distance);
  void cancel(int32_t record, Priority priority);  // of a prefetch also: the guess was wrong
  void cancel_all(Priority priority);
  void pump();                            // starts what was requested, as far as it may run
  int64_t evict(int32_t record);          // pages freed
  void pin(int32_t record, bool pinned);  // throws BudgetError if too little is left for sessions
  void set_value(int32_t record, float value);
  void values_changed();  // after set_value

  // Memory.
  void set_target_slabs(int slabs);
  bool target_reached() const { return pool_.mapped_slabs() <= target_slabs_; }
  int64_t need_pages(int32_t expert, uint32_t mask) const;
  int64_t largest_need_pages(int max_level) const;
  int64_t demand_reserve_pages() const { return demand_reserve_pages_; }
  void forget_largest_need();  // but for what open sessions still wait for
  int64_t user_pinned_pages() const { return user_pinned_pages_; }

  // Events of the backend.
  void read_done(int32_t record, ReadStatus status, const std::string& error);
  void step_passed();

  // What is.
  int32_t num_records() const { return static_cast<int32_t>(records_.size()); }
  int records_per_expert() const { return records_per_expert_; }
  int32_t num_experts() const { return static_cast<int32_t>(expert_levels_.size()); }
  int32_t record_of(int32_t expert, int r) const {
    return expert_records_[static_cast<size_t>(expert) * records_per_expert_ + r];
  }
  // The finest level of [need.min_level, need.want_level] that is complete, -1: none.
  int best_resident_level(const Need& need) const;
  bool has_level(int32_t expert, int level) const { return expert_levels_[expert] >> level & 1; }
  const RecordInfo& info(int32_t record) const { return records_[record].info; }
  RecordState state(int32_t record) const { return records_[record].state; }
  bool is_user_pinned(int32_t record) const { return records_[record].user_pinned; }
  bool is_pinned(int32_t record) const { return records_[record].pins > 0; }
  const std::vector<uint8_t*>& addresses(int32_t record) const {
    return records_[record].addresses;
  }
  const std::vector<int32_t>& page_list(int32_t record) const { return records_[record].pages; }
  const CoreConfig& config() const { return config_; }
  const CoreStats& stats() const { return stats_; }
  const PagePool& pool() const { return pool_; }
  const TransferQueue& queue() const { return queue_; }
  int target_slabs() const { return target_slabs_; }
  int64_t loading() const { return num_loading_; }
  int64_t reclaiming_pages() const { return static_cast<int64_t>(reclaiming_.size()); }
  int64_t resident_bytes() const { return resident_bytes_; }  // payload
  int64_t num_sessions() const { return static_cast<int64_t>(sessions_.size()); }
  std::string fingerprint() const;  // equal for states that behave alike (ids of sessions included)
  void check_invariants() const;    // throws std::logic_error

 private:
  enum class NeedState : uint8_t { waiting, loading, ready, handed, released };
  struct NeedEntry {
    Need need;
    NeedState state = NeedState::waiting;
    uint8_t level = 0;    // once not waiting
    int32_t missing = 0;  // records on their way
    bool counted_wave = false;
  };
  struct Waiter {
    int32_t session, need;
    bool operator==(const Waiter& o) const { return session == o.session && need == o.need; }
  };
  struct SessionEntry {
    uint64_t tick = 0;
    std::vector<NeedEntry> needs;
    std::vector<int32_t> ready;    // not handed out yet
    std::vector<int32_t> waiting;  // from `waiting_at` on, in order
    size_t waiting_at = 0;
    int32_t num_loading = 0, num_handed = 0;
    std::string error;
    bool budget_error = false;
    bool blocked() const { return waiting_at < waiting.size(); }
  };
  struct Record {
    RecordInfo info;
    int32_t num_pages = 0;
    RecordState state = RecordState::absent;
    Priority transfer = Priority::demand;  // class of the running or last read
    bool speculative = false;              // resident or loading, and no need has asked for it yet
    bool user_pinned = false;
    uint64_t heap_entry = 0;  // number of its valid entry in the heap, 0: none
    int32_t pins = 0;         // needs that rely on it
    float value = 0;
    uint64_t last_use = 0;  // by a need; of an upgrade: when it came
    uint64_t expected = 0;  // last prefetch that asked for it, until that one is cancelled
    std::vector<int32_t> pages;
    std::vector<uint8_t*> addresses;
    std::vector<Waiter> waiters;
    uint64_t recency() const { return std::max(last_use, expected); }
  };
  // Order of eviction: least value, then least recent use, then the finest rung of an expert.
  struct Coldness {
    float value;
    uint64_t last_use;
    int32_t record;
    uint64_t entry = 0;
    bool operator<(const Coldness& o) const {
      if (value != o.value) return value < o.value;
      if (last_use != o.last_use) return last_use < o.last_use;
      return record > o.record;
    }
  };
  struct Reclaim {
    int32_t page;
    uint64_t step;
  };

  uint32_t mask_of(const NeedEntry& n) const { return config_.level_masks[n.level]; }
  template <class F>
  void for_records(int32_t expert, uint32_t mask, F&& f) const;
  int lowest_level(const Need& need) const;
  Coldness coldness(int32_t record) const;
  int64_t capacity_pages() const;
  bool is_protected(const Record& record) const;

  void settle();  // after every event: drain, admit, pump
  void admit();
  enum class Admission { admitted, blocked, failed };
  Admission try_admit(int32_t session, int32_t need);
  int level_to_load(const Need& need) const;
  void pin_level(int32_t session, int32_t need, int level);
  void unpin_level(int32_t session, int32_t need);
  void make_ready(int32_t session, int32_t need);
  void release(int32_t session, int32_t need);
  void fail_session(int32_t session, const std::string& error);

  enum class Room { demand, relocation, speculation };
  bool make_room(int64_t pages, const Coldness& limit, Room room);
  bool map_one_slab();
  void start_read(int32_t record, Priority priority);
  bool start_speculation(int32_t record);
  void give_up_read(int32_t record);
  void used(int32_t record, uint64_t tick);
  void evict_record(int32_t record);
  void retire_page(int32_t page);
  void push_heap(int32_t record);
  Coldness pop_heap();
  void drain();
  bool relocate(int32_t record);

  CoreConfig config_;
  Backend* backend_;
  int records_per_expert_ = 0;
  PagePool pool_;
  TransferQueue queue_;
  CoreStats stats_;
  std::vector<Record> records_;
  std::vector<int32_t> page_owner_;  // [pages ever mapped] record, or -1
  std::map<int32_t, SessionEntry> sessions_;
  std::vector<int32_t> woken_;
  // One valid entry per resident record, its key perhaps too cold: uses only make a record hotter,
  // so the true coldest is found by putting such entries back. Pinning costs nothing this way. A
  // value that is lowered makes a new entry, and the old one invalid.
  std::vector<Coldness> heap_;
  uint64_t heap_entries_ = 0;  // numbers given out
  std::vector<Reclaim> reclaiming_;
  std::vector<int32_t> expert_records_;  // [experts, records_per_expert_] ids, or -1
  std::vector<uint32_t> expert_levels_;  // [experts] bit l: all records of level l are there
  int target_slabs_ = 0;
  int32_t next_session_ = 0;
  uint64_t clock_ = 0;  // sessions opened; `last_use` is in its unit
  int64_t num_loading_ = 0;
  int64_t resident_bytes_ = 0;
  int64_t speculation_loading_pages_ = 0;
  int64_t user_pinned_pages_ = 0;
  int64_t demand_reserve_pages_ = 0;  // largest need asked for since it was forgotten
  bool speculation_blocked_ =
      false;  // the queue's front found no room, and nothing has changed since
  bool map_failed_ = false;
};

}  // namespace comoe
