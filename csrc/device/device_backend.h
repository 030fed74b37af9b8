// Pages in a device's memory, filled from pinned host memory, and the tables by which the device
// finds them.
//
//   disk -> host tier (an engine of its own over pinned slabs, the second budget) -> copy stream ->
//   device pages -> residency table
//
// Where memory is unified there is one arena: host slabs are the device's pages, reads go straight
// into them, and nothing is copied.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "../engine/backend.h"
#include "../engine/engine.h"
#include "device_api.h"
#include "protocol.h"
#include "reclaim.h"

namespace comoe {

struct DeviceConfig {
  int64_t host_bytes = 0;         // budget of the pinned host tier; ignored where memory is unified
  uint32_t ring_capacity = 4096;  // power of two
  uint32_t ring_reserve = 1024;   // most hits, misses and end of one visit's list
  int feeders = 4;                // records on their way from the host tier at a time
};

class DeviceBackend final : public Backend, private BackendEvents {
 public:
  // Throws DeviceError, or BudgetError where the card cannot hold the budget.
  DeviceBackend(const EngineConfig& engine, const DeviceConfig& config, DeviceApi* api);
  ~DeviceBackend() override;

  // ---- For kernels ----
  // When all records and experts are known; fixed from then on. `experts` as in Core::add_experts.
  void make_plane(const std::vector<RecordInfo>& records, const std::vector<int32_t>& experts);
  bool has_plane() const { return planed_; }
  const Plane& plane() const { return plane_; }
  const EngineConfig& engine_config() const { return engine_; }

  // ---- For the miss server ----
  void list_received(uint64_t visit, std::vector<int32_t> records);
  void visits_completed(uint64_t visit);
  // Behind all publications so far, on the copy stream.
  void write_arrived(uint64_t visit);
  // The first failure of the device, empty: none.
  std::string failure() const;

  // ---- Backend ----
  void start(BackendEvents* events) override;
  int32_t add_file(const std::string& path) override;
  int32_t add_remote_file(const std::string& path) override;
  RemoteReader* remote() override;
  void set_local(int32_t record, bool local) override;
  int64_t file_bytes(int32_t file) const override;
  BackendStats stats() const override;
  int max_slabs() const override { return max_slabs_; }
  bool map_slab(int slab) override;
  void unmap_slab(int slab) override;
  uint8_t* page_address(int32_t page) override;
  void copy_page(int32_t from, int32_t to) override;
  void read_page(const uint8_t* page, int64_t bytes, uint8_t* out) const override;
  void start_read(const ReadJob& job) override;
  void promote_read(int32_t record) override;
  bool cancel_read(int32_t record) override;
  void publish(int32_t record, const std::vector<uint8_t*>* pages) override;
  uint64_t launched() const override;
  uint64_t completed() const override;
  Reuse reuse(uint64_t step) const override;
  void stop() override;

 private:
  struct Feed {  // a record whose bytes the host tier brings
    ReadJob job;
    std::vector<uint8_t*> pages;
  };
  struct Copying {  // a record, or a cleared residency word, on the copy stream
    uint64_t mark;
    int32_t record;             // -1: not a record
    uint64_t ticket = 0;        // of a cleared word
    uint64_t* begun = nullptr;  // ... where `begun` is read to
    std::shared_ptr<Session> held;
  };

  void feed();     // thread: host tier to copy stream
  void collect();  // thread: what the copy stream has done
  void fail(const std::string& what);
  void report(int32_t record, ReadStatus status, const std::string& error);
  uint64_t slab_address(int slab) const {
    return base_ + static_cast<uint64_t>(slab) * engine_.slab_bytes;
  }
  // Of the one arena where memory is unified.
  void read_done(int32_t record, ReadStatus status, const std::string& error) override;
  void step_passed() override {}

  const EngineConfig engine_;
  const DeviceConfig config_;
  DeviceApi* const api_;
  const int pages_per_slab_;
  const bool unified_;
  int max_slabs_ = 0;
  uint64_t base_ = 0;
  int64_t reserved_ = 0;
  BackendEvents* events_ = nullptr;

  std::unique_ptr<Engine> host_;    // the host tier: record i is its record and its expert i
  std::unique_ptr<Backend> arena_;  // where memory is unified

  bool planed_ = false;
  Plane plane_{};
  std::vector<uint64_t> device_allocations_;
  std::vector<void*> mapped_allocations_;
  std::vector<int64_t> first_page_;
  uint64_t* table_mirror_ = nullptr;    // pinned copy of the page table
  std::vector<uint64_t> table_mark_;    // [records] after the last copy of its row
  std::vector<uint64_t*> begun_slots_;  // pinned words to read `begun` into, free ones

  mutable std::mutex mutex_;  // after the engine's; before the copy stream's own
  std::condition_variable changed_;
  bool stopping_ = false;
  std::string failure_;  // of the device, which is then of no use
  std::string refused_;  // last reason why the host tier got no slab
  Reclaimer reclaimer_;
  std::deque<Feed> demand_, others_;
  std::deque<Copying> copying_;
  int64_t num_records_ = 0;
  std::vector<std::thread> feeders_;
  std::thread collector_;
};

}  // namespace comoe
