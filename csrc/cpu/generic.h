// The kernels in plain C++ that any compiler vectorises as it can. Included by each instruction
// set's file, so everything here has internal linkage: code compiled for AVX-512 must not be what
// the linker keeps for a CPU without it.
#pragma once

#include <cstring>

#include "../ladder/minifloat.h"
#include "kernels.h"

namespace comoe {
namespace {

// ---- conversions ------------------------------------------------------------------------------

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float bf16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }
inline uint16_t float_to_bf16(float f) {  // nearest even; NaN stays NaN
  const uint32_t u = float_to_bits(f);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const uint32_t quiet = (u >> 16) | 0x40;
  return static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

// Multiplying by 2^112 moves the exponent into place and normalises subnormals; 65536 and more in
// the scaled value means that the half was infinite or NaN.
inline float fp16_to_float(uint16_t h) {
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
  const float scaled = bits_to_float(magnitude) * bits_to_float(0x77800000);  // 2^112
  uint32_t u = float_to_bits(scaled);
  u = (h & 0x7fff) >= 0x7c00 ? magnitude | 0x7f800000 : u;
  return bits_to_float(u | static_cast<uint32_t>(h & 0x8000) << 16);
}
inline uint16_t float_to_fp16(float f) {
  const uint32_t u = float_to_bits(f), magnitude = u & 0x7fffffff;
  // Subnormal halves: adding 0.5 makes the FPU round at the right bit.
  const uint32_t small = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t normal = (magnitude + 0xc8000fff + ((magnitude >> 13) & 1)) >> 13;
  uint32_t h = magnitude < 0x38800000 ? small : normal;  // below 2^-14
  h = magnitude >= 0x477ff000 ? 0x7c00 : h;              // rounds to 65536 or more
  h = magnitude > 0x7f800000 ? 0x7e00 : h;
  return static_cast<uint16_t>(h | (u >> 16 & 0x8000));
}

inline float element(const void* src, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::fp32:
      return static_cast<const float*>(src)[i];
    case DType::bf16:
      return bf16_to_float(static_cast<const uint16_t*>(src)[i]);
    default:
      return fp16_to_float(static_cast<const uint16_t*>(src)[i]);
  }
}

inline void load(const void* src, DType dtype, int64_t n, float* dst) {
  const auto* half = static_cast<const uint16_t*>(src);
  switch (dtype) {
    case DType::fp32:
      std::memcpy(dst, src, n * 4);
      break;
    case DType::bf16:
      for (int64_t i = 0; i < n; ++i) dst[i] = bf16_to_float(half[i]);
      break;
    case DType::fp16:
      for (int64_t i = 0; i < n; ++i) dst[i] = fp16_to_float(half[i]);
      break;
  }
}

inline void store(const float* src, int64_t n, void* dst, DType dtype) {
  auto* half = static_cast<uint16_t*>(dst);
  switch (dtype) {
    case DType::fp32:
      std::memcpy(dst, src, n * 4);
      break;
    case DType::bf16:
      for (int64_t i = 0; i < n; ++i) half[i] = float_to_bf16(src[i]);
      break;
    case DType::fp16:
      for (int64_t i = 0; i < n; ++i) half[i] = float_to_fp16(src[i]);
      break;
  }
}

// ---- elementary functions ---------------------------------------------------------------------

// Called for each element, and vectorised only where they are inlined: left to itself the compiler
// stops doing so in a large file (SiLU then took nine times as long).
#define COMOE_INLINE inline __attribute__((always_inline))

constexpr float kRoundMagic =
    12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits

// 2^x within 2e-7 relative; x is clamped to [-126, 127].
COMOE_INLINE float exp2_poly(float x) {
  x = x < -126.0f ? -126.0f : x;
  x = x > 127.0f ? 127.0f : x;
  const float shifted = x + kRoundMagic;
  const float f = x - (shifted - kRoundMagic);  // [-0.5, 0.5]
  float p = 1.535336188e-4f;
  p = p * f + 1.339887440e-3f;
  p = p * f + 9.618437357e-3f;
  p = p * f + 5.550332548e-2f;
  p = p * f + 2.402264791e-1f;
  p = p * f + 6.931472028e-1f;
  p = p * f + 1.0f;
  return bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23));
}

COMOE_INLINE float exp_poly(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  // x * log2(e) in two parts: rounding the product alone would cost 2^-24 * |x| relative.
  const float shifted = x * 1.44269504f + kRoundMagic;
  const float n = shifted - kRoundMagic;
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23));
}

COMOE_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_poly(-x)); }

// Rational approximation, within a few units in the last place.
COMOE_INLINE float erf_poly(float x) {
  x = x < -4.0f ? -4.0f : x;
  x = x > 4.0f ? 4.0f : x;
  const float s = x * x;
  float p = -2.72614225801306e-10f;
  p = p * s + 2.77068142495902e-08f;
  p = p * s + -2.10102402082508e-06f;
  p = p * s + -5.69250639462346e-05f;
  p = p * s + -7.34990630326855e-04f;
  p = p * s + -2.95459980854025e-03f;
  p = p * s + -1.60960333262415e-02f;
  float q = -1.45660718464996e-05f;
  q = q * s + -2.13374055278905e-04f;
  q = q * s + -1.68282697438203e-03f;
  q = q * s + -7.37332916720468e-03f;
  q = q * s + -1.42647390514189e-02f;
  return x * p / q;
}

COMOE_INLINE float silu(float x) { return x * sigmoid(x); }
COMOE_INLINE float gelu(float x) { return 0.5f * x * (1.0f + erf_poly(x * 0.70710678f)); }
COMOE_INLINE float gelu_tanh(float x) {
  // 0.5 * x * (1 + tanh(z)) = x * sigmoid(2z)
  return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
}
COMOE_INLINE float relu(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays
COMOE_INLINE float relu2(float x) { return relu(x) * relu(x); }
COMOE_INLINE float quick_gelu(float x) { return x * sigmoid(1.702f * x); }

template <class F>
COMOE_INLINE void activate_with(const float* gate, const float* up, int64_t n, float* out, F&& f) {
  if (gate)
    for (int64_t i = 0; i < n; ++i) out[i] = f(gate[i]) * up[i];
  else
    for (int64_t i = 0; i < n; ++i) out[i] = f(up[i]);
}

inline void activate(const FfnSpec& spec, const float* gate, const float* up, int64_t n,
                     float* out) {
  switch (spec.activation) {
    case Activation::silu:
      return activate_with(gate, up, n, out, [](float v) { return silu(v); });
    case Activation::gelu:
      return activate_with(gate, up, n, out, [](float v) { return gelu(v); });
    case Activation::gelu_tanh:
      return activate_with(gate, up, n, out, [](float v) { return gelu_tanh(v); });
    case Activation::relu:
      return activate_with(gate, up, n, out, [](float v) { return relu(v); });
    case Activation::relu2:
      return activate_with(gate, up, n, out, [](float v) { return relu2(v); });
    case Activation::quick_gelu:
      return activate_with(gate, up, n, out, [](float v) { return quick_gelu(v); });
    case Activation::swigluoai: {
      const float alpha = spec.alpha, limit = spec.limit;
      for (int64_t i = 0; i < n; ++i) {
        float g = gate[i], u = up[i];
        g = g > limit ? limit : g;
        u = u > limit ? limit : u;
        u = u < -limit ? -limit : u;
        out[i] = (u + 1.0f) * (g * sigmoid(alpha * g));
      }
      return;
    }
  }
}

// ---- activations ------------------------------------------------------------------------------

// Symmetric quantisation of n values to integers up to `top` in magnitude; returns the scale. A
// group with a value that is not finite gets scale NaN, so that the fault shows in the result as it
// does in floating point. Groups below 1e-30 count as zero (their inverse scale would overflow).
inline float quantize(const float* src, int n, float top, int32_t* q) {
  uint32_t max_bits = 0;
  for (int i = 0; i < n; ++i) {
    const uint32_t u = float_to_bits(src[i]) & 0x7fffffff;
    max_bits = u > max_bits ? u : max_bits;
  }
  const float max = bits_to_float(max_bits);
  const bool finite = max_bits < 0x7f800000;
  if (!finite || max < 1e-30f) {
    for (int i = 0; i < n; ++i) q[i] = 0;
    return finite ? 0.0f : bits_to_float(0x7fc00000);
  }
  const float inverse = top / max;
  for (int i = 0; i < n; ++i) {
    const float shifted = src[i] * inverse + kRoundMagic;
    q[i] = static_cast<int32_t>(float_to_bits(shifted) - float_to_bits(kRoundMagic));
  }
  return max / top;
}

inline void prepare_group(const float* src, const RowLayout& layout, int64_t group, uint8_t* row) {
  const int64_t first = group * kGroupCols;
  int32_t q[kGroupCols];
  switch (layout.form) {
    case Form::int8: {
      Int8Group& out = reinterpret_cast<Int8Group*>(row)[group];
      auto* to = reinterpret_cast<int8_t*>(out.q);
      out.sum = 0.0f;
      for (int s = 0; s < kGroupScales; ++s, src += kScaleCols, to += kScaleCols) {
        out.scale[s] = quantize(src, kScaleCols, 127.0f, q);
        int32_t sum = 0;
        for (int i = 0; i < kScaleCols; ++i) sum += q[i];
        for (int i = 0; i < kScaleCols; ++i) to[i] = static_cast<int8_t>(q[i]);
        out.sum += out.scale[s] * static_cast<float>(sum);
      }
      return;
    }
    case Form::int16: {
      Int16Group& out = reinterpret_cast<Int16Group*>(row)[group];
      // 127 * 256: the high byte then stays within int8 with a signed low byte.
      out.scale = quantize(src, kGroupCols, 32512.0f, q);
      int32_t sum = 0;
      for (int i = 0; i < kGroupCols; ++i) sum += q[i];
      out.sum = sum;
      for (int b = 0; b < kGroupBlocks; ++b) {
        auto* high = reinterpret_cast<int8_t*>(out.q) + b * 2 * kBlockCols;
        auto* low = high + kBlockCols;
        for (int i = 0; i < kBlockCols; ++i) {
          const int32_t v = q[b * kBlockCols + i], h = (v + 128) >> 8;
          high[i] = static_cast<int8_t>(h);
          low[i] = static_cast<int8_t>(v - h * 256);
        }
      }
      return;
    }
    case Form::bf16:
      return store(src, kGroupCols, row + first * 2, DType::bf16);
    case Form::fp32:
      std::memcpy(row + first * 4, src, kGroupCols * 4);
      return;
  }
}

// Issues the run's prefetches, `lines` per block, into the second-level cache.
struct Prefetcher {
  const Prefetch* next;
  const uint8_t *p, *end;
  explicit Prefetcher(const RunArgs& args) : next(args.prefetch), p(next->begin), end(next->end) {}
  template <int lines>
  inline void step() {
    if (p >= end) {
      if (next->begin == next->end) return;
      ++next;
      p = next->begin;
      end = next->end;
    }
    for (int i = 0; i < lines; ++i) __builtin_prefetch(p + 64 * i, 0, 2);
    p += 64 * lines;
  }
};

// ---- weights ----------------------------------------------------------------------------------

// Walks the blocks of a run upwards: `at(k)` must be called for each block before `plane`.
struct BlockCursor {
  const Segment* here;
  explicit BlockCursor(const RunArgs& args) : here(args.segments) {}
  void at(int64_t k) {
    if (k == here[1].first) ++here;
  }
  const uint8_t* plane(int p, int64_t k, int64_t block_bytes) const {
    return here->base[p] + k * block_bytes;
  }
};

// Scale of each row of a tile in one group (counted through the run), and its zero in code units.
inline void group_params(const RunArgs& args, int64_t group, float* scale, float* zero) {
  const uint8_t* p = args.params + group * kParamsBytes;
  for (int r = 0; r < kBlockRows; ++r) {
    scale[r] = exp2_poly(args.header->log2_min + args.header->log2_step * p[r]);
    zero[r] = p[kBlockRows + r];
  }
}

// Values of the 64 lanes of quad q of the block at `p`, in code units.
inline void quad_values(const RunArgs& args, const uint8_t* const* p, int q, uint8_t* value) {
  const uint8_t* a = p[0] + (q / 4) * 64;
  const int shift = 2 * (q % 4);
  for (int lane = 0; lane < 64; ++lane) value[lane] = static_cast<uint8_t>(a[lane] >> shift & 3);
  for (int plane = 1; plane <= 2 && plane < num_planes(args.level); ++plane) {
    const uint8_t* b = p[plane];
    for (int lane = 0; lane < 64; ++lane)
      value[lane] = static_cast<uint8_t>(value[lane] << 1 | (b[lane] >> q & 1));
  }
  if (args.level == Level::bits8) {
    const uint8_t* d = p[3] + (q / 2) * 64;
    const int nibble = 4 * (q % 2);
    for (int lane = 0; lane < 64; ++lane)
      value[lane] = static_cast<uint8_t>(value[lane] << 4 | (d[lane] >> nibble & 15));
    return;
  }
  const uint8_t* table = args.level == Level::bits2   ? args.header->table2
                         : args.level == Level::bits3 ? args.header->table3
                                                      : args.header->table4;
  for (int lane = 0; lane < 64; ++lane) value[lane] = table[value[lane]];
}

constexpr int64_t kPlaneBytes[4] = {kPlane2BlockBytes, kPlane1BlockBytes, kPlane1BlockBytes,
                                    kPlane4BlockBytes};

// Values of all quads of blocks [first, first + n).
inline void block_values(const RunArgs& args, BlockCursor& cursor, int64_t first, int n,
                         uint8_t value[][8][64]) {
  for (int b = 0; b < n; ++b) {
    cursor.at(first + b);
    const uint8_t* p[4];
    for (int plane = 0; plane < num_planes(args.level); ++plane)
      p[plane] = cursor.plane(plane, first + b, kPlaneBytes[plane]);
    for (int q = 0; q < 8; ++q) quad_values(args, p, q, value[b][q]);
  }
}

// One coded block to weights of type `to`, laid out as an exact block of that type. scales: of this
// block, as layout.h has them.
inline void decode_block(ExactType type, const uint8_t* block, const uint8_t* scales, DType to,
                         uint8_t* out) {
  float w[kBlockRows * kBlockCols];  // as 16-bit elements lie
  if (type == ExactType::fp8) {
    float scale;
    std::memcpy(&scale, scales, 4);
    for (int i = 0; i < kBlockRows * kBlockCols; ++i) w[i] = e4m3_to_float(block[i]) * scale;
  } else {
    float scale[2 * kBlockRows];
    for (int n = 0; n < 2 * kBlockRows; ++n) scale[n] = e8m0_to_float(scales[n / 2]);
    uint16_t words[4][2 * kBlockRows];
    std::memcpy(words, block, sizeof(words));
    for (int pair = 0; pair < kBlockCols / 2; ++pair)
      for (int n = 0; n < 2 * kBlockRows; ++n)
        w[32 * pair + n] = e2m1_to_float(words[pair / 4][n] >> 4 * (pair % 4)) * scale[n];
  }
  if (to != DType::fp32) return store(w, kBlockRows * kBlockCols, out, to);
  auto* by_col = reinterpret_cast<float*>(out);
  for (int pair = 0; pair < kBlockCols / 2; ++pair)
    for (int r = 0; r < kBlockRows; ++r)
      for (int i = 0; i < 2; ++i)
        by_col[(2 * pair + i) * kBlockRows + r] = w[32 * pair + 2 * r + i];
}

// The exact blocks of a run that are elements of type D, where they lie. (In one class with the
// next, which a branch would tell apart, the bf16 kernel fell from 94% of the read bandwidth to
// 75%.)
template <DType D>
class PlainBlocks {
 public:
  explicit PlainBlocks(const RunArgs& args) : cursor_(args) {}
  const uint8_t* at(int64_t k) {
    cursor_.at(k);
    return cursor_.plane(0, k, kBlockRows * kBlockCols * (D == DType::fp32 ? 4 : 2));
  }

 private:
  BlockCursor cursor_;
};

// The exact blocks of a run in type args.value_dtype: where they lie, or decoded one by one into a
// scratch that stays in the first-level cache. `at` takes every k once, upwards.
template <auto decode = decode_block>
class ExactBlocks {
 public:
  explicit ExactBlocks(const RunArgs& args)
      : args_(args),
        bytes_(kBlockRows * kBlockCols * exact_bits(args.exact_dtype) / 8),
        cursor_(args),
        scales_(args.params) {}
  const uint8_t* at(int64_t k) {
    cursor_.at(k);
    const uint8_t* block = cursor_.plane(0, k, bytes_);
    if (!is_coded(args_.exact_dtype)) return block;
    decode(args_.exact_dtype, block, scales_, args_.value_dtype, decoded_);
    ++column_;
    if (args_.exact_dtype == ExactType::mxfp4)
      scales_ += kBlockRows;
    else if (column_ % kGroupBlocks == 0 || column_ == args_.col_blocks)
      scales_ += 4;
    if (column_ == args_.col_blocks) column_ = 0;
    return decoded_;
  }

 private:
  const RunArgs& args_;
  int64_t bytes_, column_ = 0;
  BlockCursor cursor_;
  const uint8_t* scales_;
  alignas(64) uint8_t decoded_[kBlockRows * kBlockCols * 4];
};

// One block of exact weights as fp32, out[row * 32 + col].
inline void exact_block(const uint8_t* block, DType dtype, float* out) {
  if (dtype == DType::fp32) {
    const auto* w = reinterpret_cast<const float*>(block);
    for (int r = 0; r < kBlockRows; ++r)
      for (int c = 0; c < kBlockCols; ++c) out[r * kBlockCols + c] = w[c * kBlockRows + r];
    return;
  }
  float pairs[kBlockRows * kBlockCols];
  load(block, dtype, kBlockRows * kBlockCols, pairs);
  for (int r = 0; r < kBlockRows; ++r)
    for (int p = 0; p < kBlockCols / 2; ++p)
      std::memcpy(out + r * kBlockCols + 2 * p, pairs + p * 32 + 2 * r, 8);
}

// Exact weights in their own type: bits are moved, never converted. `row` is 128 bytes of scratch.
inline void exact_rows(const uint8_t* block, DType dtype, int64_t num_rows, int64_t num_bytes,
                       uint8_t* out, int64_t stride_bytes) {
  alignas(64) uint8_t row[kBlockCols * 4];
  const int words = dtype == DType::fp32 ? kBlockCols : kBlockCols / 2;  // of 4 bytes in a row
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int w = 0; w < words; ++w) std::memcpy(row + 4 * w, block + 64 * w + 4 * r, 4);
    std::memcpy(out + r * stride_bytes, row, num_bytes);
  }
}

// `values(args, p, value)`: what block_values does for one block, as fast as the instruction set
// can; so is `decode`.
template <auto decode = decode_block, class Values>
inline void unpack_tile_with(const RunArgs& args, int64_t num_rows, int64_t cols, void* out,
                             DType out_dtype, int64_t ld, Values&& values) {
  const int64_t size = dtype_bytes(out_dtype);
  const bool exact = args.level == Level::exact;
  alignas(64) float block[kBlockRows * kBlockCols];
  alignas(64) uint8_t value[8][64], row[kBlockCols];
  float scale[kBlockRows], zero[kBlockRows];
  BlockCursor cursor(args);
  ExactBlocks<decode> exact_blocks(args);
  for (int64_t k = 0; k < args.col_blocks; ++k) {
    const int64_t first = k * kBlockCols;
    const int64_t n = cols - first < kBlockCols ? cols - first : kBlockCols;
    uint8_t* to = static_cast<uint8_t*>(out) + first * size;
    if (exact) {
      const uint8_t* from = exact_blocks.at(k);
      if (args.value_dtype == out_dtype) {
        exact_rows(from, out_dtype, num_rows, n * size, to, ld * size);
        continue;
      }
      exact_block(from, args.value_dtype, block);
    } else {
      cursor.at(k);
      if (k % kGroupBlocks == 0) group_params(args, k / kGroupBlocks, scale, zero);
      const uint8_t* p[4];
      for (int plane = 0; plane < num_planes(args.level); ++plane)
        p[plane] = cursor.plane(plane, k, kPlaneBytes[plane]);
      values(args, p, value);
      for (int r = 0; r < kBlockRows; ++r) {
        for (int q = 0; q < 8; ++q) std::memcpy(row + 4 * q, value[q] + 4 * r, 4);
        for (int c = 0; c < kBlockCols; ++c)
          block[r * kBlockCols + c] = scale[r] * (static_cast<float>(row[c]) - zero[r]);
      }
    }
    for (int64_t r = 0; r < num_rows; ++r)
      store(block + r * kBlockCols, n, to + r * ld * size, out_dtype);
  }
}

inline void unpack_tile(const RunArgs& args, int64_t num_rows, int64_t cols, void* out,
                        DType out_dtype, int64_t ld) {
  unpack_tile_with(args, num_rows, cols, out, out_dtype, ld,
                   [](const RunArgs& a, const uint8_t* const* p, uint8_t value[8][64]) {
                     for (int q = 0; q < 8; ++q) quad_values(a, p, q, value[q]);
                   });
}

// ---- products ---------------------------------------------------------------------------------

inline void quad_dot(const uint8_t* value, const int8_t* x, int32_t* dot) {
  for (int r = 0; r < kBlockRows; ++r)
    dot[r] += value[4 * r] * x[0] + value[4 * r + 1] * x[1] + value[4 * r + 2] * x[2] +
              value[4 * r + 3] * x[3];
}

inline void multiply_int8(const RunArgs& args) {
  for (int i = 0; i < args.num_rows; ++i)
    std::memset(args.out[i], 0, args.num_tiles * kBlockRows * 4);
  uint8_t value[kGroupBlocks][8][64];
  BlockCursor cursor(args);
  const int64_t groups = args.layout.groups;
  for (int64_t tile_group = 0; tile_group < args.num_tiles * groups; ++tile_group) {
    const int64_t tile = tile_group / groups, g = tile_group % groups;
    const int64_t left = args.col_blocks - g * kGroupBlocks;
    const int n = static_cast<int>(left < kGroupBlocks ? left : kGroupBlocks);
    block_values(args, cursor, tile * args.col_blocks + g * kGroupBlocks, n, value);
    float scale[kBlockRows], zero[kBlockRows];
    group_params(args, tile_group, scale, zero);
    for (int i = 0; i < args.num_rows; ++i) {
      const Int8Group& group = reinterpret_cast<const Int8Group*>(args.rows[i])[g];
      const auto* x = reinterpret_cast<const int8_t*>(group.q);
      float sum[kBlockRows] = {};
      for (int b = 0; b < n;) {
        const float x_scale = group.scale[b / kScaleBlocks];
        int32_t dot[kBlockRows] = {};
        do {
          for (int q = 0; q < 8; ++q) quad_dot(value[b][q], x + b * kBlockCols + 4 * q, dot);
        } while (++b < n && b % kScaleBlocks != 0);
        for (int r = 0; r < kBlockRows; ++r) sum[r] += x_scale * static_cast<float>(dot[r]);
      }
      float* out = args.out[i] + tile * kBlockRows;
      for (int r = 0; r < kBlockRows; ++r) out[r] += scale[r] * (sum[r] - zero[r] * group.sum);
    }
  }
}

inline void multiply_int16(const RunArgs& args) {
  for (int i = 0; i < args.num_rows; ++i)
    std::memset(args.out[i], 0, args.num_tiles * kBlockRows * 4);
  uint8_t value[kGroupBlocks][8][64];
  BlockCursor cursor(args);
  const int64_t groups = args.layout.groups;
  for (int64_t tile_group = 0; tile_group < args.num_tiles * groups; ++tile_group) {
    const int64_t tile = tile_group / groups, g = tile_group % groups;
    const int64_t left = args.col_blocks - g * kGroupBlocks;
    const int n = static_cast<int>(left < kGroupBlocks ? left : kGroupBlocks);
    block_values(args, cursor, tile * args.col_blocks + g * kGroupBlocks, n, value);
    float scale[kBlockRows], zero[kBlockRows];
    group_params(args, tile_group, scale, zero);
    for (int i = 0; i < args.num_rows; ++i) {
      const Int16Group& group = reinterpret_cast<const Int16Group*>(args.rows[i])[g];
      int32_t dot_high[kBlockRows] = {}, dot_low[kBlockRows] = {};
      for (int b = 0; b < n; ++b) {
        const auto* high = reinterpret_cast<const int8_t*>(group.q) + b * 2 * kBlockCols;
        for (int q = 0; q < 8; ++q) {
          quad_dot(value[b][q], high + 4 * q, dot_high);
          quad_dot(value[b][q], high + kBlockCols + 4 * q, dot_low);
        }
      }
      float* out = args.out[i] + tile * kBlockRows;
      for (int r = 0; r < kBlockRows; ++r) {
        // Within int32: 128 columns * 255 * 32640 = 1.07e9.
        const int32_t dot =
            dot_high[r] * 256 + dot_low[r] - static_cast<int32_t>(zero[r]) * group.sum;
        out[r] += scale[r] * group.scale * static_cast<float>(dot);
      }
    }
  }
}

inline void multiply_fp32(const RunArgs& args) {
  for (int i = 0; i < args.num_rows; ++i)
    std::memset(args.out[i], 0, args.num_tiles * kBlockRows * 4);
  float w[kBlockRows * kBlockCols], by_col[kBlockRows * kBlockCols];
  ExactBlocks blocks(args);
  for (int64_t k = 0; k < args.num_tiles * args.col_blocks; ++k) {
    const int64_t tile = k / args.col_blocks, column = k % args.col_blocks * kBlockCols;
    const uint8_t* raw = blocks.at(k);
    const auto* block = reinterpret_cast<const float*>(raw);  // fp32: by column already
    if (args.value_dtype != DType::fp32) {
      exact_block(raw, args.value_dtype, w);
      for (int c = 0; c < kBlockCols; ++c)
        for (int r = 0; r < kBlockRows; ++r) by_col[c * kBlockRows + r] = w[r * kBlockCols + c];
      block = by_col;
    }
    for (int i = 0; i < args.num_rows; ++i) {
      const auto* x = reinterpret_cast<const float*>(args.rows[i]) + column;
      float* out = args.out[i] + tile * kBlockRows;
      for (int c = 0; c < kBlockCols; ++c)
        for (int r = 0; r < kBlockRows; ++r) out[r] += block[c * kBlockRows + r] * x[c];
    }
  }
}

inline void multiply(const RunArgs& args) {
  switch (args.layout.form) {
    case Form::int8:
      return multiply_int8(args);
    case Form::int16:
      return multiply_int16(args);
    default:
      return multiply_fp32(args);
  }
}

// ---- a router's scores ------------------------------------------------------------------------

template <class Load>
inline void project_rows(Load&& load_at, int64_t rows, int64_t cols, const float* x, float* out) {
  constexpr int kLanes = 32;  // sums that the compiler keeps in vectors
  for (int64_t r = 0; r < rows; ++r) {
    float sums[kLanes] = {};
    int64_t c = 0;
    for (; c + kLanes <= cols; c += kLanes)
      for (int i = 0; i < kLanes; ++i) sums[i] += load_at(r * cols + c + i) * x[c + i];
    // In halves, which the compiler keeps in vectors: one after the other they took as long as
    // 1,000 columns.
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    float total = sums[0];
    for (; c < cols; ++c) total += load_at(r * cols + c) * x[c];
    out[r] = total;
  }
}

inline void project(const void* W, DType dtype, int64_t rows, int64_t cols, const float* x,
                    float* out) {
  const auto* half = static_cast<const uint16_t*>(W);
  const auto* wide = static_cast<const float*>(W);
  switch (dtype) {
    case DType::fp32:
      return project_rows([wide](int64_t i) { return wide[i]; }, rows, cols, x, out);
    case DType::bf16:
      return project_rows([half](int64_t i) { return bf16_to_float(half[i]); }, rows, cols, x, out);
    default:
      return project_rows([half](int64_t i) { return fp16_to_float(half[i]); }, rows, cols, x, out);
  }
}

// ---- attention of one token ---------------------------------------------------------------------

template <class Load>
inline void attend_head(const AttendArgs& a, int64_t b, int64_t g, const int32_t* seen, int64_t n,
                        float* scratch, Load&& load_at) {
  const int64_t group = a.heads / a.kv_heads, D = a.head_dim;
  const int64_t q_at = b * a.strides[0] + g * group * a.strides[1];
  const int64_t k_at = b * a.strides[2] + g * a.strides[3];
  const int64_t v_at = b * a.strides[5] + g * a.strides[6];
  float* q = scratch;            // [group, D]
  float* out = q + group * D;    // [group, D]
  float* row = out + group * D;  // [D]
  float* weights = row + D;      // [n, group]
  for (int64_t i = 0; i < group * D; ++i) out[i] = 0.0f;
  for (int64_t h = 0; h < group; ++h)
    for (int64_t d = 0; d < D; ++d)
      q[h * D + d] = a.scale * load_at(a.q, q_at + h * a.strides[1] + d);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = k_at + seen[i] * a.strides[4];
    for (int64_t d = 0; d < D; ++d) row[d] = load_at(a.k, at + d);
    project_rows([q](int64_t j) { return q[j]; }, group, D, row, weights + i * group);
  }
  for (int64_t h = 0; h < group; ++h) {
    float most = -3.0e38f, sum = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
      const float weight = weights[i * group + h];
      most = weight > most ? weight : most;
    }
    for (int64_t i = 0; i < n; ++i) {
      float& weight = weights[i * group + h];
      weight = exp_poly(weight - most);
      sum += weight;
    }
    for (int64_t i = 0; i < n; ++i) weights[i * group + h] /= sum;
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = v_at + seen[i] * a.strides[7];
    for (int64_t d = 0; d < D; ++d) row[d] = load_at(a.v, at + d);
    for (int64_t h = 0; h < group; ++h) {
      const float weight = weights[i * group + h];
      for (int64_t d = 0; d < D; ++d) out[h * D + d] += weight * row[d];
    }
  }
  store(out, group * D, element_at(a.out, a.dtype, (b * a.heads + g * group) * D), a.dtype);
}

inline void attend(const AttendArgs& args, int64_t batch, int64_t kv_head, const int32_t* seen,
                   int64_t num_seen, float* scratch) {
  switch (args.dtype) {
    case DType::fp32:
      return attend_head(args, batch, kv_head, seen, num_seen, scratch,
                         [](const void* p, int64_t i) { return static_cast<const float*>(p)[i]; });
    case DType::bf16:
      return attend_head(args, batch, kv_head, seen, num_seen, scratch,
                         [](const void* p, int64_t i) {
                           return bf16_to_float(static_cast<const uint16_t*>(p)[i]);
                         });
    case DType::fp16:
      return attend_head(args, batch, kv_head, seen, num_seen, scratch,
                         [](const void* p, int64_t i) {
                           return fp16_to_float(static_cast<const uint16_t*>(p)[i]);
                         });
  }
}

}  // namespace
}  // namespace comoe
