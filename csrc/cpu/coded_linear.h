// y = x W^T (+ bias) with W in one coded record (ladder/coded.h): a model's dense layers on the
// CPU.
#pragma once

#include <cstdint>

#include "../ladder/coded.h"

namespace comoe {

// A record that begins a code set and holds one matrix [rows, cols] and no bias; see encode_coded.
struct CodedMatrix {
  Level level;  // not exact
  MatrixGeometry shape;
  const uint8_t* record;  // coded_matrix_bytes bytes, aligned to 64
};

int64_t coded_matrix_bytes(const MatrixGeometry& shape, Level level);

// out[t, :] = W x[t, :] + bias.  x: [T, cols] of dtype, row stride x_stride elements.
// bias: [rows] of bias_dtype, or null.  out: [T, rows] of dtype, contiguous. Each weight is
// unpacked once for every 8 rows of x. The result of a row depends on no other row and not on the
// number of threads.
void coded_linear(const CodedMatrix& W, const void* x, DType dtype, int64_t T, int64_t x_stride,
                  const void* bias, DType bias_dtype, void* out);

// Rows first..first + count - 1 of W as `dtype`, contiguous [count, cols].
void coded_rows(const CodedMatrix& W, int64_t first, int64_t count, void* out, DType dtype);

// out[i, :] = W[ids[i], :] as `dtype`, [n, cols]. Throws std::out_of_range.
void coded_gather(const CodedMatrix& W, const int64_t* ids, int64_t n, void* out, DType dtype);

}  // namespace comoe
