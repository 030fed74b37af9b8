#include "engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <mutex>

#include "cpu_backend.h"

namespace comoe {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kInterruptSlice = std::chrono::milliseconds(50);
// Running prefetches and upgrades. Enough to keep any disk busy; more would only age in line.
constexpr int64_t kSpeculationBytes = int64_t{32} << 20;

std::atomic<void (*)()> interrupt_check{nullptr};

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

EngineConfig checked(const EngineConfig& c) {
  require(c.page_bytes > 0 && c.page_bytes % 4096 == 0,
          "Engine: page_bytes: expected a positive multiple of 4096, got " +
              std::to_string(c.page_bytes));
  require(c.slab_bytes > 0 && c.slab_bytes % c.page_bytes == 0,
          "Engine: slab_bytes: expected a positive multiple of page_bytes (" +
              std::to_string(c.page_bytes) + "), got " + std::to_string(c.slab_bytes));
  require(c.slab_bytes / c.page_bytes < (int64_t{1} << 24),
          "Engine: slab_bytes: expected fewer than 2^24 pages in a slab; use larger pages");
  if (c.budget_bytes < c.slab_bytes)
    throw BudgetError("Engine: budget_bytes: expected at least one slab (" +
                      std::to_string(c.slab_bytes) + "), got " + std::to_string(c.budget_bytes) +
                      "; raise it or make slabs smaller");
  require(!c.level_masks.empty() && c.level_masks.size() <= 32 &&
              std::all_of(c.level_masks.begin(), c.level_masks.end(),
                          [](uint32_t m) { return m != 0; }),
          "Engine: level_masks: expected 1 to 32 masks, each with at least one bit set");
  require(c.io_threads >= 1 && c.io_threads <= 64,
          "Engine: io_threads: expected 1 to 64, got " + std::to_string(c.io_threads));
  require(c.uring_depth >= 1 && c.uring_depth <= 256,
          "Engine: uring_depth: expected 1 to 256, got " + std::to_string(c.uring_depth));
  require(c.io == "auto" || c.io == "threads" || c.io == "uring",
          "Engine: io: expected auto, threads or uring, got " + c.io);
  return c;
}

CoreConfig core_config(const EngineConfig& c) {
  CoreConfig core;
  core.page_bytes = c.page_bytes;
  core.pages_per_slab = static_cast<int>(c.slab_bytes / c.page_bytes);
  core.level_masks = c.level_masks;
  core.speculation_pages = std::max<int64_t>(1, kSpeculationBytes / c.page_bytes);
  return core;
}

}  // namespace

// Lock order: `mutex`, then whatever the backend locks. The backend calls read_done and step_passed
// holding nothing.
struct EngineState final : BackendEvents {
  EngineState(const EngineConfig& c, std::unique_ptr<Backend> b)
      : config(checked(c)),
        backend(std::move(b)),
        core(core_config(c), backend.get()),
        budget(c.budget_bytes) {
    core.set_target_slabs(slabs_of(c.budget_bytes));
    backend->start(this);
  }
  ~EngineState() override { backend->stop(); }

  void read_done(int32_t record, ReadStatus status, const std::string& error) override {
    std::lock_guard<std::mutex> lock(mutex);
    core.read_done(record, status, error);
    notify();
  }
  void step_passed() override {
    std::lock_guard<std::mutex> lock(mutex);
    core.step_passed();
    notify();
  }

  // After every event, with the lock held.
  void notify() {
    const bool woken = !core.take_woken().empty();
    if (woken || control_waiters > 0) changed.notify_all();
  }

  int slabs_of(int64_t bytes) const {
    return static_cast<int>(std::min<int64_t>(bytes / config.slab_bytes, backend->max_slabs()));
  }
  void require_open() const {
    if (closed) throw EngineClosed("Engine: it was closed; make a new one");
  }
  void check_ids(const char* op, const int32_t* ids, int64_t count) const {
    for (int64_t i = 0; i < count; ++i)
      require(ids[i] >= 0 && ids[i] < core.num_records(),
              std::string(op) + ": ids[" + std::to_string(i) + "]: expected a record in [0, " +
                  std::to_string(core.num_records()) + "), got " + std::to_string(ids[i]));
  }
  // With the lock held, until condition() or the timeout; condition's last value.
  template <class F>
  bool wait_until(std::unique_lock<std::mutex>& lock, double timeout_seconds, F&& condition) {
    const auto deadline =
        Clock::now() + std::chrono::duration_cast<Clock::duration>(
                           std::chrono::duration<double>(std::clamp(timeout_seconds, 0.0, 1e9)));
    ++control_waiters;
    bool met = condition();
    while (!met && Clock::now() < deadline) {
      changed.wait_until(lock, std::min(deadline, Clock::now() + kInterruptSlice));
      met = condition();
      if (met) break;
      try {
        check_interrupt(lock);
      } catch (...) {
        --control_waiters;
        throw;
      }
    }
    --control_waiters;
    return met;
  }
  void check_interrupt(std::unique_lock<std::mutex>& lock) {
    const auto check = interrupt_check.load();
    if (check == nullptr) return;
    lock.unlock();  // it may wait for Python's lock, whose owner may wait for ours
    try {
      check();
    } catch (...) {
      lock.lock();
      throw;
    }
    lock.lock();
  }

  const EngineConfig config;
  std::unique_ptr<Backend> backend;
  mutable std::mutex mutex;
  std::condition_variable changed;
  Core core;
  int64_t budget;
  int control_waiters = 0;  // threads in wait_until, which no session's wake-up reaches
  int64_t waits = 0;
  double wait_seconds = 0;
  bool closed = false;
};

// ---- Session -----------------------------------------------------------------------------------

Session::~Session() { close(); }

void Session::close() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  if (!state_->core.has_session(id_)) return;
  state_->core.close_session(id_);
  state_->changed.notify_all();  // another thread may wait in next()
  state_->notify();
}

bool Session::poll(std::vector<Ready>& ready) {
  EngineState& s = *state_;
  std::lock_guard<std::mutex> lock(s.mutex);
  ready.clear();
  if (!s.core.has_session(id_)) return false;
  const Next result = s.core.next(id_, ready);
  if (result != Next::failed) return result != Next::end;
  s.require_open();
  fail(s);
  return false;
}

// With the lock held.
void Session::fail(const EngineState& s) const {
  if (s.core.is_budget_error(id_)) throw BudgetError(s.core.error(id_));
  throw ReadError(s.core.error(id_));
}

bool Session::next(std::vector<Ready>& ready) {
  EngineState& s = *state_;
  std::unique_lock<std::mutex> lock(s.mutex);
  for (;;) {
    ready.clear();
    if (!s.core.has_session(id_)) return false;
    const Next result = s.core.next(id_, ready);
    if (result == Next::ready || result == Next::hold) return true;
    if (result == Next::end) return false;
    if (result == Next::failed) {
      s.require_open();
      fail(s);
    }
    s.require_open();
    const auto begin = Clock::now();
    const bool timed_out = s.changed.wait_for(lock, kInterruptSlice) == std::cv_status::timeout;
    ++s.waits;
    s.wait_seconds += std::chrono::duration<double>(Clock::now() - begin).count();
    if (timed_out) s.check_interrupt(lock);
  }
}

void Session::done(int32_t need) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  if (!state_->core.has_session(id_)) return;
  state_->core.done(id_, need);
  state_->notify();
}

// ---- Engine ------------------------------------------------------------------------------------

Engine::Engine(const EngineConfig& config) : Engine(config, make_cpu_backend(checked(config))) {}

Engine::Engine(const EngineConfig& config, std::unique_ptr<Backend> backend)
    : state_(std::make_shared<EngineState>(config, std::move(backend))) {}

Engine::~Engine() { close(); }

void Engine::set_interrupt_check(void (*check)()) { interrupt_check = check; }

int64_t Engine::page_bytes() const { return state_->config.page_bytes; }

int32_t Engine::add_file(const std::string& path) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->require_open();
  return state_->backend->add_file(path);
}

int64_t Engine::file_bytes(int32_t file) const { return state_->backend->file_bytes(file); }

int32_t Engine::add_remote_file(const std::string& path) {
  remote();
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->require_open();
  return state_->backend->add_remote_file(path);
}

// Not under the engine's lock: it has its own, which is taken after ours.
RemoteReader& Engine::remote() {
  RemoteReader* const remote = state_->backend->remote();
  if (remote == nullptr)
    throw std::runtime_error("Engine: this device cannot take records from elsewhere");
  return *remote;
}

void Engine::set_local(const int32_t* ids, int64_t count, bool local) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->check_ids("set_local", ids, count);
  for (int64_t i = 0; i < count; ++i) state_->backend->set_local(ids[i], local);
}

int32_t Engine::add_records(const RecordInfo* infos, int64_t count) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  EngineState& s = *state_;
  s.require_open();
  require(s.core.num_records() + count < (int64_t{1} << 31), "add_records: more than 2^31 records");
  for (int64_t i = 0; i < count; ++i) {
    const RecordInfo& info = infos[i];
    const std::string at = "add_records: record " + std::to_string(i) + ": ";
    int64_t file_bytes = -1;
    try {
      file_bytes = s.backend->file_bytes(info.file);
    } catch (const std::out_of_range&) {
    }
    require(file_bytes >= 0,
            at + "file: expected an id from add_file, got " + std::to_string(info.file));
    require(info.bytes >= 0 && info.bytes < (int64_t{1} << 40),
            at + "nbytes: expected 0 to 2^40, got " + std::to_string(info.bytes));
    require(info.offset >= 0 && info.offset % 4096 == 0,
            at + "offset: expected a multiple of 4096, got " + std::to_string(info.offset));
    require(info.bytes == 0 || info.offset <= file_bytes - (info.bytes + 4095) / 4096 * 4096,
            at + "its extent (offset " + std::to_string(info.offset) + ", " +
                std::to_string(info.bytes) + " bytes, padded to 4096) ends after the file (" +
                std::to_string(file_bytes) +
                " bytes); the file is truncated or belongs to another store: pack it again");
  }
  return s.core.add_records(infos, count);
}

int32_t Engine::add_experts(const int32_t* table, int64_t count) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->require_open();
  return state_->core.add_experts(table, count);
}

int Engine::records_per_expert() const { return state_->core.records_per_expert(); }

std::vector<int32_t> Engine::expert_records(int32_t expert) const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  const Core& core = state_->core;
  require(expert >= 0 && expert < core.num_experts(), "expert_records: expected an expert in [0, " +
                                                          std::to_string(core.num_experts()) +
                                                          "), got " + std::to_string(expert));
  std::vector<int32_t> records;
  for (int r = 0; r < core.records_per_expert(); ++r) records.push_back(core.record_of(expert, r));
  return records;
}

int64_t Engine::record_bytes(int32_t record) const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->check_ids("record_bytes", &record, 1);
  return state_->core.info(record).bytes;
}

std::unique_ptr<Session> Engine::open_session(const Need* needs, int64_t count) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->require_open();
  const int32_t id = state_->core.open_session(needs, count);
  state_->notify();
  return std::unique_ptr<Session>(new Session(state_, id));
}

const uint8_t* const* Engine::pages(int32_t record) const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->check_ids("pages", &record, 1);
  const auto& addresses = state_->core.addresses(record);
  return addresses.empty() ? nullptr : addresses.data();
}

void Engine::copy_out(int32_t record, int64_t bytes, uint8_t* out) const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  const Core& core = state_->core;
  state_->check_ids("copy_out", &record, 1);
  require(
      core.state(record) == RecordState::resident,
      "copy_out: record " + std::to_string(record) + " is not resident; use it within a session");
  require(bytes >= 0 && bytes <= core.info(record).bytes,
          "copy_out: bytes: expected 0 to " + std::to_string(core.info(record).bytes) + ", got " +
              std::to_string(bytes));
  const int64_t page_bytes = state_->config.page_bytes;
  for (int64_t at = 0; at < bytes; at += page_bytes)
    state_->backend->read_page(core.addresses(record)[at / page_bytes],
                               std::min(page_bytes, bytes - at), out + at);
}

void Engine::request(const int32_t* ids, int64_t count, Priority priority, int32_t distance) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->require_open();
  require(priority != Priority::demand,
          "request: priority: expected prefetch (1) or upgrade (2), got demand (0): only a session "
          "demands");
  state_->check_ids("request", ids, count);
  for (int64_t i = 0; i < count; ++i) state_->core.request(ids[i], priority, distance);
  state_->core.pump();
  state_->notify();
}

void Engine::cancel(Priority priority, const int32_t* ids, int64_t count) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->check_ids("cancel", ids, count);
  for (int64_t i = 0; i < count; ++i) state_->core.cancel(ids[i], priority);
  state_->core.pump();
  state_->notify();
}

void Engine::cancel_all(Priority priority) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->core.cancel_all(priority);
  state_->core.pump();
  state_->notify();
}

int64_t Engine::evict(const int32_t* ids, int64_t count) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->check_ids("evict", ids, count);
  int64_t pages = 0;
  for (int64_t i = 0; i < count; ++i) pages += state_->core.evict(ids[i]);
  state_->notify();
  return pages * state_->config.page_bytes;
}

void Engine::pin(const int32_t* ids, int64_t count, bool pinned) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->check_ids("pin", ids, count);
  std::vector<int32_t> changed;  // all or none
  try {
    for (int64_t i = 0; i < count; ++i) {
      if (state_->core.is_user_pinned(ids[i]) == pinned) continue;
      state_->core.pin(ids[i], pinned);
      changed.push_back(ids[i]);
    }
  } catch (...) {
    for (int32_t id : changed) state_->core.pin(id, !pinned);
    state_->notify();
    throw;
  }
  state_->notify();
}

void Engine::set_value(const int32_t* ids, const float* values, int64_t count) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->check_ids("set_value", ids, count);
  for (int64_t i = 0; i < count; ++i)
    require(!std::isnan(values[i]),
            "set_value: values[" + std::to_string(i) + "]: expected a number, got nan");
  for (int64_t i = 0; i < count; ++i) state_->core.set_value(ids[i], values[i]);
  state_->core.values_changed();
  state_->notify();
}

static int64_t minimum_budget_locked(const EngineState& s, int level) {
  const Core& core = s.core;
  const int64_t pages = level < 0
                            ? std::max(core.largest_need_pages(0), core.demand_reserve_pages())
                            : core.largest_need_pages(level);
  const int64_t per_slab = core.config().pages_per_slab;
  const int64_t slabs = (pages + core.user_pinned_pages() + per_slab - 1) / per_slab;
  return std::max<int64_t>(slabs, 1) * s.config.slab_bytes;
}

int64_t Engine::minimum_budget(int level) const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  const int num_levels = static_cast<int>(state_->config.level_masks.size());
  require(level >= -1 && level < num_levels, "minimum_budget: level: expected 0 to " +
                                                 std::to_string(num_levels - 1) + ", got " +
                                                 std::to_string(level));
  return minimum_budget_locked(*state_, level);
}

void Engine::forget_largest_need() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->core.forget_largest_need();
}

void Engine::set_budget(int64_t bytes, double timeout_seconds) {
  std::unique_lock<std::mutex> lock(state_->mutex);
  EngineState& s = *state_;
  s.require_open();
  const int64_t least = minimum_budget_locked(s, -1);
  if (bytes < least)
    throw BudgetError("set_budget: bytes: expected at least " + std::to_string(least) +
                      " (one need and what is pinned, in whole slabs), got " +
                      std::to_string(bytes) + "; give more, use a lower level or unpin records");
  s.budget = bytes;
  s.core.set_target_slabs(s.slabs_of(bytes));
  s.notify();
  const int target = s.core.target_slabs();
  const bool met = s.wait_until(lock, timeout_seconds, [&] {
    return s.closed || s.core.target_slabs() != target ||
           s.core.target_reached();  // or another's call
  });
  if (met) return;
  throw std::runtime_error(
      "set_budget: " + std::to_string(s.core.pool().mapped_slabs() - target) + " slabs (" +
      std::to_string((s.core.pool().mapped_slabs() - target) * s.config.slab_bytes) +
      " bytes) are still in use by open sessions after " + std::to_string(timeout_seconds) +
      " s; the new budget is in force and they go back when those sessions end: finish or drop "
      "them");
}

std::vector<int> Engine::resident_levels(const std::vector<Need>& needs) const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  const Core& core = state_->core;
  std::vector<int> levels;
  levels.reserve(needs.size());
  for (const Need& need : needs) {
    require(need.expert >= 0 && need.expert < core.num_experts(),
            "resident_levels: there is no expert " + std::to_string(need.expert));
    levels.push_back(core.best_resident_level(need));
  }
  return levels;
}

std::vector<uint8_t> Engine::resident() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  std::vector<uint8_t> states(state_->core.num_records());
  for (size_t r = 0; r < states.size(); ++r)
    states[r] = static_cast<uint8_t>(state_->core.state(static_cast<int32_t>(r)));
  return states;
}

EngineStats Engine::stats() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  const EngineState& s = *state_;
  const PagePool& pool = s.core.pool();
  EngineStats stats;
  stats.core = s.core.stats();
  stats.backend = s.backend->stats();
  stats.waits = s.waits;
  stats.wait_seconds = s.wait_seconds;
  stats.page_bytes = s.config.page_bytes;
  stats.budget_bytes = s.budget;
  stats.slabs = pool.mapped_slabs();
  stats.slabs_target = s.core.target_slabs();
  stats.mapped_bytes = stats.slabs * s.config.slab_bytes;
  stats.pages_free = pool.free_pages();
  stats.pages_reclaiming = s.core.reclaiming_pages();
  for (int i = 0; i < pool.num_slabs(); ++i)
    if (pool.is_mapped(i)) stats.pages_used += pool.used_pages(i);
  stats.resident_bytes = s.core.resident_bytes();
  stats.loading = s.core.loading();
  stats.queued = static_cast<int64_t>(s.core.queue().size());
  stats.sessions = s.core.num_sessions();
  return stats;
}

bool Engine::wait_idle(double timeout_seconds) {
  std::unique_lock<std::mutex> lock(state_->mutex);
  EngineState& s = *state_;
  return s.wait_until(lock, timeout_seconds, [&] { return s.closed || s.core.loading() == 0; });
}

void Engine::close() {
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    if (state_->closed) return;
    state_->closed = true;
    state_->core.cancel_all(Priority::prefetch);
    state_->core.cancel_all(Priority::upgrade);
    state_->changed.notify_all();
  }
  state_->backend->stop();  // not under the lock: reads that end now still report
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->core.set_target_slabs(0);  // what sessions hold goes when they end
}

}  // namespace comoe
