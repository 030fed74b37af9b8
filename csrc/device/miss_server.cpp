#include "miss_server.h"

#include <chrono>

namespace comoe {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Without work for so long, it sleeps between looks: a decode step's layers follow one another in
// less, so that within a step requests are seen at once.
constexpr double kSpinSeconds = 2e-3;
constexpr auto kSleep = std::chrono::microseconds(50);

}  // namespace

MissServer::MissServer(Engine* engine, DeviceBackend* backend, double timeout_seconds)
    : engine_(engine),
      backend_(backend),
      plane_(backend->plane()),
      timeout_seconds_(timeout_seconds) {
  if (!backend->has_plane()) throw std::logic_error("MissServer: the backend has no plane yet");
  thread_ = std::thread([this] { run(); });
}

MissServer::~MissServer() {
  stopping_ = true;
  thread_.join();
}

void MissServer::run() {
  double busy_at = now();
  while (!stopping_) {
    // In this order: the list of a visit that is completed has been taken.
    const uint64_t completed = load_acquire(&plane_.mailbox->completed);
    const bool took = drain();
    const bool passed = completed > completed_;
    if (passed) {
      completed_ = completed;
      if (completed_ >= visit_ && session_) {
        session_.reset();  // unpins
        arriving_ = false;
      }
      backend_->visits_completed(completed_);
    }
    advance();
    if (took || passed)
      busy_at = now();
    else if (now() - busy_at > kSpinSeconds)
      std::this_thread::sleep_for(kSleep);
    else
      std::this_thread::yield();
  }
}

bool MissServer::drain() {
  const uint64_t first = position_;
  for (;;) {
    const uint64_t word = load_acquire(plane_.ring + (position_ & (plane_.ring_capacity - 1)));
    if (word >> 40 != ring_lap(position_, plane_.ring_capacity)) break;
    const RingEntry entry = ring_unpack(word);
    ++position_;
    switch (entry.kind) {
      case RingKind::hit:
        hits_.push_back({entry.expert, entry.min_level, entry.want_level});
        break;
      case RingKind::miss:
        misses_.push_back({entry.expert, entry.min_level, entry.want_level});
        break;
      case RingKind::guess: {
        const uint32_t mask = backend_->engine_config().level_masks[entry.want_level];
        std::vector<int32_t> ids;
        const std::vector<int32_t> records = engine_->expert_records(entry.expert);
        for (size_t r = 0; r < records.size(); ++r)
          if (mask >> r & 1 && records[r] >= 0) ids.push_back(records[r]);
        std::lock_guard<std::mutex> lock(mutex_);
        ++stats_.guesses;
        try {
          engine_->request(ids.data(), static_cast<int64_t>(ids.size()), Priority::prefetch,
                           entry.distance);
        } catch (const EngineClosed&) {
        }
        break;
      }
      case RingKind::end:
        ++visit_;
        if (hits_.size() + misses_.size() != static_cast<size_t>(entry.expert))
          fail("visit " + std::to_string(visit_) + ": its list has " +
                   std::to_string(hits_.size() + misses_.size()) + " experts, not the " +
                   std::to_string(entry.expert) + " that it says",
               true);
        else
          open();
        break;
    }
  }
  if (position_ == first) return false;
  store_release(&plane_.mailbox->taken, position_);
  return true;
}

void MissServer::open() {
  std::vector<int32_t> records;
  for (const std::vector<Need>* needs : {&misses_, &hits_})
    for (const Need& need : *needs)
      for (int32_t r : engine_->expert_records(need.expert))
        if (r >= 0) records.push_back(r);
  // First, so that room for the misses is not sought among what the visit reads.
  backend_->list_received(visit_, std::move(records));
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ++stats_.visits;
    stats_.visits_with_misses += !misses_.empty();
    stats_.hits += static_cast<int64_t>(hits_.size());
    stats_.misses += static_cast<int64_t>(misses_.size());
  }
  // Misses first: a hit that was evicted while the device looked is still in its old pages, and
  // must not be waited for.
  num_misses_ = missing_ = static_cast<int32_t>(misses_.size());
  arriving_ = missing_ > 0;
  list_at_ = now();
  std::vector<Need> needs = std::move(misses_);
  needs.insert(needs.end(), hits_.begin(), hits_.end());
  misses_.clear();
  hits_.clear();
  try {
    session_ = engine_->open_session(needs.data(), static_cast<int64_t>(needs.size()));
  } catch (const std::exception& error) {
    fail("visit " + std::to_string(visit_) + ": " + error.what());
  }
}

void MissServer::advance() {
  const std::string failure = backend_->failure();
  if (!failure.empty()) {
    if (load_acquire(&plane_.mailbox->abort) != kAbortAll) fail(failure, true);
    return;
  }
  if (!arriving_) return;
  std::vector<Ready> ready;
  try {
    session_->poll(ready);
    for (const Ready& r : ready) missing_ -= r.need < num_misses_;
    if (missing_ == 0) {
      arriving_ = false;
      backend_->write_arrived(visit_);
      std::lock_guard<std::mutex> lock(mutex_);
      stats_.wait_seconds += now() - list_at_;
    } else if (now() - list_at_ > timeout_seconds_) {
      fail("visit " + std::to_string(visit_) + ": " + std::to_string(missing_) + " of its " +
           std::to_string(num_misses_) + " missing experts did not come within " +
           std::to_string(timeout_seconds_) +
           " s: a transfer was lost, or the visit's experts do not fit the budget at once; raise "
           "the budget or compute fewer tokens at a time");
    }
  } catch (const std::exception& error) {
    fail("visit " + std::to_string(visit_) + ": " + error.what());
  }
}

// The device's wait ends at once, as failed; it computes with what is resident, and check() throws.
// for_good: so do all that follow.
void MissServer::fail(const std::string& what, bool for_good) {
  arriving_ = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (error_.empty()) error_ = what;
    ++stats_.failed_visits;
  }
  store_release(&plane_.mailbox->abort, for_good ? kAbortAll : visit_);
}

void MissServer::check() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (error_.empty()) return;
  const std::string text = error_;
  error_.clear();
  throw ReadError(text);
}

bool MissServer::wait_completed(uint64_t visits, double timeout_seconds) const {
  const double until = now() + timeout_seconds;
  while (completed_.load() < visits) {
    if (now() > until) return false;
    std::this_thread::sleep_for(kSleep);
  }
  return true;
}

MissStats MissServer::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return stats_;
}

}  // namespace comoe
