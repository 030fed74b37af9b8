#include "rounding.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "../cpu/parallel.h"

namespace comoe {
namespace {

constexpr int kLanes = 16;  // rows side by side, so that the compiler may use vectors

void round_rows(const RoundColumns& b, int64_t first) {
  const int rows = static_cast<int>(std::min<int64_t>(kLanes, b.rows - first));
  alignas(64) float values[kMaxRoundColumns][kLanes] = {};
  for (int r = 0; r < rows; ++r)
    for (int64_t j = 0; j < b.cols; ++j) values[j][r] = b.values[(first + r) * b.cols + j];
  float bounds[kMaxTable];
  for (int i = 0; i + 1 < b.entries; ++i) bounds[i] = (b.table[i] + b.table[i + 1]) / 2;

  for (int64_t j = 0; j < b.cols; ++j) {
    alignas(64) float target[kLanes], error[kLanes] = {}, unit[kLanes];
    alignas(64) float scale[kLanes], zero[kLanes], present[kLanes] = {};
    alignas(64) int32_t code[kLanes] = {};
    const float inverse = b.inverse[j];
    for (int r = 0; r < rows; ++r) {
      const int64_t at = (first + r) * b.groups + b.group_of[j];
      scale[r] = b.scale[at];
      zero[r] = b.zero[at];
      if (b.present) present[r] = b.present[(first + r) * b.cols + j];
    }
    for (int r = rows; r < kLanes; ++r) scale[r] = 1, zero[r] = 0;
    for (int r = 0; r < kLanes; ++r) {
      target[r] = b.present ? present[r] + values[j][r] * inverse : values[j][r];
      unit[r] = target[r] / scale[r] + zero[r];
    }
    if (b.lower) {
      for (int r = 0; r < rows; ++r) {
        const float low = b.lower[(first + r) * b.cols + j];
        code[r] = static_cast<int32_t>(std::min(std::max(std::nearbyint(unit[r]), low),
                                                low + static_cast<float>(b.width - 1)));
      }
    } else {
      for (int i = 0; i + 1 < b.entries; ++i)
        for (int r = 0; r < kLanes; ++r) code[r] += unit[r] > bounds[i];
    }
    for (int r = 0; r < rows; ++r) {
      const int64_t at = (first + r) * b.cols + j;
      const float value = b.lower ? static_cast<float>(code[r]) : b.table[code[r]];
      const float decoded = scale[r] * (value - zero[r]);
      error[r] = b.present ? decoded - present[r] : (target[r] - decoded) * inverse;
      b.codes[at] = static_cast<uint8_t>(code[r]);
      b.errors[at] = error[r];
    }
    const float* factor = b.factor + j * b.cols;
    for (int64_t k = j + 1; k < b.cols; ++k) {
      const float f = factor[k];
      for (int r = 0; r < kLanes; ++r) values[k][r] -= error[r] * f;
    }
  }
}

constexpr int64_t kTileRows = 16;  // of one sum in bin_sums

// f(row, group, first column, columns) over all rows and groups of [begin, end).
template <class F>
void for_groups(const GroupedCodes& c, int64_t begin, int64_t end, F&& f) {
  for (int64_t row = begin; row < end; ++row)
    for (int64_t g = 0; g < c.groups(); ++g)
      f(row, g, g * c.group_cols, std::min(c.group_cols, c.cols - g * c.group_cols));
}

void middles(const GroupedCodes& c, float* bounds) {
  for (int i = 0; i + 1 < c.entries; ++i) bounds[i] = (c.table[i] + c.table[i + 1]) / 2;
}

void sums_of_rows(const GroupedCodes& c, const float* diagonal, float unit, const float* bounds,
                  int64_t begin, int64_t end, double* count, double* total) {
  for_groups(c, begin, end, [&](int64_t row, int64_t g, int64_t first, int64_t cols) {
    const float scale = c.scale[row * c.groups() + g], zero = c.zero[row * c.groups() + g];
    const float square = (scale * unit) * (scale * unit);
    const float* w = c.weights + row * c.cols + first;
    for (int64_t j = 0; j < cols; j += kLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, cols - j));
      float place[kLanes] = {};
      int32_t code[kLanes] = {};
      for (int i = 0; i < lanes; ++i)
        place[i] = std::min(std::max(w[j + i] / scale + zero, 0.0f), 255.0f);
      for (int b = 0; b + 1 < c.entries; ++b)
        for (int i = 0; i < kLanes; ++i) code[i] += place[i] > bounds[b];
      for (int i = 0; i < lanes; ++i) {
        const float weight = square * diagonal[first + j + i];
        count[code[i]] += weight;
        total[code[i]] += static_cast<double>(weight) * place[i];
      }
    }
  });
}

}  // namespace

void group_errors(const GroupedCodes& c, const float* diagonal, float* errors) {
  float bounds[kMaxTable];
  middles(c, bounds);
  parallel_for(c.rows, 16, [&](int64_t begin, int64_t end, int) {
    for_groups(c, begin, end, [&](int64_t row, int64_t g, int64_t first, int64_t cols) {
      const int64_t at = row * c.groups() + g;
      const float scale = c.scale[at], zero = c.zero[at];
      const float* w = c.weights + row * c.cols + first;
      float sums[kLanes] = {};
      for (int64_t j = 0; j < cols; j += kLanes) {
        const int lanes = static_cast<int>(std::min<int64_t>(kLanes, cols - j));
        float weight[kLanes] = {}, factor[kLanes] = {}, place[kLanes], value[kLanes];
        for (int i = 0; i < lanes; ++i) weight[i] = w[j + i], factor[i] = diagonal[first + j + i];
        for (int i = 0; i < kLanes; ++i) place[i] = weight[i] / scale + zero, value[i] = c.table[0];
        // Bounds rise, so the last one that is passed decides.
        for (int b = 0; b + 1 < c.entries; ++b)
          for (int i = 0; i < kLanes; ++i)
            value[i] = place[i] > bounds[b] ? c.table[b + 1] : value[i];
        for (int i = 0; i < kLanes; ++i) {
          const float error = weight[i] - scale * (value[i] - zero);
          sums[i] += error * error * factor[i];
        }
      }
      float sum = 0;
      for (float part : sums) sum += part;
      errors[at] = sum;
    });
  });
}

void bin_sums(const GroupedCodes& c, const float* diagonal, float unit, double* count,
              double* total) {
  float bounds[kMaxTable];
  middles(c, bounds);
  const int64_t tiles = (c.rows + kTileRows - 1) / kTileRows;
  std::vector<std::array<double, 2 * kMaxTable>> parts(tiles);
  parallel_for(tiles, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t tile = begin; tile < end; ++tile) {
      double* part = parts[tile].data();
      std::fill(part, part + 2 * kMaxTable, 0.0);
      sums_of_rows(c, diagonal, unit, bounds, tile * kTileRows,
                   std::min(c.rows, (tile + 1) * kTileRows), part, part + kMaxTable);
    }
  });
  std::fill(count, count + c.entries, 0.0);
  std::fill(total, total + c.entries, 0.0);
  for (const auto& part : parts)
    for (int i = 0; i < c.entries; ++i) count[i] += part[i], total[i] += part[kMaxTable + i];
}

void decode_codes(const GroupedCodes& c, const uint8_t* code, float* out) {
  parallel_for(c.rows, 16, [&](int64_t begin, int64_t end, int) {
    for_groups(c, begin, end, [&](int64_t row, int64_t g, int64_t first, int64_t cols) {
      const float scale = c.scale[row * c.groups() + g], zero = c.zero[row * c.groups() + g];
      float values[kMaxTable] = {};
      for (int i = 0; i < c.entries; ++i) values[i] = scale * (c.table[i] - zero);
      const int64_t at = row * c.cols + first;
      for (int64_t j = 0; j < cols; ++j) out[at + j] = values[code[at + j] % kMaxTable];
    });
  });
}

void round_columns(const RoundColumns& block) {
  const int64_t tiles = (block.rows + kLanes - 1) / kLanes;
  parallel_for(tiles, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t tile = begin; tile < end; ++tile) round_rows(block, tile * kLanes);
  });
}

}  // namespace comoe
