#include "raw_read.h"

#include <fcntl.h>
#include <sys/mman.h>
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
  // On huge pages, as the engine's pool: direct reads pin pages one by one.
  constexpr size_t kHuge = 2 << 20;
  const size_t buffer_bytes =
      (static_cast<size_t>(depth) * chunk_bytes + kHuge - 1) / kHuge * kHuge;
  const std::unique_ptr<void, Free> buffers(std::aligned_alloc(kHuge, buffer_bytes));
  if (!buffers) {
    close(fd);
    throw std::bad_alloc();
  }
  madvise(buffers.get(), buffer_bytes, MADV_HUGEPAGE);
  std::memset(buffers.get(), 0, buffer_bytes);
  std::atomic<int64_t> next{begin};
  std::atomic<int> error{0};
  std::vector<std::thread> threads;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < depth; ++i)
    threads.emplace_back([&, buffer = static_cast<uint8_t*>(buffers.get()) + i * chunk_bytes] {
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
