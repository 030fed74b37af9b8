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

// One matrix of a call: out [T, rows] of x's dtype, contiguous; bias [rows] of bias_dtype, or null.
struct CodedTarget {
  CodedMatrix W;
  const void* bias;
  DType bias_dtype;
  void* out;
};

// target.out[t, :] = target.W x[t, :] + target.bias for each of `count` targets, whose matrices
// have the same number of columns and the same level.  x: [T, cols] of dtype, row stride x_stride
// elements. Each weight is unpacked once for every 8 rows of x. The result of a row depends on no
// other row or matrix and not on the number of threads.
void coded_linear(const CodedTarget* targets, int count, const void* x, DType dtype, int64_t T,
                  int64_t x_stride);

// Rows first..first + count - 1 of W as `dtype`, contiguous [count, cols].
void coded_rows(const CodedMatrix& W, int64_t first, int64_t count, void* out, DType dtype);

// out[i, :] = W[ids[i], :] as `dtype`, [n, cols]. Throws std::out_of_range.
void coded_gather(const CodedMatrix& W, const int64_t* ids, int64_t n, void* out, DType dtype);

}  // namespace comoe
