#include "reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "crc32c.h"

namespace comoe {
namespace {

constexpr int64_t kAlign = 4096;
constexpr int kMaxAttempts = 5;  // of one chunk: waits 2, 4, 8 and 16 ms in between
constexpr int kMaxReads = 2;     // of a record whose checksum is wrong

// What O_DIRECT needs on this file is at most what we give: 4096 for offset, length and address.
// Kernels before 6.1 do not say; then the first read does.
bool accepts_direct(int fd) {
#ifdef STATX_DIOALIGN
  struct statx sx;
  if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &sx) == 0 && (sx.stx_mask & STATX_DIOALIGN))
    return sx.stx_dio_offset_align > 0 && sx.stx_dio_offset_align <= kAlign &&
           sx.stx_dio_mem_align <= kAlign;
#endif
  return true;
}

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

Reader::~Reader() {
  for (const auto& file : files_)
    if (file->fd >= 0) close(file->fd);
}

int32_t Reader::add_file(const std::string& path) {
  auto file = std::make_unique<DataFile>();
  file->path = path;
  if (config_.direct) {
    file->fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
    file->direct = file->fd >= 0 && accepts_direct(file->fd);
    if (file->fd >= 0 && !file->direct) {
      close(file->fd);
      file->fd = -1;
    }
  }
  if (file->fd < 0) file->fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file->fd < 0)
    throw std::runtime_error("add_file: " + path + ": " + std::strerror(errno) +
                             "; check that the store is complete and readable");
  struct stat st;
  if (fstat(file->fd, &st) != 0 || !S_ISREG(st.st_mode)) {
    close(file->fd);
    throw std::runtime_error("add_file: " + path + ": expected a regular file");
  }
  file->bytes = st.st_size;
  std::lock_guard<std::mutex> lock(mutex_);
  files_.push_back(std::move(file));
  return static_cast<int32_t>(files_.size()) - 1;
}

int64_t Reader::file_bytes(int32_t file) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return files_.at(file)->bytes;
}

BackendStats Reader::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  BackendStats stats = stats_;
  if (running_ > 0) stats.busy_seconds += seconds_since(busy_since_);
  stats.io = kind();
  return stats;
}

void Reader::submit(const ReadJob& job) {
  auto task = std::make_unique<ReadTask>();
  task->job = job;
  task->extent_bytes = (job.info.bytes + kAlign - 1) / kAlign * kAlign;
  std::lock_guard<std::mutex> lock(mutex_);
  if (stopping_) return;
  task->file = files_.at(job.info.file).get();
  (job.demand ? demand_ : others_).push_back(task.get());
  tasks_[job.record] = std::move(task);
  wake();
}

void Reader::promote(int32_t record) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = tasks_.find(record);
  if (found == tasks_.end() || found->second->job.demand) return;
  ReadTask* task = found->second.get();
  task->job.demand = true;
  const auto at = std::find(others_.begin(), others_.end(), task);
  if (at == others_.end()) return;  // all its chunks are running
  others_.erase(at);
  demand_.push_back(task);
}

bool Reader::cancel(int32_t record) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = tasks_.find(record);
  if (found == tasks_.end()) return false;
  const ReadTask* task = found->second.get();
  if (task->job.demand || task->next > 0 || task->reads > 1) return false;
  others_.erase(std::find(others_.begin(), others_.end(), task));
  tasks_.erase(found);
  return true;
}

bool Reader::next_chunk(Chunk& chunk) {
  std::deque<ReadTask*>& from = demand_.empty() ? others_ : demand_;
  if (from.empty() || stopping_) return false;
  // What is with the kernel cannot be overtaken, so speculation fills only half of it.
  if (demand_.empty() && others_running_ >= std::max(1, depth() / 2)) return false;
  ReadTask* task = from.front();
  chunk = Chunk{};
  chunk.task = task;
  chunk.demand = !demand_.empty();
  others_running_ += !chunk.demand;
  if (running_++ == 0) busy_since_ = std::chrono::steady_clock::now();
  chunk.begin = task->next;
  chunk.bytes = std::min(config_.chunk_bytes, task->extent_bytes - task->next);
  // No sliver at the end: it would cost a whole request.
  if (task->extent_bytes - task->next < config_.chunk_bytes * 5 / 4)
    chunk.bytes = task->extent_bytes - task->next;
  task->next += chunk.bytes;
  ++task->chunks_running;
  if (task->next == task->extent_bytes) from.pop_front();
  return true;
}

size_t Reader::most_urgent(const std::vector<Chunk>& ended) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto demanded = [](const Chunk& chunk) { return chunk.task->job.demand; };
  const auto found = std::find_if(ended.begin(), ended.end(), demanded);
  return found == ended.end() ? 0 : static_cast<size_t>(found - ended.begin());
}

void Reader::fill_iovecs(const Chunk& chunk, std::vector<iovec>& iovecs) const {
  iovecs.clear();
  const int64_t page_bytes = config_.page_bytes;
  for (int64_t at = chunk.begin + chunk.done; at < chunk.begin + chunk.bytes;) {
    uint8_t* address = chunk.task->job.pages[at / page_bytes] + at % page_bytes;
    const int64_t bytes = std::min(page_bytes - at % page_bytes, chunk.begin + chunk.bytes - at);
    if (!iovecs.empty() &&
        static_cast<uint8_t*>(iovecs.back().iov_base) + iovecs.back().iov_len == address)
      iovecs.back().iov_len += bytes;
    else if (iovecs.size() == 1024)  // IOV_MAX: the rest counts as a short read
      break;
    else
      iovecs.push_back({address, static_cast<size_t>(bytes)});
    at += bytes;
  }
}

std::string Reader::describe(const ReadTask& task, int64_t at, const std::string& reason) {
  return "reading record " + std::to_string(task.job.record) + " from " + task.file->path +
         " at offset " + std::to_string(task.job.info.offset + at) + ": " + reason;
}

void Reader::request_ended(const Chunk& chunk) {
  others_running_ -= !chunk.demand;
  if (--running_ == 0) stats_.busy_seconds += seconds_since(busy_since_);
}

bool Reader::handle_result(Chunk& chunk, int64_t result) {
  ReadTask& task = *chunk.task;
  std::string reason;
  if (result > 0) {
    chunk.done += result;
    const bool buffered = !task.file->direct;
    if (buffered && chunk.done >= chunk.bytes)
      posix_fadvise(task.file->fd, task.job.info.offset + chunk.begin, chunk.bytes,
                    POSIX_FADV_DONTNEED);
    std::lock_guard<std::mutex> lock(mutex_);
    stats_.bytes_from_disk += result;
    if (chunk.done >= chunk.bytes) {
      stats_.buffered_reads += buffered;
      request_ended(chunk);
      return true;
    }
    const bool aligned = chunk.done % kAlign == 0;
    chunk.done -= chunk.done % kAlign;  // a direct read can only go on from here
    if (aligned) return false;
    reason = "the file ends inside the record; it is truncated: pack it again";
  } else if (result == 0) {
    reason = "the file ends before the record; it is truncated: pack it again";
  } else if (result == -EINVAL && task.file->direct.exchange(false)) {
    // A file system that takes the flag and then refuses to read; other threads may be reading on
    // with it.
    fcntl(task.file->fd, F_SETFL, fcntl(task.file->fd, F_GETFL) & ~O_DIRECT);
  } else if (result == -EINVAL && chunk.attempts == 0) {
    // Another thread has just switched the file over.
  } else {
    reason = std::string(std::strerror(static_cast<int>(-result))) +
             (result == -EIO
                  ? "; the disk or its connection is failing: check the system log, copy the store "
                    "to another disk"
                  : "; check the disk");
  }
  std::unique_lock<std::mutex> lock(mutex_);
  if (++chunk.attempts < kMaxAttempts && !stopping_) {
    ++stats_.retries;
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::milliseconds(1 << chunk.attempts));
    return false;
  }
  request_ended(chunk);
  if (task.error.empty())
    task.error = describe(task, chunk.begin + chunk.done,
                          reason + " (tried " + std::to_string(chunk.attempts) + " times)");
  return true;
}

bool Reader::checksum_is_right(const ReadTask& task) const {
  uint32_t crc = 0;
  for (int64_t at = 0; at < task.job.info.bytes; at += config_.page_bytes)
    crc = crc32c(task.job.pages[at / config_.page_bytes],
                 static_cast<size_t>(std::min(config_.page_bytes, task.job.info.bytes - at)), crc);
  return crc == task.job.info.crc32c;
}

void Reader::finish_chunk(const Chunk& chunk) {
  ReadTask* const task = chunk.task;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    --task->chunks_running;
    if (!task->error.empty() && task->next < task->extent_bytes) {  // no use in reading the rest
      std::deque<ReadTask*>& queue = task->job.demand ? demand_ : others_;
      queue.erase(std::find(queue.begin(), queue.end(), task));
      task->next = task->extent_bytes;
    }
    if (task->chunks_running > 0 || task->next < task->extent_bytes) return;
  }
  // The last chunk: nobody else looks at the task now, but for promote(), which sets job.demand.
  ReadStatus status = ReadStatus::ok;
  if (!task->error.empty()) {
    status = ReadStatus::failed;
  } else if (config_.verify && !checksum_is_right(*task)) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (task->reads < kMaxReads && !stopping_) {  // a bit may have flipped on its way
      ++task->reads;
      ++stats_.retries;
      task->next = 0;
      (task->job.demand ? demand_ : others_).push_front(task);
      wake();
      return;
    }
    status = ReadStatus::corrupt;
    task->error = describe(*task, 0,
                           "wrong checksum in " + std::to_string(task->job.info.bytes) +
                               " bytes, " + std::to_string(task->reads) +
                               " times; the file is damaged: pack it again or copy it anew");
  }
  std::unique_ptr<ReadTask> owned;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = tasks_.find(task->job.record);
    owned = std::move(found->second);
    tasks_.erase(found);  // before it is reported: the record may be asked for again at once
  }
  events_->read_done(owned->job.record, status, owned->error);
}

// io_uring read at 0.95 to 1.01 of the best raw reader's rate with 8 to 16 requests in flight,
// threads at 0.85 to 0.92 with 4 to 32 (bench/results/disk.csv); on busy cores threads fell to
// 0.65. But many containers refuse io_uring, and threads work everywhere.
std::unique_ptr<Reader> make_reader(const ReaderConfig& config, BackendEvents* events) {
  if (config.kind != "threads")
    if (auto reader = make_uring_reader(config, events)) return reader;
  return make_thread_reader(config, events);
}

}  // namespace comoe
