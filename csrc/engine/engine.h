// The engine: keeps records of the store resident in a paged pool under a budget, and hands them to
// compute. It drives the state machine of core.h under one lock. State machine, locking and the
// argument why nothing deadlocks: docs/engine.md.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "backend.h"
#include "core.h"
#include "types.h"

namespace comoe {

struct EngineConfig {
  int64_t page_bytes = 0;             // multiple of 4096
  int64_t slab_bytes = 0;             // multiple of page_bytes
  int64_t budget_bytes = 0;           // cap of all that is mapped for pages, whole slabs
  std::vector<uint32_t> level_masks;  // bit r of level_masks[l]: level l requires record r
  int io_threads = 4;                 // of the reader with threads: each has one read in flight
  int uring_depth = 16;               // reads in flight by io_uring
  bool direct_io = true;
  bool verify = true;       // check crc32c of each record when read
  std::string io = "auto";  // "auto", "threads" or "uring"
};

// A record could not be read; the engine stays usable.
struct ReadError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct EngineClosed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct EngineStats {
  CoreStats core;
  BackendStats backend;
  int64_t waits = 0;        // times that a session stood still
  double wait_seconds = 0;  // sessions stood still for this long
  int64_t page_bytes = 0, budget_bytes = 0, mapped_bytes = 0;
  int64_t slabs = 0, slabs_target = 0, pages_used = 0, pages_free = 0, pages_reclaiming = 0;
  int64_t resident_bytes = 0, loading = 0, queued = 0, sessions = 0;
};

struct EngineState;

// The needs of one MoE layer, served in any order as they become ready; admits in waves when they
// do not all fit. Destroying it releases everything it still holds.
class Session {
 public:
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Blocks until at least one need is ready or all are done; fills `ready` (cleared first) with all
  // that are ready now; returns false when every need has been handed out. `ready` comes back empty
  // if nothing can come before the caller has called done() for something it holds. Throws
  // ReadError on a failed read, BudgetError if a need does not fit the budget, EngineClosed; and
  // what the interrupt check throws.
  bool next(std::vector<Ready>& ready);
  // The same without waiting: `ready` may come back empty.
  bool poll(std::vector<Ready>& ready);
  void done(int32_t need);  // unpins
  void close();             // what the destructor does; then next() says that all is done

 private:
  friend class Engine;
  void fail(const EngineState& s) const;
  Session(std::shared_ptr<EngineState> state, int32_t id) : state_(std::move(state)), id_(id) {}
  std::shared_ptr<EngineState> state_;
  int32_t id_;
};

// All methods may be called from any thread.
class Engine {
 public:
  explicit Engine(const EngineConfig& config);  // on the CPU
  Engine(const EngineConfig& config, std::unique_ptr<Backend> backend);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Checked while a session waits, about every 50 ms; may throw (Ctrl-C). For all engines.
  static void set_interrupt_check(void (*check)());

  int32_t add_file(const std::string& path);
  // See Backend::add_remote_file. Its records' bytes come through remote().
  int32_t add_remote_file(const std::string& path);
  int64_t file_bytes(int32_t file) const;  // throws std::out_of_range
  RemoteReader& remote();                  // throws where the device has none
  void set_local(const int32_t* ids, int64_t count, bool local);
  int32_t add_records(const RecordInfo* infos, int64_t count);  // first id
  // See Core::add_experts.
  int32_t add_experts(const int32_t* table, int64_t count);
  int records_per_expert() const;
  // Ids of an expert's records, -1 where it has none.
  std::vector<int32_t> expert_records(int32_t expert) const;
  int64_t record_bytes(int32_t record) const;  // payload

  std::unique_ptr<Session> open_session(const Need* needs, int64_t count);
  // Pages of a record that a session has pinned, valid until it is done with it. Null if it has
  // none.
  const uint8_t* const* pages(int32_t record) const;
  int64_t page_bytes() const;
  // First bytes of a resident record, copied (for tests and tools).
  void copy_out(int32_t record, int64_t bytes, uint8_t* out) const;

  void request(const int32_t* ids, int64_t count, Priority priority, int32_t distance = 0);
  void cancel(Priority priority, const int32_t* ids, int64_t count);
  void cancel_all(Priority priority);
  int64_t evict(const int32_t* ids, int64_t count);  // bytes freed
  void pin(const int32_t* ids, int64_t count, bool pinned);
  void set_value(const int32_t* ids, const float* values, int64_t count);

  // Returns when the memory above the budget is back with the system; if it is not within the
  // timeout, because sessions hold pages, throws; the new budget is in force all the same.
  void set_budget(int64_t bytes, double timeout_seconds = 10);
  // For callers that from now on ask for lower levels: what sessions asked for before keeps no
  // room.
  void forget_largest_need();
  // Least budget for the largest need of any session since then (at least level 0 of every expert);
  // with a level, for every expert at any level up to it.
  int64_t minimum_budget(int level = -1) const;

  std::vector<uint8_t> resident() const;  // [num_records] RecordState
  // Of each need the finest complete level in its bounds, -1: none.
  std::vector<int> resident_levels(const std::vector<Need>& needs) const;
  EngineStats stats() const;
  bool wait_idle(double timeout_seconds);  // true when no read is running, and none can be started
  void close();                            // ends reads; waiting sessions throw EngineClosed

 private:
  std::shared_ptr<EngineState> state_;
};

}  // namespace comoe
