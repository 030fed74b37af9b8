#include "raw_read.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

namespace comoe {

double raw_read_seconds(const std::string& path, int64_t begin, int64_t end, int64_t chunk_bytes,
                        int depth) {
  if (begin < 0 || end < begin || chunk_bytes <= 0 || depth < 1 || depth > 256 ||
      (begin | end | chunk_bytes) % 4096 != 0)
    throw std::invalid_argument(
        "raw_read: expected 0 <= begin <= end and chunk_bytes > 0, multiples of 4096, and 1 <= "
        "depth "
        "<= 256");
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  if (fd < 0) throw std::runtime_error("raw_read: " + path + ": " + std::strerror(errno));
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::vector<std::unique_ptr<void, Free>> buffers;
  for (int i = 0; i < depth; ++i) {
    buffers.emplace_back(std::aligned_alloc(4096, static_cast<size_t>(chunk_bytes)));
    if (!buffers.back()) {
      close(fd);
      throw std::bad_alloc();
    }
    std::memset(buffers.back().get(), 0, static_cast<size_t>(chunk_bytes));
  }
  std::atomic<int64_t> next{begin};
  std::atomic<int> error{0};
  std::vector<std::thread> threads;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < depth; ++i)
    threads.emplace_back([&, buffer = buffers[i].get()] {
      for (;;) {
        const int64_t at = next.fetch_add(chunk_bytes);
        if (at >= end || error != 0) return;
        const auto bytes = static_cast<size_t>(std::min(chunk_bytes, end - at));
        const ssize_t n = pread(fd, buffer, bytes, at);
        if (n != static_cast<ssize_t>(bytes)) error = n < 0 ? errno : ENODATA;
      }
    });
  for (std::thread& thread : threads) thread.join();
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  close(fd);
  if (error != 0) throw std::runtime_error("raw_read: " + path + ": " + std::strerror(error));
  return seconds;
}

}  // namespace comoe
