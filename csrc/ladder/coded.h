// Layout of coded records: a list of matrices whose 8-bit codes are cut into planes of 2, 1, 1 and
// 4 bits. A record holds the planes between two depths, one after the other; a record that begins a
// code set (depth 0) has headers, biases and group parameters before them. Records 0..3 of the
// ladder hold one plane each; a set of its own may be one record. In words: docs/format.md.
#pragma once

#include <cstdint>

#include "layout.h"

namespace comoe {

constexpr int kNumPlanes = 4;
constexpr int kMaxCodedMatrices = 2 * kMaxMatrices;  // the factors of a low-rank record
constexpr int kMaxRank = 4096;                       // of a matrix in one low-rank record
constexpr int64_t kPlaneBlockBytes[kNumPlanes] = {kPlane2BlockBytes, kPlane1BlockBytes,
                                                  kPlane1BlockBytes, kPlane4BlockBytes};
constexpr int kDepthBits[kNumPlanes + 1] = {0, 2, 3, 4, 8};  // bits known after n planes

// Planes that make `bits`, or -1.
inline int depth_of_bits(int bits) {
  for (int depth = 0; depth <= kNumPlanes; ++depth)
    if (kDepthBits[depth] == bits) return depth;
  return -1;
}

struct CodedLayout {
  MatrixGeometry matrices[kMaxCodedMatrices];
  int count = 0;
  bool biased = false;

  int64_t header_offset(int m) const { return m * kMatrixHeaderBytes; }
  int64_t bias_offset(int m) const {  // fp32 [rows]; only if biased
    int64_t at = count * kMatrixHeaderBytes;
    for (int i = 0; i < m; ++i) at += round_up(matrices[i].rows * 4, 64);
    return at;
  }
  int64_t params_offset(int m) const {  // [row_tiles, groups, 32]
    int64_t at = biased ? bias_offset(count) : count * kMatrixHeaderBytes;
    for (int i = 0; i < m; ++i) at += matrices[i].row_tiles() * matrices[i].groups() * kParamsBytes;
    return at;
  }
  // Where the blocks of matrix m in `plane` start, in a record that begins with plane `first`. Each
  // plane starts at a multiple of its block, so that no block straddles a page.
  int64_t plane_offset(int first, int plane, int m) const {
    int64_t at = first == 0 ? params_offset(count) : 0;
    for (int p = first; p < plane; ++p)
      at = round_up(at, kPlaneBlockBytes[p]) + blocks_before(count) * kPlaneBlockBytes[p];
    return round_up(at, kPlaneBlockBytes[plane]) + blocks_before(m) * kPlaneBlockBytes[plane];
  }
  // Payload of a record with planes first..end - 1.
  int64_t record_bytes(int first, int end) const { return plane_offset(first, end - 1, count); }

 private:
  int64_t blocks_before(int m) const {
    int64_t blocks = 0;
    for (int i = 0; i < m; ++i) blocks += matrices[i].num_blocks();
    return blocks;
  }
};

// The matrices of an expert, and what a low-rank record adds to them: for each matrix W [rows,
// cols] factors V [rank, cols], U [rows, rank] with W += U V, in the order V, U of each matrix. A
// matrix of rank 0 has empty factors.
inline CodedLayout coded_layout(const ExpertGeometry& g) {
  CodedLayout layout;
  layout.count = g.num_matrices();
  layout.biased = g.biased;
  for (int m = 0; m < layout.count; ++m) layout.matrices[m] = g.matrix(m);
  return layout;
}

inline CodedLayout low_rank_layout(const ExpertGeometry& g, const uint16_t* ranks) {
  CodedLayout layout;
  layout.count = 2 * g.num_matrices();
  for (int m = 0; m < g.num_matrices(); ++m) {
    layout.matrices[2 * m] = {ranks[m], g.matrix(m).cols};
    layout.matrices[2 * m + 1] = {g.matrix(m).rows, ranks[m]};
  }
  return layout;
}

// A mean record: fp32 [hidden], padded with zeros to a multiple of 64 bytes.
inline int64_t mean_bytes(const ExpertGeometry& g) { return round_up(g.hidden * 4, 64); }

}  // namespace comoe
