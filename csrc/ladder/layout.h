// Geometry of an expert's ladder: how its matrices are cut into blocks, and where each block lies
// in the payload of each record. Codec, kernels and bindings all take offsets from here; the same
// rules are written for people in docs/format.md.
//
// An expert is 2 or 3 matrices W [rows, cols], cols along the input dimension:
//   gated:   gate [I, H], up [I, H], down [H, I]        ungated: up [I, H], down [H, I]
// Each is padded to blocks of 16 rows x 32 columns; block (n, k) is number n * col_blocks + k.
// A group is 128 columns (4 blocks, fewer at the right edge) of a row: one scale and one zero.
#pragma once

#include <cstdint>

namespace comoe {

constexpr int64_t kBlockRows = 16;
constexpr int64_t kBlockCols = 32;
constexpr int64_t kGroupBlocks = 4;  // 128 columns
constexpr int kMaxMatrices = 3;
constexpr int kNumRecords = 5;

// What an expert is right now. Levels 0..3 are nested (level l needs records 0..l); `exact` needs
// record 4 alone.
enum class Level : uint8_t { bits2 = 0, bits3 = 1, bits4 = 2, bits8 = 3, exact = 4 };

enum class DType : uint8_t { fp32 = 0, bf16 = 1, fp16 = 2 };

inline int64_t dtype_bytes(DType dtype) { return dtype == DType::fp32 ? 4 : 2; }
// Element i of an array of dtype.
inline const void* element_at(const void* array, DType dtype, int64_t i) {
  return static_cast<const uint8_t*>(array) + i * dtype_bytes(dtype);
}
inline void* element_at(void* array, DType dtype, int64_t i) {
  return static_cast<uint8_t*>(array) + i * dtype_bytes(dtype);
}

// What the exact record holds: elements of a DType, or codes that a scale belongs to. A coded
// weight is fp32(code) * fp32(scale), rounded to the type of the activations.
//   fp8: e4m3, an fp32 scale per row tile and group.   mxfp4: e2m1, an e8m0 scale per row and
//   block.
enum class ExactType : uint8_t { fp32 = 0, bf16 = 1, fp16 = 2, fp8 = 3, mxfp4 = 4 };
constexpr int kNumExactTypes = 5;

inline bool is_coded(ExactType type) { return type >= ExactType::fp8; }
inline int64_t exact_bits(ExactType type) {
  constexpr int64_t kBits[kNumExactTypes] = {32, 16, 16, 8, 4};
  return kBits[static_cast<int>(type)];
}
// The type in which kernels see exact weights, given that of the activations (or of the output).
inline DType value_dtype(ExactType type, DType wanted) {
  return is_coded(type) ? wanted : static_cast<DType>(type);
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Bytes of one 16 x 32 block. All are powers of two that divide 4096, so a block never straddles a
// page as long as it starts at a multiple of its size.
constexpr int64_t kPlane2BlockBytes = 128;
constexpr int64_t kPlane1BlockBytes = 64;
constexpr int64_t kPlane4BlockBytes = 256;
constexpr int64_t kParamsBytes = 32;        // one group of 16 rows: scale_q[16], zero_q[16]
constexpr int64_t kMatrixHeaderBytes = 64;  // MatrixHeader, padded

// First bytes of record 0, one per matrix. Weight = scale * (value - zero), with
// scale = exp2(log2_min + log2_step * scale_q), value = table_b[code >> (8 - b)], or the code
// itself at 8 bits. Tables are in code units (0..255).
struct MatrixHeader {
  float log2_min;
  float log2_step;
  uint8_t table2[4];
  uint8_t table3[8];
  uint8_t table4[16];
  uint8_t reserved[28];
};
static_assert(sizeof(MatrixHeader) == kMatrixHeaderBytes, "format");

struct MatrixGeometry {
  int64_t rows = 0, cols = 0;
  int64_t row_tiles() const { return ceil_div(rows, kBlockRows); }
  int64_t col_blocks() const { return ceil_div(cols, kBlockCols); }
  int64_t groups() const { return ceil_div(col_blocks(), kGroupBlocks); }
  int64_t num_blocks() const { return row_tiles() * col_blocks(); }
};

// Shape of every expert of one layer and the byte offsets inside its records' payloads.
struct ExpertGeometry {
  int64_t hidden = 0, intermediate = 0;
  bool gated = true;
  bool biased = false;
  ExactType exact_dtype = ExactType::bf16;

  int num_matrices() const { return gated ? 3 : 2; }
  MatrixGeometry matrix(int m) const {
    return m == num_matrices() - 1 ? MatrixGeometry{hidden, intermediate}
                                   : MatrixGeometry{intermediate, hidden};
  }

  // Record 0: [headers][biases fp32][group params][2-bit plane], each part matrix by matrix.
  int64_t header_offset(int m) const { return m * kMatrixHeaderBytes; }
  int64_t bias_offset(int m) const {  // fp32 [rows]; only if biased
    int64_t at = num_matrices() * kMatrixHeaderBytes;
    for (int i = 0; i < m; ++i) at += round_up(matrix(i).rows * 4, 64);
    return at;
  }
  int64_t params_offset(int m) const {  // [row_tiles, groups, 32]
    int64_t at = biased ? bias_offset(num_matrices()) : num_matrices() * kMatrixHeaderBytes;
    for (int i = 0; i < m; ++i) at += matrix(i).row_tiles() * matrix(i).groups() * kParamsBytes;
    return at;
  }

  // Where the blocks of matrix m start in record r (r = 0..3: planes of 2, 1, 1, 4 bits; 4: exact).
  int64_t block_bytes(int record) const {
    switch (record) {
      case 0:
        return kPlane2BlockBytes;
      case 3:
        return kPlane4BlockBytes;
      case 4:
        return kBlockRows * kBlockCols * exact_bits(exact_dtype) / 8;
      default:
        return kPlane1BlockBytes;
    }
  }
  int64_t blocks_offset(int record, int m) const {
    int64_t at = 0;
    if (record == 0) at = round_up(params_offset(num_matrices()), kPlane2BlockBytes);
    if (record == 4) at = round_up(exact_scales_offset(num_matrices()), block_bytes(4));
    for (int i = 0; i < m; ++i) at += matrix(i).num_blocks() * block_bytes(record);
    return at;
  }
  // Record 4: [biases][scales][blocks], each part matrix by matrix. Biases (only if biased) are of
  // the source's dtype, fp32 beside codes, each padded to 64 bytes.
  DType exact_bias_dtype() const { return value_dtype(exact_dtype, DType::fp32); }
  int64_t exact_bias_offset(int m) const {
    int64_t at = 0;
    for (int i = 0; i < m; ++i)
      at += round_up(matrix(i).rows * dtype_bytes(exact_bias_dtype()), 64);
    return at;
  }
  // fp8: fp32 [row_tiles, groups]; mxfp4: u8 [row_tiles, col_blocks, 16]; else nothing.
  int64_t exact_scales_bytes(int m) const {  // of one row tile
    return exact_dtype == ExactType::fp8     ? matrix(m).groups() * 4
           : exact_dtype == ExactType::mxfp4 ? matrix(m).col_blocks() * kBlockRows
                                             : 0;
  }
  int64_t exact_scales_offset(int m) const {
    int64_t at = biased ? exact_bias_offset(num_matrices()) : 0;
    for (int i = 0; i < m; ++i) at += matrix(i).row_tiles() * exact_scales_bytes(i);
    return at;
  }
  int64_t record_bytes(int record) const { return blocks_offset(record, num_matrices()); }

  // Useful weights, without padding.
  int64_t num_weights() const { return num_matrices() * hidden * intermediate; }
};

// A record's payload as it lies in the pool: whole pages, in order.
struct PagedBytes {
  const uint8_t* const* pages = nullptr;  // [ceil(record_bytes / page_bytes)]
  int64_t page_bytes = 0;
  const uint8_t* at(int64_t offset) const {
    return pages[offset / page_bytes] + offset % page_bytes;
  }
};

// Inside a block, lane L = 0..63 stands for (row L / 4, column 4 * q + L % 4) of quad q = 0..7.
//   2-bit plane: 2 vectors of 64 bytes; byte L of vector v, bits 2j..2j+1: bits 7..6, quad 4v + j.
//   1-bit planes: 1 vector; byte L bit q = code bit 5 (record 1) or 4 (record 2) of quad q.
//   4-bit plane: 4 vectors; byte L of vector v: bits 3..0, low nibble quad 2v, high 2v + 1.
//   exact, 16-bit: 16 vectors of 64 bytes; vector p, element 2 * row + i = W[row, 2p + i].
//   exact, fp32: 32 vectors of 64 bytes; vector c, element row = W[row, c].
//   fp8: 16 vectors of 32 bytes, ordered as 16-bit elements are.
//   mxfp4: 4 vectors of 32 words of 16 bits; word 2 * row + i of vector v, bits 4j..4j+3:
//     code of W[row, 2 * (4v + j) + i].
// Padding rows and columns hold code 0 and value 0; kernels give them zero activations, and never
// write padding rows.

}  // namespace comoe
