// Requests in flight by io_uring: one thread keeps up to uring_depth chunks with the kernel.
// Straight system calls: the few that are needed do not justify a library.
#include <linux/io_uring.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>

#include "reader.h"

namespace comoe {
namespace {

// The two rings that are shared with the kernel. Used by one thread.
class Ring {
 public:
  Ring() = default;
  Ring(const Ring&) = delete;
  ~Ring() {
    if (sqes_ != MAP_FAILED) munmap(sqes_, sqes_bytes_);
    if (cq_ != MAP_FAILED && cq_ != sq_) munmap(cq_, cq_bytes_);
    if (sq_ != MAP_FAILED) munmap(sq_, sq_bytes_);
    if (fd_ >= 0) close(fd_);
  }

  bool open(unsigned entries) {
    io_uring_params params;
    std::memset(&params, 0, sizeof(params));
    fd_ = static_cast<int>(syscall(__NR_io_uring_setup, entries, &params));
    if (fd_ < 0) return false;
    sq_bytes_ = params.sq_off.array + params.sq_entries * sizeof(uint32_t);
    cq_bytes_ = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
    if (params.features & IORING_FEAT_SINGLE_MMAP)
      sq_bytes_ = cq_bytes_ = std::max(sq_bytes_, cq_bytes_);
    sq_ = map(sq_bytes_, IORING_OFF_SQ_RING);
    cq_ = params.features & IORING_FEAT_SINGLE_MMAP ? sq_ : map(cq_bytes_, IORING_OFF_CQ_RING);
    sqes_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
    sqes_ = map(sqes_bytes_, IORING_OFF_SQES);
    if (sq_ == MAP_FAILED || cq_ == MAP_FAILED || sqes_ == MAP_FAILED) return false;
    sq_tail_ = at(sq_, params.sq_off.tail);
    sq_mask_ = *at(sq_, params.sq_off.ring_mask);
    sq_array_ = at(sq_, params.sq_off.array);
    cq_head_ = at(cq_, params.cq_off.head);
    cq_tail_ = at(cq_, params.cq_off.tail);
    cq_mask_ = *at(cq_, params.cq_off.ring_mask);
    cqes_ = reinterpret_cast<io_uring_cqe*>(static_cast<uint8_t*>(cq_) + params.cq_off.cqes);
    return true;
  }

  void push(uint8_t opcode, int fd, const void* address, unsigned length, uint64_t offset,
            uint64_t user_data, uint32_t flags = 0) {
    const uint32_t tail = *sq_tail_;
    const uint32_t index = tail & sq_mask_;
    io_uring_sqe& sqe = static_cast<io_uring_sqe*>(sqes_)[index];
    std::memset(&sqe, 0, sizeof(sqe));
    sqe.opcode = opcode;
    sqe.fd = fd;
    sqe.addr = reinterpret_cast<uint64_t>(address);
    sqe.len = length;
    sqe.off = offset;
    sqe.user_data = user_data;
    sqe.poll32_events = flags;
    sq_array_[index] = index;
    __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
    ++to_submit_;
  }

  // Submits what was pushed; with `wait`, until at least one request has ended.
  void enter(bool wait) {
    while (to_submit_ > 0 || wait) {
      const long n = syscall(__NR_io_uring_enter, fd_, to_submit_, wait ? 1 : 0,
                             wait ? IORING_ENTER_GETEVENTS : 0, nullptr, 0);
      if (n >= 0) {
        to_submit_ -= static_cast<unsigned>(n);
        wait = false;
      } else if (errno != EINTR) {  // the kernel is short of memory
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    }
  }

  bool pop(uint64_t& user_data, int64_t& result) {
    const uint32_t head = *cq_head_;
    if (head == __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE)) return false;
    user_data = cqes_[head & cq_mask_].user_data;
    result = cqes_[head & cq_mask_].res;
    __atomic_store_n(cq_head_, head + 1, __ATOMIC_RELEASE);
    return true;
  }

 private:
  void* map(size_t bytes, off_t offset) const {
    return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, offset);
  }
  static uint32_t* at(void* ring, uint32_t offset) {
    return reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(ring) + offset);
  }

  int fd_ = -1;
  void* sq_ = MAP_FAILED;
  void* cq_ = MAP_FAILED;
  void* sqes_ = MAP_FAILED;
  size_t sq_bytes_ = 0, cq_bytes_ = 0, sqes_bytes_ = 0;
  uint32_t *sq_tail_ = nullptr, *sq_array_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
  uint32_t sq_mask_ = 0, cq_mask_ = 0;
  io_uring_cqe* cqes_ = nullptr;
  unsigned to_submit_ = 0;
};

class UringReader final : public Reader {
 public:
  UringReader(const ReaderConfig& config, BackendEvents* events) : Reader(config, events) {}
  ~UringReader() override {
    stop();
    if (event_fd_ >= 0) close(event_fd_);
  }

  bool start() {
    event_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (event_fd_ < 0 || !ring_.open(static_cast<unsigned>(config_.uring_depth) + 1)) return false;
    slots_.resize(config_.uring_depth);
    for (size_t i = 0; i < slots_.size(); ++i) free_.push_back(i);
    thread_ = std::thread([this] { work(); });
    return true;
  }

  void stop() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
      wake();
    }
    if (thread_.joinable()) thread_.join();
  }
  const char* kind() const override { return "uring"; }

 private:
  struct Slot {
    Chunk chunk;
    std::vector<iovec> iovecs;
  };
  static constexpr uint64_t kWake = ~uint64_t{0};

  int depth() const override { return config_.uring_depth; }
  void wake() override {
    const uint64_t one = 1;
    if (event_fd_ >= 0 && write(event_fd_, &one, sizeof(one)) < 0) {
      // The counter is full: then it wakes the thread anyway.
    }
  }
  void push_wake() { ring_.push(IORING_OP_POLL_ADD, event_fd_, nullptr, 0, 0, kWake, POLLIN); }
  void push(size_t slot) {
    Slot& s = slots_[slot];
    fill_iovecs(s.chunk, s.iovecs);
    ring_.push(IORING_OP_READV, s.chunk.task->file->fd, s.iovecs.data(),
               static_cast<unsigned>(s.iovecs.size()), static_cast<uint64_t>(file_offset(s.chunk)),
               slot);
  }

  void work() {
    sigset_t all;  // signals are for the program's own threads
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);
    push_wake();
    std::vector<Chunk> ended;
    for (;;) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (stopping_ && free_.size() == slots_.size())
          return;  // the kernel drops the pending wake-up
        while (!free_.empty() && next_chunk(slots_[free_.back()].chunk)) {
          push(free_.back());
          free_.pop_back();
        }
      }
      // What has ended is verified and reported while the kernel is busy with the next ones; one at
      // a time, since a record takes as long to verify as to read a quarter of the next.
      ring_.enter(ended.empty());
      if (!ended.empty()) {
        const size_t i = most_urgent(ended);
        const Chunk chunk = ended[i];
        ended.erase(ended.begin() + static_cast<std::ptrdiff_t>(i));
        finish_chunk(chunk);
      }
      uint64_t user_data;
      int64_t result;
      while (ring_.pop(user_data, result)) {
        if (user_data == kWake) {
          uint64_t wakes;
          if (read(event_fd_, &wakes, sizeof(wakes)) < 0) {
            // Taken already.
          }
          push_wake();
          continue;
        }
        if (handle_result(slots_[user_data].chunk, result)) {
          ended.push_back(slots_[user_data].chunk);
          free_.push_back(user_data);
        } else {
          push(user_data);
        }
      }
    }
  }

  Ring ring_;
  int event_fd_ = -1;
  std::vector<Slot> slots_;
  std::vector<size_t> free_;
  std::thread thread_;
};

}  // namespace

std::unique_ptr<Reader> make_uring_reader(const ReaderConfig& config, BackendEvents* events) {
  auto reader = std::make_unique<UringReader>(config, events);
  if (!reader->start()) return nullptr;
  return reader;
}

}  // namespace comoe
