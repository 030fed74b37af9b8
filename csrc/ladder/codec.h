// Encodes one expert into the payloads of its records. What the bytes mean: layout.h; how well it
// approximates, and why this coding: docs/codec.md.
#pragma once

#include <cstdint>

#include "coded.h"
#include "layout.h"

namespace comoe {

struct ExpertSource {
  const void* matrices[kMaxMatrices] = {};  // row-major, contiguous, of geometry.exact_dtype
  const void* biases[kMaxMatrices] = {};  // [rows] of the same dtype; read only if geometry.biased
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

}  // namespace comoe
