// Serves what a device asks for through the ring: one thread, no Python. It pins what a visit uses,
// brings what it misses, tells the device when all of it is there, and turns whatever goes wrong
// into an error instead of a wait without end.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../engine/engine.h"
#include "device_backend.h"

namespace comoe {

struct MissStats {
  int64_t visits = 0, visits_with_misses = 0;
  int64_t hits = 0, misses = 0, guesses = 0;
  int64_t failed_visits = 0;
  double wait_seconds = 0;  // from a list's end to the arrival of what it missed
};

class MissServer {
 public:
  // engine is that of the backend, its plane made. timeout: how long a visit may wait for what it
  // misses, in seconds, before it is failed.
  MissServer(Engine* engine, DeviceBackend* backend, double timeout_seconds = 30);
  ~MissServer();  // no visit may be running
  MissServer(const MissServer&) = delete;
  MissServer& operator=(const MissServer&) = delete;

  // Throws ReadError with the first thing that went wrong since the last call. After it the server
  // serves on: what failed was one visit.
  void check();
  // Until this many visits are completed and served; false: not within the time.
  bool wait_completed(uint64_t visits, double timeout_seconds) const;
  MissStats stats() const;

 private:
  void run();
  bool drain();  // takes entries; true: there were any
  void open();   // the list is complete
  void advance();
  void fail(const std::string& what, bool for_good = false);

  Engine* const engine_;
  DeviceBackend* const backend_;
  const Plane plane_;
  const double timeout_seconds_;

  uint64_t position_ = 0;  // ring entries read
  uint64_t visit_ = 0;     // lists received
  std::atomic<uint64_t> completed_{0};
  std::vector<Need> misses_, hits_;
  std::unique_ptr<Session> session_;  // of the running visit
  int32_t num_misses_ = 0, missing_ = 0;
  bool arriving_ = false;  // the device waits
  double list_at_ = 0;

  mutable std::mutex mutex_;  // of what follows
  MissStats stats_;
  std::string error_;

  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

}  // namespace comoe
