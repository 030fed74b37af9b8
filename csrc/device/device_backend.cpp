#include "device_backend.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>

#include "../engine/cpu_backend.h"

namespace comoe {
namespace {

constexpr auto kPoll = std::chrono::microseconds(20);

uint64_t address_of(const void* p) { return reinterpret_cast<uint64_t>(p); }

}  // namespace

DeviceBackend::DeviceBackend(const EngineConfig& engine, const DeviceConfig& config, DeviceApi* api)
    : engine_(engine),
      config_(config),
      api_(api),
      pages_per_slab_(static_cast<int>(engine.slab_bytes / engine.page_bytes)),
      unified_(api->unified()) {
  const auto text = [](int64_t n) { return std::to_string(n); };
  if ((config.ring_capacity & (config.ring_capacity - 1)) != 0 ||
      config.ring_capacity < 2 * config.ring_reserve || config.ring_reserve < 2)
    throw std::invalid_argument(
        "DeviceBackend: ring_capacity: expected a power of two, at least twice ring_reserve (" +
        text(config.ring_reserve) + "), got " + text(config.ring_capacity));
  if (engine.slab_bytes % api->granularity() != 0)
    throw std::invalid_argument("DeviceBackend: slab_bytes: expected a multiple of " +
                                text(api->granularity()) + " on " + api->name() + ", got " +
                                text(engine.slab_bytes));
  // What another process takes later is only seen when a slab is refused.
  if (engine.budget_bytes > api->free_bytes())
    throw BudgetError("DeviceBackend: budget: expected at most the " + text(api->free_bytes()) +
                      " bytes that are free of the " + text(api->total_bytes()) + " of " +
                      api->name() + ", got " + text(engine.budget_bytes) +
                      "; lower it, or end what else uses the card (nvidia-smi shows it)");
  const auto pin = [this](void* at, int64_t bytes) {
    if (api_->pin(at, bytes)) return true;
    std::lock_guard<std::mutex> lock(mutex_);
    refused_ = "pinning " + std::to_string(bytes) +
               " bytes of host memory was refused; lower host_memory, or raise the limit of "
               "locked memory (ulimit -l)";
    return false;
  };
  const SlabHooks hooks{pin, [this](void* at, int64_t bytes) { api_->unpin(at, bytes); }};
  if (unified_) {
    arena_ = make_cpu_backend(engine, hooks);
    max_slabs_ = arena_->max_slabs();
    return;
  }
  EngineConfig host = engine;
  host.budget_bytes = config.host_bytes;
  host.level_masks = {1};
  host_ = std::make_unique<Engine>(host, make_cpu_backend(host, hooks));
  max_slabs_ = static_cast<int>(std::min<int64_t>(api->total_bytes() / engine.slab_bytes,
                                                  ((int64_t{1} << 31) - 1) / pages_per_slab_));
  reserved_ = max_slabs_ * engine.slab_bytes;
  base_ = api->reserve(reserved_);
}

DeviceBackend::~DeviceBackend() {
  stop();
  host_.reset();
  arena_.reset();
  if (base_ != 0) api_->release(base_, reserved_);
  for (uint64_t address : device_allocations_) api_->free(address);
  for (void* host : mapped_allocations_) api_->free_mapped(host);
}

void DeviceBackend::start(BackendEvents* events) {
  events_ = events;
  if (arena_) arena_->start(this);
  if (host_)
    for (int i = 0; i < std::max(2, config_.feeders); ++i)
      feeders_.emplace_back([this] { feed(); });
  collector_ = std::thread([this] { collect(); });
}

int32_t DeviceBackend::add_file(const std::string& path) {
  return unified_ ? arena_->add_file(path) : host_->add_file(path);
}

int32_t DeviceBackend::add_remote_file(const std::string& path) {
  return unified_ ? arena_->add_remote_file(path) : host_->add_remote_file(path);
}

RemoteReader* DeviceBackend::remote() { return unified_ ? arena_->remote() : &host_->remote(); }

void DeviceBackend::set_local(int32_t record, bool local) {
  if (unified_) return arena_->set_local(record, local);
  host_->set_local(&record, 1, local);
}

int64_t DeviceBackend::file_bytes(int32_t file) const {
  return unified_ ? arena_->file_bytes(file) : host_->file_bytes(file);
}

BackendStats DeviceBackend::stats() const {
  return unified_ ? arena_->stats() : host_->stats().backend;
}

void DeviceBackend::make_plane(const std::vector<RecordInfo>& records,
                               const std::vector<int32_t>& experts) {
  const int per_expert = [&] {
    uint32_t all = 0;
    for (uint32_t mask : engine_.level_masks) all |= mask;
    int n = 0;
    for (; all != 0; all >>= 1) ++n;
    return n;
  }();
  if (planed_) throw std::logic_error("DeviceBackend: the plane has been made");
  if (experts.empty() || experts.size() % per_expert != 0)
    throw std::invalid_argument("make_plane: experts: expected " + std::to_string(per_expert) +
                                " records per expert, got " + std::to_string(experts.size()));
  if (static_cast<int64_t>(experts.size()) / per_expert > kMaxRingExpert)
    throw std::invalid_argument("make_plane: experts: expected at most " +
                                std::to_string(kMaxRingExpert) + ", got " +
                                std::to_string(experts.size() / per_expert));
  num_records_ = static_cast<int64_t>(records.size());
  if (host_) {
    host_->add_records(records.data(), num_records_);
    std::vector<int32_t> own(records.size());
    for (size_t i = 0; i < own.size(); ++i) own[i] = static_cast<int32_t>(i);
    host_->add_experts(own.data(), num_records_);
  }
  first_page_.assign(1, 0);
  for (const RecordInfo& r : records)
    first_page_.push_back(first_page_.back() +
                          (r.bytes + engine_.page_bytes - 1) / engine_.page_bytes);
  table_mark_.assign(records.size(), 0);

  const auto device = [&](size_t bytes) {
    device_allocations_.push_back(api_->allocate(static_cast<int64_t>(std::max<size_t>(bytes, 8))));
    return device_allocations_.back();
  };
  const auto mapped = [&](size_t bytes) {
    mapped_allocations_.push_back(
        api_->allocate_mapped(static_cast<int64_t>(std::max<size_t>(bytes, 8))));
    return mapped_allocations_.back();
  };
  const auto constant = [&](const void* from, size_t bytes) {
    const uint64_t at = device(bytes);
    void* const staged = mapped(bytes);
    std::memcpy(staged, from, bytes);
    const DeviceCopy copy{at, address_of(staged), static_cast<int64_t>(bytes)};
    api_->copy(&copy, 1);
    return at;
  };
  plane_.state = reinterpret_cast<DeviceState*>(device(sizeof(DeviceState)));
  plane_.mailbox = static_cast<Mailbox*>(mapped(sizeof(Mailbox)));
  plane_.ring = static_cast<uint64_t*>(mapped(config_.ring_capacity * sizeof(uint64_t)));
  plane_.ring_capacity = config_.ring_capacity;
  plane_.ring_reserve = config_.ring_reserve;
  plane_.resident = reinterpret_cast<uint32_t*>(device(records.size() * sizeof(uint32_t)));
  const size_t table_bytes = static_cast<size_t>(first_page_.back()) * sizeof(uint64_t);
  plane_.page_table = reinterpret_cast<uint64_t*>(device(table_bytes));
  table_mirror_ = static_cast<uint64_t*>(mapped(table_bytes));
  plane_.first_page =
      reinterpret_cast<int64_t*>(constant(first_page_.data(), records.size() * sizeof(int64_t)));
  plane_.expert_records =
      reinterpret_cast<int32_t*>(constant(experts.data(), experts.size() * sizeof(int32_t)));
  plane_.level_masks = reinterpret_cast<uint32_t*>(
      constant(engine_.level_masks.data(), engine_.level_masks.size() * sizeof(uint32_t)));
  std::vector<uint8_t> bounds;
  for (size_t i = 0; i < experts.size() / per_expert; ++i) {
    bounds.push_back(0);
    bounds.push_back(static_cast<uint8_t>(engine_.level_masks.size() - 1));
  }
  plane_.level_bounds = reinterpret_cast<uint8_t*>(constant(bounds.data(), bounds.size()));
  plane_.records_per_expert = per_expert;
  plane_.num_levels = static_cast<int32_t>(engine_.level_masks.size());
  const uint64_t mark = api_->mark();
  while (api_->reached() < mark) std::this_thread::sleep_for(kPoll);
  std::lock_guard<std::mutex> lock(mutex_);
  planed_ = true;
}

// ---- Memory -------------------------------------------------------------------------------------

bool DeviceBackend::map_slab(int slab) {
  if (unified_) return arena_->map_slab(slab);
  try {
    return api_->map(slab_address(slab), engine_.slab_bytes);
  } catch (const DeviceError& error) {
    fail(error.what());
    return false;
  }
}

void DeviceBackend::unmap_slab(int slab) {
  if (unified_) return arena_->unmap_slab(slab);
  try {
    api_->unmap(slab_address(slab), engine_.slab_bytes);
  } catch (const DeviceError& error) {
    fail(error.what());
  }
}

uint8_t* DeviceBackend::page_address(int32_t page) {
  if (unified_) return arena_->page_address(page);
  return reinterpret_cast<uint8_t*>(slab_address(page / pages_per_slab_) +
                                    static_cast<uint64_t>(page % pages_per_slab_) *
                                        engine_.page_bytes);
}

// Before the publication of its new address, on the same stream.
void DeviceBackend::copy_page(int32_t from, int32_t to) {
  if (unified_) return arena_->copy_page(from, to);
  const DeviceCopy copy{address_of(page_address(to)), address_of(page_address(from)),
                        engine_.page_bytes};
  try {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!stopping_) api_->copy(&copy, 1);
  } catch (const DeviceError& error) {
    fail(error.what());
  }
}

void DeviceBackend::read_page(const uint8_t* page, int64_t bytes, uint8_t* out) const {
  if (unified_) {
    std::memcpy(out, page, static_cast<size_t>(bytes));
    return;
  }
  void* const staged = api_->allocate_mapped(bytes);
  const DeviceCopy copy{address_of(staged), address_of(page), bytes};
  api_->copy(&copy, 1);
  const uint64_t mark = api_->mark();
  while (api_->reached() < mark) std::this_thread::sleep_for(kPoll);
  std::memcpy(out, staged, static_cast<size_t>(bytes));
  api_->free_mapped(staged);
}

// ---- Publication and reclaiming -----------------------------------------------------------------

void DeviceBackend::publish(int32_t record, const std::vector<uint8_t*>* pages) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (stopping_ || !failure_.empty()) {
    if (pages == nullptr) reclaimer_.retire(record);
    return;
  }
  const uint64_t resident = address_of(plane_.resident + record);
  const bool moved = table_mark_[record] != 0;
  try {
    if (pages == nullptr) {
      api_->write_word(resident, 0);
      table_mark_[record] = 0;
    } else {
      // The row of the mirror is free when its last copy is done; that is long ago but where a
      // record moves right after it came.
      while (api_->reached() < table_mark_[record]) std::this_thread::sleep_for(kPoll);
      uint64_t* const row = table_mirror_ + first_page_[record];
      for (size_t i = 0; i < pages->size(); ++i) row[i] = address_of((*pages)[i]);
      const DeviceCopy copy{address_of(plane_.page_table + first_page_[record]), address_of(row),
                            static_cast<int64_t>(pages->size() * sizeof(uint64_t))};
      api_->copy(&copy, 1);
      api_->write_word(resident, 1);
    }
    if (pages == nullptr || moved) {
      // `begun` is read behind the change: later visits see the new state.
      if (begun_slots_.empty()) {
        mapped_allocations_.push_back(api_->allocate_mapped(64 * sizeof(uint64_t)));
        for (int i = 0; i < 64; ++i)
          begun_slots_.push_back(static_cast<uint64_t*>(mapped_allocations_.back()) + i);
      }
      uint64_t* const slot = begun_slots_.back();
      begun_slots_.pop_back();
      const DeviceCopy copy{address_of(slot), address_of(&plane_.state->begun), sizeof(uint64_t)};
      api_->copy(&copy, 1);
      copying_.push_back({api_->mark(), -1, reclaimer_.retire(record), slot, nullptr});
    }
    if (pages != nullptr) table_mark_[record] = api_->mark();
  } catch (const DeviceError& error) {
    if (failure_.empty()) failure_ = error.what();
    if (pages == nullptr) reclaimer_.retire(record);
  }
  changed_.notify_all();
}

uint64_t DeviceBackend::launched() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return reclaimer_.last();
}

uint64_t DeviceBackend::completed() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return reclaimer_.completed();
}

Reuse DeviceBackend::reuse(uint64_t step) const {
  std::lock_guard<std::mutex> lock(mutex_);
  if (stopping_ || !failure_.empty()) return Reuse::now;  // nothing is written there any more
  return reclaimer_.reuse(step);
}

void DeviceBackend::list_received(uint64_t visit, std::vector<int32_t> records) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    reclaimer_.received(visit, std::move(records));
  }
  events_->step_passed();
}

void DeviceBackend::visits_completed(uint64_t visit) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    reclaimer_.completed(visit);
  }
  events_->step_passed();
}

void DeviceBackend::write_arrived(uint64_t visit) {
  try {
    api_->write_count(address_of(&plane_.state->arrived), visit);
  } catch (const DeviceError& error) {
    fail(error.what());
  }
}

// ---- Reads --------------------------------------------------------------------------------------

void DeviceBackend::start_read(const ReadJob& job) {
  if (unified_) return arena_->start_read(job);
  const size_t count =
      static_cast<size_t>((job.info.bytes + engine_.page_bytes - 1) / engine_.page_bytes);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    Feed feed{job, std::vector<uint8_t*>(job.pages, job.pages + count)};
    (job.demand ? demand_ : others_).push_back(std::move(feed));
  }
  // The disk may begin at once, behind whatever is demanded.
  if (!job.demand) host_->request(&job.record, 1, Priority::prefetch);
  changed_.notify_all();
}

void DeviceBackend::promote_read(int32_t record) {
  if (unified_) return arena_->promote_read(record);
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = std::find_if(others_.begin(), others_.end(),
                                  [&](const Feed& f) { return f.job.record == record; });
  if (found == others_.end()) return;
  demand_.push_back(std::move(*found));
  others_.erase(found);
  changed_.notify_all();
}

bool DeviceBackend::cancel_read(int32_t record) {
  if (unified_) return arena_->cancel_read(record);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto in = [&](std::deque<Feed>& queue) {
      const auto found = std::find_if(queue.begin(), queue.end(),
                                      [&](const Feed& f) { return f.job.record == record; });
      if (found == queue.end()) return false;
      queue.erase(found);
      return true;
    };
    if (!in(others_) && !in(demand_)) return false;
  }
  host_->cancel(Priority::prefetch, &record, 1);  // the host tier's lock comes before ours
  return true;
}

void DeviceBackend::feed() {
  for (;;) {
    Feed feed;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [&] { return stopping_ || !demand_.empty() || !others_.empty(); });
      if (stopping_) return;
      std::deque<Feed>& queue = demand_.empty() ? others_ : demand_;
      feed = std::move(queue.front());
      queue.pop_front();
    }
    const int32_t record = feed.job.record;
    try {
      const Need need{record, 0, 0};
      std::shared_ptr<Session> session = host_->open_session(&need, 1);
      std::vector<Ready> ready;
      while (ready.empty())
        if (!session->next(ready)) throw ReadError("the host tier was closed");
      const uint8_t* const* from = host_->pages(record);
      std::vector<DeviceCopy> copies;  // runs that are contiguous on both sides
      int64_t left = feed.job.info.bytes;
      for (size_t i = 0; i < feed.pages.size(); ++i, left -= engine_.page_bytes) {
        const int64_t bytes = std::min(left, engine_.page_bytes);
        const uint64_t to = address_of(feed.pages[i]), at = address_of(from[i]);
        if (!copies.empty() && copies.back().to + copies.back().bytes == to &&
            copies.back().from + copies.back().bytes == at)
          copies.back().bytes += bytes;
        else
          copies.push_back({to, at, bytes});
      }
      std::lock_guard<std::mutex> lock(mutex_);
      if (stopping_) return;
      api_->copy(copies.data(), static_cast<int>(copies.size()));
      copying_.push_back({api_->mark(), record, 0, nullptr, std::move(session)});
      changed_.notify_all();
    } catch (const DeviceError& error) {
      fail(error.what());
      report(record, ReadStatus::failed, error.what());
    } catch (const std::exception& error) {
      std::string text = error.what();
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!refused_.empty()) text += "; " + refused_;
      }
      report(record, ReadStatus::failed, text);
    }
  }
}

void DeviceBackend::collect() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stopping_) {
    if (copying_.empty()) {
      changed_.wait(lock);
      continue;
    }
    std::deque<Copying> done;
    std::string lost;
    try {
      const uint64_t reached = api_->reached();
      while (!copying_.empty() && copying_.front().mark <= reached) {
        done.push_back(std::move(copying_.front()));
        copying_.pop_front();
      }
    } catch (const DeviceError& error) {
      lost = error.what();
      if (failure_.empty()) failure_ = lost;
      done.swap(copying_);
    }
    bool landed = false;
    for (const Copying& c : done) {
      if (c.begun == nullptr) continue;
      reclaimer_.landed(c.ticket, *c.begun);
      begun_slots_.push_back(c.begun);
      landed = true;
    }
    lock.unlock();
    for (Copying& c : done) {
      if (c.held) c.held->close();
      if (c.record >= 0) report(c.record, lost.empty() ? ReadStatus::ok : ReadStatus::failed, lost);
    }
    if (landed) events_->step_passed();
    if (done.empty()) std::this_thread::sleep_for(kPoll);
    lock.lock();
  }
}

void DeviceBackend::report(int32_t record, ReadStatus status, const std::string& error) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stopping_) return;
  }
  events_->read_done(record, status, error);
}

void DeviceBackend::read_done(int32_t record, ReadStatus status, const std::string& error) {
  events_->read_done(record, status, error);
}

void DeviceBackend::fail(const std::string& what) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (failure_.empty()) failure_ = what;
  changed_.notify_all();
}

std::string DeviceBackend::failure() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return failure_;
}

void DeviceBackend::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stopping_) return;
    stopping_ = true;
    changed_.notify_all();
  }
  if (arena_) arena_->stop();
  if (host_) host_->close();  // sessions of the feeders end
  for (std::thread& t : feeders_) t.join();
  if (collector_.joinable()) collector_.join();
  // What is under way still writes into pages and tables. A stream that stands still is left alone
  // in the end: the memory goes with the process's context.
  try {
    const uint64_t mark = api_->mark();
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (api_->reached() < mark && std::chrono::steady_clock::now() < until)
      std::this_thread::sleep_for(kPoll);
  } catch (const DeviceError&) {  // lost: nothing runs
  }
  copying_.clear();
}

}  // namespace comoe
