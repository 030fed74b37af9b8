#include "cpu_backend.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <unordered_set>

#include "../storage/reader.h"
#include "../storage/remote_reader.h"
#include "engine.h"

namespace comoe {
namespace {

// Address space reserved once; slabs are mapped into it and taken out again, so that memory really
// goes back to the system. A mapped slab costs nothing until it is read into. It stands between the
// reader of files and the engine to send reads of bad local copies to the remote reader.
class CpuBackend final : public Backend, private BackendEvents {
 public:
  CpuBackend(const EngineConfig& config, const SlabHooks& hooks)
      : config_(config),
        hooks_(hooks),
        pages_per_slab_(static_cast<int>(config.slab_bytes / config.page_bytes)) {
    const int64_t physical = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE);
    stride_ = config.slab_bytes < kHuge ? config.slab_bytes
                                        : (config.slab_bytes + kHuge - 1) / kHuge * kHuge;
    // A budget beyond physical memory can never be used, but one given now is believed.
    const int64_t wanted = std::max(physical, config.budget_bytes);
    max_slabs_ = static_cast<int>(std::min<int64_t>(wanted / config.slab_bytes + 1,
                                                    ((int64_t{1} << 31) - 1) / pages_per_slab_));
    reserved_bytes_ = static_cast<size_t>(max_slabs_) * stride_ + kHuge;
    void* base = mmap(nullptr, reserved_bytes_, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED)
      throw std::runtime_error("Engine: reserving " + std::to_string(reserved_bytes_) +
                               " bytes of address space: " + std::strerror(errno) +
                               "; raise the limit of virtual memory (ulimit -v)");
    reserved_ = static_cast<uint8_t*>(base);
    base_ =
        reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(base) + kHuge - 1) / kHuge * kHuge);
  }
  ~CpuBackend() override {
    stop();
    if (hooks_.unmapping)
      for (int slab : mapped_) hooks_.unmapping(slab_address(slab), config_.slab_bytes);
    munmap(reserved_, reserved_bytes_);
  }

  void start(BackendEvents* events) override {
    ReaderConfig reader;
    reader.page_bytes = config_.page_bytes;
    reader.num_threads = config_.io_threads;
    reader.uring_depth = config_.uring_depth;
    reader.direct = config_.direct_io;
    reader.verify = config_.verify;
    reader.kind = config_.io;
    events_ = events;
    remote_ = std::make_unique<RemoteReader>(config_.page_bytes, events);
    reader_ = make_reader(reader, this);
  }
  int32_t add_file(const std::string& path) override { return reader_->add_file(path); }
  int32_t add_remote_file(const std::string& path) override {
    const int32_t file = reader_->add_file(path);
    std::lock_guard<std::mutex> lock(routes_mutex_);
    remote_files_.insert(file);
    return file;
  }
  RemoteReader* remote() override { return remote_.get(); }
  void set_local(int32_t record, bool local) override {
    std::lock_guard<std::mutex> lock(routes_mutex_);
    if (local)
      local_.insert(record);
    else
      local_.erase(record);
  }
  int64_t file_bytes(int32_t file) const override { return reader_->file_bytes(file); }
  BackendStats stats() const override {
    BackendStats stats = reader_->stats();
    const RemoteStats remote = remote_->stats();
    stats.remote_bytes = remote.bytes;
    stats.remote_records = remote.records;
    stats.remote_refused = remote.refused;
    std::lock_guard<std::mutex> lock(routes_mutex_);
    stats.cache_failures = cache_failures_;
    return stats;
  }

  int max_slabs() const override { return max_slabs_; }
  bool map_slab(int slab) override {
    if (mmap(slab_address(slab), config_.slab_bytes, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
      return false;
    // Only a wish: where the system has none, small pages serve as well.
    if (config_.slab_bytes >= kHuge) madvise(slab_address(slab), config_.slab_bytes, MADV_HUGEPAGE);
    if (!hooks_.mapped || hooks_.mapped(slab_address(slab), config_.slab_bytes)) {
      mapped_.insert(slab);
      return true;
    }
    drop_slab(slab);
    return false;
  }
  void unmap_slab(int slab) override {
    mapped_.erase(slab);
    if (hooks_.unmapping) hooks_.unmapping(slab_address(slab), config_.slab_bytes);
    drop_slab(slab);
  }
  uint8_t* page_address(int32_t page) override {
    return slab_address(page / pages_per_slab_) + page % pages_per_slab_ * config_.page_bytes;
  }
  void copy_page(int32_t from, int32_t to) override {
    std::memcpy(page_address(to), page_address(from), config_.page_bytes);
  }

  void start_read(const ReadJob& job) override {
    std::lock_guard<std::mutex> lock(routes_mutex_);
    if (remote_files_.count(job.info.file) == 0) {
      reader_->submit(job);
    } else if (local_.count(job.record) > 0) {
      cached_.emplace(job.record, job);
      reader_->submit(job);
    } else {
      remote_->submit(job);
    }
  }
  void promote_read(int32_t record) override {
    std::lock_guard<std::mutex> lock(routes_mutex_);
    const auto cached = cached_.find(record);
    if (cached != cached_.end()) cached->second.demand = true;
    reader_->promote(record);
    remote_->promote(record);
  }
  bool cancel_read(int32_t record) override {
    std::lock_guard<std::mutex> lock(routes_mutex_);
    if (!reader_->cancel(record)) return remote_->cancel(record);
    cached_.erase(record);
    return true;
  }

  // Every use on the CPU holds a pin, so there is no table to keep and no step to wait for.
  void publish(int32_t, const std::vector<uint8_t*>*) override {}
  uint64_t launched() const override { return 0; }
  uint64_t completed() const override { return 0; }

  void stop() override {
    if (reader_) reader_->stop();
    if (remote_) remote_->stop();
  }

 private:
  static constexpr int64_t kHuge = 2 << 20;

  // Of the reader of files, called with no lock held.
  void read_done(int32_t record, ReadStatus status, const std::string& error) override {
    {
      std::lock_guard<std::mutex> lock(routes_mutex_);
      const auto cached = cached_.find(record);
      if (cached != cached_.end()) {
        const ReadJob job = cached->second;
        cached_.erase(cached);
        if (status != ReadStatus::ok) {
          local_.erase(record);
          ++cache_failures_;
          remote_->submit(job);
          return;
        }
      }
    }
    events_->read_done(record, status, error);
  }
  void step_passed() override { events_->step_passed(); }

  void drop_slab(int slab) {
    // Mapping over it drops the pages and keeps the addresses reserved.
    if (mmap(slab_address(slab), config_.slab_bytes, PROT_NONE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
      madvise(slab_address(slab), config_.slab_bytes,
              MADV_DONTNEED);  // out of mappings: drop the pages
  }
  uint8_t* slab_address(int slab) { return base_ + int64_t{slab} * stride_; }

  const EngineConfig config_;
  const SlabHooks hooks_;
  const int pages_per_slab_;
  int64_t stride_;  // from one slab's address to the next one's
  int max_slabs_;
  size_t reserved_bytes_;
  uint8_t* reserved_;
  uint8_t* base_;         // aligned to huge pages
  std::set<int> mapped_;  // slabs, under the engine's lock

  // Taken after the engine's lock and before the readers'.
  mutable std::mutex routes_mutex_;
  BackendEvents* events_ = nullptr;
  std::unordered_set<int32_t> remote_files_;
  std::unordered_set<int32_t> local_;  // records of remote files whose bytes are in the local copy
  std::map<int32_t, ReadJob> cached_;  // ... that are being read from it
  int64_t cache_failures_ = 0;
  std::unique_ptr<RemoteReader> remote_;
  std::unique_ptr<Reader> reader_;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(const EngineConfig& config, const SlabHooks& hooks) {
  return std::make_unique<CpuBackend>(config, hooks);
}

}  // namespace comoe
