#include "stream.h"

#include <atomic>

#include "parallel.h"

namespace comoe {

uint64_t stream_read(const void* data, int64_t bytes) {
  const auto* words = static_cast<const uint64_t*>(data);
  std::atomic<uint64_t> total{0};
  // Chunks of 256 KiB: large enough for the hardware prefetcher, small enough to balance.
  parallel_for(bytes / 64, 4096, [&](int64_t begin, int64_t end, int) {
    uint64_t sum[8] = {};
    for (int64_t i = begin * 8; i < end * 8; i += 8)
      for (int j = 0; j < 8; ++j) sum[j] += words[i + j];
    uint64_t all = 0;
    for (uint64_t s : sum) all += s;
    total.fetch_add(all, std::memory_order_relaxed);
  });
  return total;
}

}  // namespace comoe
