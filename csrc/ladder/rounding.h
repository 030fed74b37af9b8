// The inner loop of rounding under second moments (comoe/aggregate/rounding.py): the codes of a
// block of columns, one column after the other, each one's error passed on to the rest of the block
// at once.
#pragma once

#include <cstdint>

namespace comoe {

constexpr int64_t kMaxRoundColumns = 128;
constexpr int kMaxTable = 16;

// Row-major arrays. For each row, j = 0..cols-1 in order:
//   target = values[j]                                    without `present`
//          = present[j] + values[j] * inverse[j]          with it
//   unit   = target / scale + zero                        of the group of column j
//   code   = index of the table entry nearest to unit     without `lower`
//          = unit rounded and kept in lower[j]..lower[j] + width - 1
//   error  = (target - decoded) * inverse[j], or decoded - present[j]
//   values[k] -= error * factor[j, k] for k > j
struct RoundColumns {
  int64_t rows = 0, cols = 0, groups = 0;
  const float* values = nullptr;      // [rows, cols]
  const float* present = nullptr;     // [rows, cols] or null
  const float* factor = nullptr;      // [cols, cols], read above the diagonal
  const float* inverse = nullptr;     // [cols]
  const float* scale = nullptr;       // [rows, groups]
  const float* zero = nullptr;        // [rows, groups]
  const int32_t* group_of = nullptr;  // [cols]
  const float* table = nullptr;       // [entries], in order
  int entries = 0;
  const uint8_t* lower = nullptr;  // [rows, cols] or null
  int width = 0;
  uint8_t* codes = nullptr;  // [rows, cols] out
  float* errors = nullptr;   // [rows, cols] out
};

void round_columns(const RoundColumns& block);

}  // namespace comoe
