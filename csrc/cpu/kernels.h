// What expert_ffn.cpp asks of an instruction set: one table of functions per set, chosen at run
// time.
#pragma once

#include <cstdint>

#include "attend.h"
#include "expert_ffn.h"

namespace comoe {

constexpr int64_t kGroupCols = kBlockCols * kGroupBlocks;  // 128
constexpr int64_t kGroupTiles = kGroupCols / kBlockRows;   // row tiles whose outputs fill one group

// How activations are handed to the tile kernels; it follows from the level (row_form below).
enum class Form : uint8_t {
  int8,   // 2, 3, 4 bits: int8, one scale per 64 columns
  int16,  // 8 bits: int16 as two int8 planes (high, low), one scale per 128 columns
  bf16,   // exact bf16 weights and bf16 activations
  fp32,   // other exact weights
};
constexpr int kForms = 4;

constexpr int kScaleBlocks = 2;                            // blocks that share a scale, int8 form
constexpr int64_t kScaleCols = kBlockCols * kScaleBlocks;  // 64
constexpr int kGroupScales = kGroupBlocks / kScaleBlocks;  // 2
// A group of a quantised row: all that belongs to it in one place, so that a kernel needs one
// pointer per row. q takes two bytes per column; how they are used is the instruction set's own
// affair. Portable and VNNI: int8 (int8 form), or for each block int8 high [32], low [32] with q =
// 256 * high + low. Others: int16.
struct Int8Group {
  float scale[kGroupScales];
  float sum;  // of scale * q
  uint32_t unused;
  uint8_t q[2 * kGroupCols];
};
struct Int16Group {
  float scale;
  int32_t sum;  // of q
  uint32_t unused[2];
  uint8_t q[2 * kGroupCols];
};

// One row of prepared activations: padded with zeros to P = whole groups, so kernels need no column
// tails.
//   int8: Int8Group [P / 128]      int16: Int16Group [P / 128]
//   bf16: uint16 [P]               fp32:  float [P]
struct RowLayout {
  Form form;
  int64_t cols, groups;
  RowLayout() : RowLayout(Form::fp32, 0) {}
  RowLayout(Form f, int64_t c) : form(f), cols(c), groups(ceil_div(c, kGroupCols)) {}
  int64_t padded() const { return groups * kGroupCols; }
  int64_t bytes() const {
    const int64_t b = form == Form::bf16   ? padded() * 2
                      : form == Form::fp32 ? padded() * 4
                                           : groups * static_cast<int64_t>(sizeof(Int8Group));
    return round_up(b, 64);
  }
};

static_assert(sizeof(Int8Group) == sizeof(Int16Group));

// Rows of activations that a kernel takes at once; each weight block is unpacked once for all of
// them.
constexpr int kMaxRows = 8;
// Where blocks [first, next segment's first) of a run lie: block k of plane p at base[p] + k * its
// bytes. A segment ends where a page of any plane ends.
struct Segment {
  int64_t first;
  const uint8_t* base[4];
};

// Bytes to prefetch, in this order, as the blocks of a run are computed.
struct Prefetch {
  const uint8_t* begin;
  const uint8_t* end;
};

// Consecutive row tiles of one matrix (blocks k = tile * col_blocks + column block), and up to
// kMaxRows rows of activations to multiply them with.
struct RunArgs {
  Level level;
  ExactType exact_dtype;
  DType value_dtype;           // of exact weights, once decoded
  const MatrixHeader* header;  // of the matrix; unused at `exact`
  const uint8_t* params;       // [num_tiles, groups, 32]; at `exact` the scales of codes
  const Segment* segments;     // they cover the run; `exact` uses plane 0
  const Prefetch* prefetch;    // the last has begin == end
  int64_t num_tiles, col_blocks;
  RowLayout layout;  // of each row
  const uint8_t* rows[kMaxRows];
  int num_rows;
  float* out[kMaxRows];  // [num_tiles * 16] each, overwritten
};

struct Kernels {
  const char* name;
  bool bf16_dot;  // whether Form::bf16 is supported; else exact bf16 runs in fp32
  // out[i][r] = sum over columns of W[r, c] * rows[i][c], for all rows r of the run.
  void (*multiply)(const RunArgs& args);
  // n elements to fp32, and fp32 to n elements (round to nearest even).
  void (*load)(const void* src, DType dtype, int64_t n, float* dst);
  void (*store)(const float* src, int64_t n, void* dst, DType dtype);
  // 128 floats into group `group` of a prepared row.
  void (*prepare_group)(const float* src, const RowLayout& layout, int64_t group, uint8_t* row);
  // out[i] = activation(gate[i]) * up[i], or activation(up[i]) if gate is null; n is a multiple
  // of 16.
  void (*activate)(const FfnSpec& spec, const float* gate, const float* up, int64_t n, float* out);
  // A run of one tile: its first `num_rows` rows and `cols` columns, row-major, row stride `ld`
  // elements.
  void (*unpack_tile)(const RunArgs& args, int64_t num_rows, int64_t cols, void* out,
                      DType out_dtype, int64_t ld);
  // out[r] = W[r, :] @ x, W [rows, cols] of dtype, contiguous; x fp32.
  void (*project)(const void* W, DType dtype, int64_t rows, int64_t cols, const float* x,
                  float* out);
  // The query heads of one KV head of one sequence.  seen: [num_seen] positions that count.
  // scratch: (2 * group + 1) * head_dim + num_seen * group floats, group = heads / kv_heads.
  void (*attend)(const AttendArgs& args, int64_t batch, int64_t kv_head, const int32_t* seen,
                 int64_t num_seen, float* scratch);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels, kVnniKernels;
#endif

const Kernels& kernels_in_use();  // see force_isa

inline int num_planes(Level level) {
  return level == Level::exact ? 1 : static_cast<int>(level) + 1;
}
inline Form row_form(Level level, ExactType exact_dtype, DType x_dtype, bool bf16_dot) {
  if (level == Level::bits8) return Form::int16;
  if (level != Level::exact) return Form::int8;
  const bool bf16 = x_dtype == DType::bf16 && value_dtype(exact_dtype, x_dtype) == DType::bf16;
  return bf16_dot && bf16 ? Form::bf16 : Form::fp32;
}

}  // namespace comoe
