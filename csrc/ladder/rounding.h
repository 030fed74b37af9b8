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

// A matrix whose groups of `group_cols` columns have a scale and a zero per row each, and one
// table. Code of a weight: the index of the table entry nearest to weight / scale + zero.
struct GroupedCodes {
  int64_t rows = 0, cols = 0, group_cols = 0;
  const float* weights = nullptr;  // [rows, cols]
  const float* scale = nullptr;    // [rows, groups]
  const float* zero = nullptr;     // [rows, groups]
  const float* table = nullptr;    // [entries], in order
  int entries = 0;
  int64_t groups() const { return (cols + group_cols - 1) / group_cols; }
};

// errors [rows, groups]: sum over a group's columns of diagonal[column] * (weight - decoded)^2.
void group_errors(const GroupedCodes& codes, const float* diagonal, float* errors);

// Over all weights with a code, by code [entries]: the sum of diagonal[column] * (scale * unit)^2,
// and of that times the weight's place on the table's scale, weight / scale + zero within [0, 255].
// The same whatever the number of threads.
void bin_sums(const GroupedCodes& codes, const float* diagonal, float unit, double* count,
              double* total);

// out [rows, cols]: scale * (table[code] - zero), of codes [rows, cols] below `entries`; `weights`
// is not read.
void decode_codes(const GroupedCodes& codes, const uint8_t* code, float* out);

}  // namespace comoe
