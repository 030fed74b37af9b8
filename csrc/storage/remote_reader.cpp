#include "remote_reader.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <iterator>

#include "crc32c.h"

namespace comoe {
namespace {

constexpr int64_t kAlign = 4096;  // of extents, which are padded with zeros

int64_t end_of(const ReadJob& job) { return job.info.offset + job.info.bytes; }

std::string describe(const ReadJob& job, const std::string& message) {
  return "fetching record " + std::to_string(job.record) + ": " + message;
}

}  // namespace

void RemoteReader::submit(const ReadJob& job) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (stopping_) return;
  (job.demand ? demand_ : others_).push_back(job);
  work_.notify_one();
}

void RemoteReader::promote(int32_t record) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto at = std::find_if(others_.begin(), others_.end(),
                               [&](const ReadJob& job) { return job.record == record; });
  if (at != others_.end()) {
    at->demand = true;
    demand_.push_back(*at);
    others_.erase(at);
    work_.notify_one();
    return;
  }
  for (auto& [ticket, open] : open_)
    if (open.job.record == record) open.job.demand = true;
}

bool RemoteReader::cancel(int32_t record) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto at = std::find_if(others_.begin(), others_.end(),
                               [&](const ReadJob& job) { return job.record == record; });
  if (at == others_.end()) return false;
  others_.erase(at);
  return true;
}

void RemoteReader::stop() {
  std::unique_lock<std::mutex> lock(mutex_);
  stopping_ = true;
  work_.notify_all();
  demand_.clear();
  others_.clear();
  open_.clear();
  others_left_.clear();
  idle_.wait(lock, [&] { return reporting_ == 0; });
}

bool RemoteReader::stopped() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return stopping_;
}

bool RemoteReader::has_demand() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return !demand_.empty();
}

std::vector<RemoteRequest> RemoteReader::take(double timeout_seconds, int64_t gap,
                                              int64_t most_bytes, int most_others) {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto may_take_others = [&] {
    return !others_.empty() && static_cast<int>(others_left_.size()) < most_others;
  };
  work_.wait_for(lock, std::chrono::duration<double>(std::clamp(timeout_seconds, 0.0, 3600.0)),
                 [&] { return stopping_ || !demand_.empty() || may_take_others(); });
  if (stopping_ || (demand_.empty() && !may_take_others())) return {};
  const bool urgent = !demand_.empty();
  std::deque<ReadJob>& from = urgent ? demand_ : others_;

  // What lies around the first, as far as it goes in one piece.
  const ReadJob first = from.front();
  std::vector<size_t> near;  // of the same file, by offset
  for (size_t i = 0; i < from.size(); ++i)
    if (from[i].info.file == first.info.file) near.push_back(i);
  std::sort(near.begin(), near.end(),
            [&](size_t a, size_t b) { return from[a].info.offset < from[b].info.offset; });
  size_t low = static_cast<size_t>(std::find(near.begin(), near.end(), 0) - near.begin());
  size_t high = low;
  int64_t begin = first.info.offset, end = end_of(first);
  for (bool grew = true; grew;) {
    grew = false;
    if (high + 1 < near.size()) {
      const ReadJob& next = from[near[high + 1]];
      if (next.info.offset - end <= gap && std::max(end, end_of(next)) - begin <= most_bytes) {
        end = std::max(end, end_of(next));
        ++high;
        grew = true;
      }
    }
    if (low > 0) {
      const ReadJob& next = from[near[low - 1]];
      if (begin - end_of(next) <= gap && end - next.info.offset <= most_bytes) {
        begin = next.info.offset;
        --low;
        grew = true;
      }
    }
  }

  std::vector<RemoteRequest> taken;
  const int64_t take = next_take_++;
  for (size_t i = low; i <= high; ++i) {
    const ReadJob& job = from[near[i]];
    const int64_t ticket = next_ticket_++;
    open_.emplace(ticket, Open{job, take});
    taken.push_back(
        {ticket, job.record, job.info.file, job.info.offset, job.info.bytes, job.demand});
  }
  if (!urgent) others_left_[take] = static_cast<int>(taken.size());
  std::vector<size_t> gone(near.begin() + static_cast<int64_t>(low),
                           near.begin() + static_cast<int64_t>(high) + 1);
  std::sort(gone.rbegin(), gone.rend());
  for (size_t i : gone) from.erase(from.begin() + static_cast<int64_t>(i));
  return taken;
}

Handed RemoteReader::done(int64_t ticket, const uint8_t* data, int64_t bytes) {
  uint32_t expected;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = open_.find(ticket);
    if (found == open_.end()) return Handed::closed;
    if (found->second.job.info.bytes != bytes) {
      ++stats_.refused;
      return Handed::wrong;
    }
    expected = found->second.job.info.crc32c;
  }
  const bool right = crc32c(data, static_cast<size_t>(bytes)) == expected;
  std::unique_lock<std::mutex> lock(mutex_);
  if (!right) {
    ++stats_.refused;
    return Handed::wrong;
  }
  const auto found = open_.find(ticket);  // another source may have been first
  if (found == open_.end()) return Handed::closed;
  stats_.bytes += bytes;
  ++stats_.records;
  const ReadJob job = found->second.job;
  end_ticket(found);
  report(lock, job, ReadStatus::ok, "", data);
  return Handed::taken;
}

void RemoteReader::failed(int64_t ticket, const std::string& message) {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto found = open_.find(ticket);
  if (found == open_.end()) return;
  ++stats_.failed;
  const ReadJob job = found->second.job;
  end_ticket(found);
  report(lock, job, ReadStatus::failed, describe(job, message), nullptr);
}

int RemoteReader::expire(const int32_t* records, int64_t count, const std::string& message) {
  const auto chosen = [&](const ReadJob& job) {
    return job.demand && (records == nullptr ||
                          std::find(records, records + count, job.record) != records + count);
  };
  std::unique_lock<std::mutex> lock(mutex_);
  std::vector<ReadJob> late;
  const auto waiting = std::stable_partition(demand_.begin(), demand_.end(),
                                             [&](const ReadJob& job) { return !chosen(job); });
  late.assign(waiting, demand_.end());
  demand_.erase(waiting, demand_.end());
  for (auto at = open_.begin(); at != open_.end();) {
    const auto next = std::next(at);
    if (chosen(at->second.job)) {
      late.push_back(at->second.job);
      end_ticket(at);
    }
    at = next;
  }
  stats_.failed += static_cast<int64_t>(late.size());
  for (const ReadJob& job : late) {
    if (stopping_) break;
    report(lock, job, ReadStatus::failed, describe(job, message), nullptr);
  }
  return static_cast<int>(late.size());
}

// So that nobody else closes it. The last one of a take makes room for another take.
void RemoteReader::end_ticket(std::map<int64_t, Open>::iterator at) {
  const auto others = others_left_.find(at->second.take);
  if (others != others_left_.end() && --others->second == 0) {
    others_left_.erase(others);
    work_.notify_one();
  }
  open_.erase(at);
}

void RemoteReader::report(std::unique_lock<std::mutex>& lock, const ReadJob& job, ReadStatus status,
                          const std::string& error, const uint8_t* data) {
  ++reporting_;
  lock.unlock();
  if (data != nullptr) copy_into_pages(job, data);
  events_->read_done(job.record, status, error);
  lock.lock();
  if (--reporting_ == 0) idle_.notify_all();
}

void RemoteReader::copy_into_pages(const ReadJob& job, const uint8_t* data) const {
  const int64_t bytes = job.info.bytes;
  for (int64_t at = 0; at < bytes; at += page_bytes_)
    std::memcpy(job.pages[at / page_bytes_], data + at,
                static_cast<size_t>(std::min(page_bytes_, bytes - at)));
  // As if the padded extent had been read from a file. A page is whole blocks of kAlign.
  const int64_t padding = (bytes + kAlign - 1) / kAlign * kAlign - bytes;
  if (padding > 0)
    std::memset(job.pages[bytes / page_bytes_] + bytes % page_bytes_, 0,
                static_cast<size_t>(padding));
}

bool RemoteReader::is_open(int64_t ticket) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return open_.count(ticket) > 0;
}

bool RemoteReader::is_demanded(int64_t ticket) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = open_.find(ticket);
  return found != open_.end() && found->second.job.demand;
}

RemoteStats RemoteReader::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return stats_;
}

}  // namespace comoe
