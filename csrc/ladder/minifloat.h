// Floating point of 8 and 4 bits, as checkpoints hold it.
#pragma once

#include <cstdint>
#include <cstring>

namespace comoe {

// `static`: each instruction set's file keeps its own copy, see cpu/generic.h.
template <int kManBits, int kBias>
static inline float minifloat(uint32_t magnitude) {
  const uint32_t normal = (magnitude << (23 - kManBits)) + ((127u - kBias) << 23);
  float value;
  std::memcpy(&value, &normal, 4);
  constexpr float kStep = 1.0f / (1 << (kBias - 1 + kManBits));  // of subnormals
  return magnitude < 1u << kManBits ? static_cast<float>(magnitude) * kStep : value;
}

// e4m3fn. The two NaNs, 0x7f and 0xff, give 480 here: no store holds them.
static inline float e4m3_to_float(uint32_t code) {
  const float value = minifloat<3, 7>(code & 0x7f);
  return code & 0x80 ? -value : value;
}

static inline float e2m1_to_float(uint32_t code) {
  const float value = minifloat<1, 1>(code & 7);
  return code & 8 ? -value : value;
}

// 2^(code - 127); 255, which is NaN, gives infinity here: no store holds it.
static inline float e8m0_to_float(uint32_t code) {
  const uint32_t bits = code == 0 ? 0x00400000u : code << 23;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace comoe
