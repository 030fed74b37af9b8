#include "rounding.h"

#include <algorithm>
#include <cmath>

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

}  // namespace

void round_columns(const RoundColumns& block) {
  const int64_t tiles = (block.rows + kLanes - 1) / kLanes;
  parallel_for(tiles, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t tile = begin; tile < end; ++tile) round_rows(block, tile * kLanes);
  });
}

}  // namespace comoe
