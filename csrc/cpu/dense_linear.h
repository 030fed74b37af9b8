// y = x W^T (+ bias) with W as it is in the model: a few rows of x, at memory bandwidth.
#pragma once

#include <cstdint>

#include "../ladder/layout.h"

namespace comoe {

// out[t, :] = W x[t, :] + bias, in fp32.  W: [rows, cols] of weight_dtype, contiguous.  x: [T,
// cols] of dtype, row stride x_stride elements.  bias: [rows] of weight_dtype, or null.  out: [T,
// rows] of dtype, contiguous. W is read once per row of x.
void dense_linear(const void* W, DType weight_dtype, int64_t rows, int64_t cols, const void* x,
                  DType dtype, int64_t T, int64_t x_stride, const void* bias, void* out);

}  // namespace comoe
