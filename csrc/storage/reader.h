// Reads records from files into pages, several requests in flight, past the page cache where the
// file system allows it. Two ways to keep requests in flight, the same rules: threads and io_uring
// (thread_reader.cpp, uring_reader.cpp; bench/bench_disk.py says which is faster).
//
// A record's extent is read in chunks of at most 1 MiB. Chunks of demanded records go before all
// others; within a class records go in the order of asking. The checksum is verified when the last
// chunk is in.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../engine/backend.h"

namespace comoe {

struct ReaderConfig {
  int64_t page_bytes = 0;
  int64_t chunk_bytes = int64_t{1} << 20;
  int num_threads = 4;   // threads: each has one request in flight
  int uring_depth = 16;  // io_uring: requests in flight, which cost it nothing
  bool direct = true;
  bool verify = true;
  std::string kind = "auto";  // "threads", or io_uring where it works ("uring" and "auto")
  // The system call of the thread reader; tests put errors and short reads here.
  ssize_t (*preadv)(int, const iovec*, int, off_t) = ::preadv;
};

// One open file. `direct` is false where O_DIRECT was refused; then reads go through the page
// cache, which is dropped again at once.
struct DataFile {
  std::string path;
  int fd = -1;
  int64_t bytes = 0;
  std::atomic<bool> direct{false};
};

// A record being read, and a piece of it.
struct ReadTask {
  ReadJob job;
  DataFile* file = nullptr;
  int64_t extent_bytes = 0;  // padded
  int64_t next = 0;          // first byte that no chunk covers yet
  int chunks_running = 0;
  int reads = 1;      // of the whole record; more after a wrong checksum
  std::string error;  // of its first chunk that could not be read
};
struct Chunk {
  ReadTask* task = nullptr;
  bool demand = false;           // when it was issued
  int64_t begin = 0, bytes = 0;  // within the extent
  int64_t done = 0;              // after short reads
  int attempts = 0;
};

class Reader {
 public:
  Reader(const ReaderConfig& config, BackendEvents* events) : config_(config), events_(events) {}
  virtual ~Reader();

  int32_t add_file(const std::string& path);  // throws with path, reason and what to do
  int64_t file_bytes(int32_t file) const;     // throws std::out_of_range
  void submit(const ReadJob& job);
  void promote(int32_t record);
  bool cancel(int32_t record);  // true if nothing of it has been read yet: then it is forgotten
  virtual void stop() = 0;
  virtual const char* kind() const = 0;
  BackendStats stats() const;

 protected:
  virtual void wake() = 0;  // there is something to do; called with the lock held

  virtual int depth() const = 0;  // most requests in flight
  bool next_chunk(Chunk& chunk);  // with the lock held

  // Without it, once per system call for a chunk:
  void fill_iovecs(const Chunk& chunk, std::vector<iovec>& iovecs) const;
  static int64_t file_offset(const Chunk& chunk) {
    return chunk.task->job.info.offset + chunk.begin + chunk.done;
  }
  // `result`: bytes, or -errno. True when the chunk has ended, well or not; else it has to be
  // issued again (a short back-off has passed already).
  bool handle_result(Chunk& chunk, int64_t result);
  // Of chunks that have ended, the one to finish first.
  size_t most_urgent(const std::vector<Chunk>& ended) const;
  // When it has ended. Verifies and reports the record if this was its last chunk.
  void finish_chunk(const Chunk& chunk);

  const ReaderConfig config_;
  BackendEvents* const events_;
  mutable std::mutex mutex_;
  bool stopping_ = false;
  BackendStats stats_;

 private:
  static std::string describe(const ReadTask& task, int64_t at, const std::string& reason);
  bool checksum_is_right(const ReadTask& task) const;
  void request_ended(const Chunk& chunk);  // with the lock held

  std::vector<std::unique_ptr<DataFile>> files_;
  std::map<int32_t, std::unique_ptr<ReadTask>> tasks_;  // by record
  int running_ = 0, others_running_ = 0;                // chunks that have not ended
  std::chrono::steady_clock::time_point busy_since_;    // where running_ > 0
  std::deque<ReadTask*> demand_, others_;               // with bytes that no chunk covers yet
};

std::unique_ptr<Reader> make_reader(const ReaderConfig& config, BackendEvents* events);
std::unique_ptr<Reader> make_thread_reader(const ReaderConfig& config, BackendEvents* events);
std::unique_ptr<Reader> make_uring_reader(const ReaderConfig& config,
                                          BackendEvents* events);  // null: refused here

}  // namespace comoe
