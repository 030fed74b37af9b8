// A device made of this process's memory and one thread that is its copy stream: done in order,
// later than asked for. The test stops the stream, loses the device, or refuses memory.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <thread>

#include "../device/device_api.h"

namespace comoe {

class FakeDevice final : public DeviceApi {
 public:
  explicit FakeDevice(int64_t total = int64_t{64} << 20, bool unified = false)
      : total_(total), unified_(unified), stream_([this] { run(); }) {}
  ~FakeDevice() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    stream_.join();
    for (const auto& [at, bytes] : small_) munmap(reinterpret_cast<void*>(at), bytes);
  }

  // Controls of the test.
  std::atomic<int64_t> most_pinned{int64_t{1} << 40};
  std::atomic<bool> stopped{false};  // the stream stands still
  std::atomic<bool> lost{false};     // every call fails from now on
  std::atomic<int> jitter_us{0};     // most delay of one operation
  int64_t mapped_bytes() const { return mapped_; }
  int64_t pinned_bytes() const { return pinned_; }

  std::string name() const override { return "fake device"; }
  int64_t total_bytes() const override { return total_; }
  int64_t free_bytes() const override { return total_ - mapped_; }
  bool unified() const override { return unified_; }
  int64_t granularity() const override { return 4096; }

  uint64_t reserve(int64_t bytes) override {
    void* const at =
        mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return reinterpret_cast<uint64_t>(at);
  }
  void release(uint64_t address, int64_t bytes) override {
    munmap(reinterpret_cast<void*>(address), bytes);
  }
  bool map(uint64_t address, int64_t bytes) override {
    check();
    if (mapped_ + bytes > total_) return false;
    mapped_ += bytes;
    mprotect(reinterpret_cast<void*>(address), bytes, PROT_READ | PROT_WRITE);
    return true;
  }
  void unmap(uint64_t address, int64_t bytes) override {
    mapped_ -= bytes;
    mprotect(reinterpret_cast<void*>(address), bytes, PROT_NONE);  // touching it ends the test
  }
  bool pin(void*, int64_t bytes) override {
    if (pinned_ + bytes > most_pinned) return false;
    pinned_ += bytes;
    return true;
  }
  void unpin(void*, int64_t bytes) override { pinned_ -= bytes; }
  uint64_t allocate(int64_t bytes) override {
    void* const at =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    std::lock_guard<std::mutex> lock(mutex_);
    small_[reinterpret_cast<uint64_t>(at)] = bytes;
    return reinterpret_cast<uint64_t>(at);
  }
  void free(uint64_t address) override {
    std::lock_guard<std::mutex> lock(mutex_);
    munmap(reinterpret_cast<void*>(address), small_.at(address));
    small_.erase(address);
  }
  void* allocate_mapped(int64_t bytes) override { return reinterpret_cast<void*>(allocate(bytes)); }
  void free_mapped(void* host) override { free(reinterpret_cast<uint64_t>(host)); }

  void copy(const DeviceCopy* copies, int count) override {
    for (int i = 0; i < count; ++i) {
      const DeviceCopy c = copies[i];
      push([c] {
        // Words, such as rows of the page table, are moved whole; a reader sees one or the other.
        if (c.bytes <= 4096 && c.bytes % 8 == 0) {
          for (int64_t w = 0; w < c.bytes / 8; ++w)
            __atomic_store_n(
                reinterpret_cast<uint64_t*>(c.to) + w,
                __atomic_load_n(reinterpret_cast<const uint64_t*>(c.from) + w, __ATOMIC_SEQ_CST),
                __ATOMIC_RELEASE);
        } else {
          std::memcpy(reinterpret_cast<void*>(c.to), reinterpret_cast<const void*>(c.from),
                      c.bytes);
        }
      });
    }
  }
  void write_word(uint64_t address, uint32_t value) override {
    push([=] { __atomic_store_n(reinterpret_cast<uint32_t*>(address), value, __ATOMIC_SEQ_CST); });
  }
  void write_count(uint64_t address, uint64_t value) override {
    push([=] { __atomic_store_n(reinterpret_cast<uint64_t*>(address), value, __ATOMIC_RELEASE); });
  }
  uint64_t mark() override {
    check();
    std::lock_guard<std::mutex> lock(mutex_);
    return pushed_;
  }
  uint64_t reached() override {
    check();
    return done_.load(std::memory_order_acquire);
  }

 private:
  void check() const {
    if (lost) throw DeviceError("fake device: lost; restart the process");
  }
  void push(std::function<void()> operation) {
    check();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      queue_.push_back(std::move(operation));
      ++pushed_;
    }
    changed_.notify_all();
  }
  void run() {
    std::mt19937 random(7);
    for (;;) {
      std::function<void()> operation;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
        if (queue_.empty() || (stopping_ && (stopped || lost))) return;
        operation = std::move(queue_.front());
        queue_.pop_front();
      }
      while (stopped && !stopping_) std::this_thread::sleep_for(std::chrono::microseconds(50));
      if (jitter_us > 0)
        std::this_thread::sleep_for(
            std::chrono::microseconds(random() % static_cast<unsigned>(jitter_us)));
      if (stopped || lost) continue;  // nobody looks any more
      operation();
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  const int64_t total_;
  const bool unified_;
  std::atomic<int64_t> mapped_{0}, pinned_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  std::map<uint64_t, int64_t> small_;
  uint64_t pushed_ = 0;
  std::atomic<uint64_t> done_{0};
  std::atomic<bool> stopping_{false};
  std::thread stream_;
};

}  // namespace comoe
