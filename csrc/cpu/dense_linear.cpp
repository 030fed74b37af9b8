#include "dense_linear.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace comoe {

// Weights of a work item: 64 KiB of 16-bit ones. Fewer than two items are not shared out.
constexpr int64_t kItemWeights = 32768;

void dense_linear(const void* W, DType weight_dtype, int64_t rows, int64_t cols, const void* x,
                  DType dtype, int64_t T, int64_t x_stride, const void* bias, void* out) {
  const Kernels& kernels = kernels_in_use();
  std::vector<float> wide(T * cols);
  for (int64_t t = 0; t < T; ++t)
    kernels.load(element_at(x, dtype, t * x_stride), dtype, cols, wide.data() + t * cols);
  const int64_t grain = std::max<int64_t>(kItemWeights / std::max<int64_t>(cols, 1), 1);
  parallel_for(rows, grain, [&](int64_t begin, int64_t end, int) {
    std::vector<float> sums(2 * (end - begin));
    float* added = sums.data() + (end - begin);
    const int64_t n = end - begin;
    if (bias) kernels.load(element_at(bias, weight_dtype, begin), weight_dtype, n, added);
    for (int64_t t = 0; t < T; ++t) {
      kernels.project(element_at(W, weight_dtype, begin * cols), weight_dtype, n, cols,
                      wide.data() + t * cols, sums.data());
      if (bias)
        for (int64_t r = 0; r < n; ++r) sums[r] += added[r];
      kernels.store(sums.data(), n, element_at(out, dtype, t * rows + begin), dtype);
    }
  });
}

}  // namespace comoe
