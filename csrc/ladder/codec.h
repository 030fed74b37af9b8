// Encodes one expert into the payloads of its records. What the bytes mean: layout.h; how well it
// approximates, and why this coding: docs/codec.md.
#pragma once

#include <cstdint>

#include "coded.h"
#include "layout.h"

namespace comoe {

// All row-major and contiguous.
struct ExpertSource {
  // [rows, cols] elements or fp8 codes of geometry.exact_dtype. mxfp4: [rows, cols / 2] bytes, the
  // even column in bits 3..0; cols must be even.
  const void* matrices[kMaxMatrices] = {};
  const void* biases[kMaxMatrices] = {};  // [rows] of exact_bias_dtype(); only if geometry.biased
  // Only of codes. fp8: fp32 [row_tiles, groups]; mxfp4: u8 [rows, col_blocks].
  const void* scales[kMaxMatrices] = {};
};

// payloads[r]: geometry.record_bytes(r) bytes, all of which are written. Work is shared by row
// tiles over `Parallel`; the bytes do not depend on the number of threads. Throws
// std::invalid_argument, naming matrix, row and column, if a weight is NaN or infinite.
void encode_expert(const ExpertGeometry& geometry, const ExpertSource& source,
                   uint8_t* const payloads[kNumRecords]);

// One record that begins a code set: planes 0..num_planes - 1 of matrices that need not be those of
// an expert (factors of a low-rank record, say). sources, biases: fp32, as in layout.matrices.
// payload: layout.record_bytes(0, num_planes) bytes, all of which are written.
void encode_coded(const CodedLayout& layout, const float* const* sources,
                  const float* const* biases, int num_planes, uint8_t* payload);

// As encode_coded, of one matrix without bias whose elements are of `dtype`: no copy in fp32 is
// made.
void encode_coded_matrix(const MatrixGeometry& shape, const void* source, DType dtype,
                         int num_planes, uint8_t* payload);

}  // namespace comoe
