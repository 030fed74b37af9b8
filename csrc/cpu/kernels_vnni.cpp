// AVX-512 with VBMI, VNNI and BF16 (Zen 4, Sapphire Rapids and later).
#pragma GCC diagnostic ignored \
    "-Wmaybe-uninitialized"  // GCC 12's headers use undefined vectors on purpose
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "generic.h"

namespace comoe {
namespace {

inline __m512i splat(int byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
// Bits of a where mask is 1, else of b. (b is the operand that the instruction overwrites: it is
// dead more often than the mask, which would have to be copied first.)
inline __m512i select(__m512i mask, __m512i a, __m512i b) {
  return _mm512_ternarylogic_epi32(b, a, mask, 0xd8);
}

// ---- unpacking --------------------------------------------------------------------------------

// vpermb looks up 64 bytes by the low 6 bits of an index and ignores the rest, so codes need not be
// cut out of their neighbours: a table repeats its entries over the bits that do not belong to the
// code. `at`: which index bit is bit i of the code, lowest first.
struct SpreadIndex {
  alignas(64) uint8_t code[64];
  constexpr SpreadIndex(int bit0, int bit1, int bit2 = -1, int bit3 = -1) : code() {
    for (int idx = 0; idx < 64; ++idx) {
      const int at[] = {bit0, bit1, bit2, bit3};
      for (int i = 0; i < 4; ++i)
        if (at[i] >= 0) code[idx] |= (idx >> at[i] & 1) << i;
    }
  }
};
template <int... at>
inline __m512i spread_table(const uint8_t* table) {  // reads 16 bytes
  static constexpr SpreadIndex index(at...);
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), _mm512_load_si512(index.code));
}

template <Level L>
struct Unpacker;

template <>
struct Unpacker<Level::bits2> {
  __m512i table[3];  // code in index bits 0-1, 2-3, 4-5
  explicit Unpacker(const MatrixHeader& h)
      : table{spread_table<0, 1>(h.table2), spread_table<2, 3>(h.table2),
              spread_table<4, 5>(h.table2)} {}
  inline void operator()(const uint8_t* const* p, __m512i* v) const {
    for (int half = 0; half < 2; ++half, v += 4) {
      const __m512i a = _mm512_loadu_si512(p[0] + 64 * half);
      v[0] = _mm512_permutexvar_epi8(a, table[0]);
      v[1] = _mm512_permutexvar_epi8(a, table[1]);
      v[2] = _mm512_permutexvar_epi8(a, table[2]);
      v[3] = _mm512_permutexvar_epi8(_mm512_srli_epi16(a, 2), table[2]);
    }
  }
};

// One index serves two quads: bits 0-1 and 2-3 are their 2-bit codes, bits 4 and 5 the next bits.
inline __m512i pair_index(__m512i a, __m512i b) { return select(splat(0x30), b, a); }

template <>
struct Unpacker<Level::bits3> {
  __m512i even, odd;
  explicit Unpacker(const MatrixHeader& h)
      : even(spread_table<4, 0, 1>(h.table3)), odd(spread_table<5, 2, 3>(h.table3)) {}
  inline void operator()(const uint8_t* const* p, __m512i* v) const {
    const __m512i a0 = _mm512_loadu_si512(p[0]), a1 = _mm512_loadu_si512(p[0] + 64);
    const __m512i b = _mm512_loadu_si512(p[1]);
    const __m512i index[4] = {
        pair_index(a0, _mm512_slli_epi16(b, 4)),
        pair_index(_mm512_srli_epi16(a0, 4), _mm512_slli_epi16(b, 2)),
        pair_index(a1, b),
        pair_index(_mm512_srli_epi16(a1, 4), _mm512_srli_epi16(b, 2)),
    };
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = _mm512_permutexvar_epi8(index[i], even);
      v[2 * i + 1] = _mm512_permutexvar_epi8(index[i], odd);
    }
  }
};

// As above; the fourth bit of a quad takes the place of a code bit of its neighbour: index bit 2
// for the even quad, bit 1 for the odd one.
template <>
struct Unpacker<Level::bits4> {
  __m512i even, odd;
  explicit Unpacker(const MatrixHeader& h)
      : even(spread_table<2, 4, 0, 1>(h.table4)), odd(spread_table<1, 5, 2, 3>(h.table4)) {}
  inline void operator()(const uint8_t* const* p, __m512i* v) const {
    const __m512i a0 = _mm512_loadu_si512(p[0]), a1 = _mm512_loadu_si512(p[0] + 64);
    const __m512i b = _mm512_loadu_si512(p[1]), c = _mm512_loadu_si512(p[2]);
    const __m512i index[4] = {
        pair_index(a0, _mm512_slli_epi16(b, 4)),
        pair_index(_mm512_srli_epi16(a0, 4), _mm512_slli_epi16(b, 2)),
        pair_index(a1, b),
        pair_index(_mm512_srli_epi16(a1, 4), _mm512_srli_epi16(b, 2)),
    };
    // c moved by 2, 0, -2, -4, -6 bits: bit q of quad q = 2i lies at index bit 2 in shifted[i], and
    // bit q of quad q = 2i + 1 at index bit 1 in shifted[i + 1].
    const __m512i shifted[5] = {_mm512_slli_epi16(c, 2), c, _mm512_srli_epi16(c, 2),
                                _mm512_srli_epi16(c, 4), _mm512_srli_epi16(c, 6)};
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = _mm512_permutexvar_epi8(select(splat(0x04), shifted[i], index[i]), even);
      v[2 * i + 1] = _mm512_permutexvar_epi8(select(splat(0x02), shifted[i + 1], index[i]), odd);
    }
  }
};

// Moves the byte's bits up by `by` (down when negative); what comes in from neighbours is masked
// later.
template <int by>
inline __m512i shift(__m512i v) {
  if constexpr (by > 0) return _mm512_slli_epi16(v, by);
  if constexpr (by < 0) return _mm512_srli_epi16(v, -by);
  return v;
}

template <>
struct Unpacker<Level::bits8> {
  explicit Unpacker(const MatrixHeader&) {}
  template <int q>
  inline __m512i quad(const uint8_t* const* p, __m512i a, __m512i b, __m512i c) const {
    const __m512i d = _mm512_loadu_si512(p[3] + 64 * (q / 2));
    const __m512i high = select(splat(0xc0), shift<6 - 2 * (q % 4)>(a), shift<5 - q>(b));
    const __m512i low = select(splat(0x10), shift<4 - q>(c), shift<q % 2 ? -4 : 0>(d));
    return select(splat(0xe0), high, low);
  }
  inline void operator()(const uint8_t* const* p, __m512i* v) const {
    const __m512i a0 = _mm512_loadu_si512(p[0]), a1 = _mm512_loadu_si512(p[0] + 64);
    const __m512i b = _mm512_loadu_si512(p[1]), c = _mm512_loadu_si512(p[2]);
    v[0] = quad<0>(p, a0, b, c);
    v[1] = quad<1>(p, a0, b, c);
    v[2] = quad<2>(p, a0, b, c);
    v[3] = quad<3>(p, a0, b, c);
    v[4] = quad<4>(p, a1, b, c);
    v[5] = quad<5>(p, a1, b, c);
    v[6] = quad<6>(p, a1, b, c);
    v[7] = quad<7>(p, a1, b, c);
  }
};

template <Level L>
inline void block_pointers(BlockCursor& cursor, int64_t k, const uint8_t** p) {
  cursor.at(k);
  p[0] = cursor.plane(0, k, kPlaneBytes[0]);
  if constexpr (L >= Level::bits3) p[1] = cursor.plane(1, k, kPlaneBytes[1]);
  if constexpr (L >= Level::bits4) p[2] = cursor.plane(2, k, kPlaneBytes[2]);
  if constexpr (L >= Level::bits8) p[3] = cursor.plane(3, k, kPlaneBytes[3]);
}
template <Level L>
constexpr int block_lines() {
  return L == Level::bits2 ? 2 : L == Level::bits3 ? 3 : L == Level::bits4 ? 4 : 8;
}

// 2^(log2_min + log2_step * q) of 16 rows.
inline __m512 row_scales(const MatrixHeader& header, const uint8_t* params) {
  const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i*>(params));
  const __m512 e =
      _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(q)), _mm512_set1_ps(header.log2_step),
                      _mm512_set1_ps(header.log2_min));
  const __m512 n = _mm512_roundscale_ps(e, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(e, n);
  __m512 p = _mm512_set1_ps(1.535336188e-4f);  // as exp2_poly
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.339887440e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.618437357e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550332548e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402264791e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931472028e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

inline __m512i row_zeros(const uint8_t* params) {
  return _mm512_cvtepu8_epi32(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(params + kBlockRows)));
}

// Scales of several groups at a time, ahead of the loops over their blocks: inside, the constants
// of the polynomial would take eight registers from the sums.
constexpr int64_t kScaleGroups = 16;
inline void group_scales(const MatrixHeader& header, const uint8_t* params, int64_t n,
                         __m512* scale) {
  for (int64_t g = 0; g < n; ++g) scale[g] = row_scales(header, params + g * kParamsBytes);
}

// ---- products ---------------------------------------------------------------------------------

inline __m512i dot4(__m512i sum, __m512i w, const int8_t* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(sum)
      : "v"(w), "m"(*reinterpret_cast<const int32_t*>(x)));
  return sum;
}
inline __m512i broadcast4(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

// Levels 2, 3, 4: one int32 sum per block of 32 columns, whose activations share a scale.
template <Level L, int R>
void multiply_packed(const RunArgs& args) {
  const Unpacker<L> unpack(*args.header);
  const int64_t scale_at = args.layout.scale_offset(), sum_at = args.layout.sum_offset();
  BlockCursor cursor(args);
  Prefetcher prefetcher(args);
  const uint8_t* params = args.params;
  for (int64_t tile = 0, block = 0; tile < args.num_tiles; ++tile) {
    __m512 out[R];
    for (int r = 0; r < R; ++r) out[r] = _mm512_setzero_ps();
    __m512 scales[kScaleGroups];
    for (int64_t g = 0; g < args.layout.groups; ++g, params += kParamsBytes) {
      if (g % kScaleGroups == 0) {
        const int64_t left = args.layout.groups - g;
        group_scales(*args.header, params, left < kScaleGroups ? left : kScaleGroups, scales);
      }
      __m512 group[R];
      for (int r = 0; r < R; ++r) group[r] = _mm512_setzero_ps();
      const int64_t first = g * kGroupBlocks;
      const int64_t last =
          first + kGroupBlocks < args.col_blocks ? first + kGroupBlocks : args.col_blocks;
      for (int64_t k = first; k < last; ++k, ++block) {
        const uint8_t* p[4];
        block_pointers<L>(cursor, block, p);
        prefetcher.step<block_lines<L>()>();
        __m512i v[8];
        unpack(p, v);
        for (int r = 0; r < R; ++r) {
          const auto* x = reinterpret_cast<const int8_t*>(args.rows[r]) + k * kBlockCols;
          __m512i even = _mm512_setzero_si512(),
                  odd = even;  // one chain would wait for its latency
          for (int q = 0; q < 8; q += 2) {
            even = dot4(even, v[q], x + 4 * q);
            odd = dot4(odd, v[q + 1], x + 4 * q + 4);
          }
          const __m512i dot = _mm512_add_epi32(even, odd);
          const float scale = reinterpret_cast<const float*>(args.rows[r] + scale_at)[k];
          group[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(scale), group[r]);
        }
      }
      const __m512 scale = scales[g % kScaleGroups], zero = _mm512_cvtepi32_ps(row_zeros(params));
      for (int r = 0; r < R; ++r) {
        const float sum = reinterpret_cast<const float*>(args.rows[r] + sum_at)[g];
        out[r] =
            _mm512_fmadd_ps(scale, _mm512_fnmadd_ps(zero, _mm512_set1_ps(sum), group[r]), out[r]);
      }
    }
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(args.out[r] + tile * kBlockRows, out[r]);
  }
}

// Level 8: two int8 planes of activations, one exact int32 sum per group of 128 columns.
template <int R>
void multiply_bits8(const RunArgs& args) {
  constexpr Level L = Level::bits8;
  const Unpacker<L> unpack(*args.header);
  const int64_t scale_at = args.layout.scale_offset(), sum_at = args.layout.sum_offset();
  const int64_t low_at = args.layout.padded();
  BlockCursor cursor(args);
  Prefetcher prefetcher(args);
  const uint8_t* params = args.params;
  for (int64_t tile = 0, block = 0; tile < args.num_tiles; ++tile) {
    __m512 out[R];
    for (int r = 0; r < R; ++r) out[r] = _mm512_setzero_ps();
    __m512 scales[kScaleGroups];
    for (int64_t g = 0; g < args.layout.groups; ++g, params += kParamsBytes) {
      if (g % kScaleGroups == 0) {
        const int64_t left = args.layout.groups - g;
        group_scales(*args.header, params, left < kScaleGroups ? left : kScaleGroups, scales);
      }
      __m512i high[R], low[R];
      for (int r = 0; r < R; ++r) high[r] = low[r] = _mm512_setzero_si512();
      const int64_t first = g * kGroupBlocks;
      const int64_t last =
          first + kGroupBlocks < args.col_blocks ? first + kGroupBlocks : args.col_blocks;
      for (int64_t k = first; k < last; ++k, ++block) {
        const uint8_t* p[4];
        block_pointers<L>(cursor, block, p);
        prefetcher.step<block_lines<L>()>();
        __m512i v[8];
        unpack(p, v);
        for (int r = 0; r < R; ++r) {
          const auto* x = reinterpret_cast<const int8_t*>(args.rows[r]) + k * kBlockCols;
          for (int q = 0; q < 8; ++q) {
            high[r] = dot4(high[r], v[q], x + 4 * q);
            low[r] = dot4(low[r], v[q], x + low_at + 4 * q);
          }
        }
      }
      const __m512 scale = scales[g % kScaleGroups];
      const __m512i zero = row_zeros(params);
      for (int r = 0; r < R; ++r) {
        const float x_scale = reinterpret_cast<const float*>(args.rows[r] + scale_at)[g];
        const int32_t sum = reinterpret_cast<const int32_t*>(args.rows[r] + sum_at)[g];
        // Within int32: see multiply_int16.
        const __m512i dot =
            _mm512_sub_epi32(_mm512_add_epi32(_mm512_slli_epi32(high[r], 8), low[r]),
                             _mm512_mullo_epi32(zero, _mm512_set1_epi32(sum)));
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x_scale));
        out[r] = _mm512_fmadd_ps(both, _mm512_cvtepi32_ps(dot), out[r]);
      }
    }
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(args.out[r] + tile * kBlockRows, out[r]);
  }
}

// Exact weights are one stream, which the hardware prefetches best by itself as long as there is
// little to compute (measured for bf16: 1 or 2 rows 93% of the read bandwidth against 88%; 4 rows
// 82% both ways).
constexpr int kHardwareRows = 2;

// ---- codes ------------------------------------------------------------------------------------

// decode_block to bf16; what could meet numbers under 2^-126 or over 2^127 is left to it.
inline void decode_fp8(const uint8_t* block, float scale, uint8_t* out) {
  // The code's bits are those of an fp16 number that is 2^8 times too small.
  const __m512 scales = _mm512_set1_ps(scale * 256.0f);
  for (int p = 0; p < kBlockCols / 2; ++p) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 32 * p));
    const __m512i halves = _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(codes), 7),
                                            _mm512_set1_epi16(static_cast<int16_t>(0xbf80)));
    const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
    const __m512bh both =
        _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, scales), _mm512_mul_ps(low, scales));
    _mm512_store_si512(out + 64 * p, (__m512i)both);
  }
}

inline void decode_mxfp4(const uint8_t* block, __m128i scales, uint8_t* out) {
  // bf16 of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, twice: vpermw looks at five bits, of
  // which the fifth belongs to the next code.
  const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(
      0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, static_cast<int16_t>(0x8000),
      static_cast<int16_t>(0xbf00), static_cast<int16_t>(0xbf80), static_cast<int16_t>(0xbfc0),
      static_cast<int16_t>(0xc000), static_cast<int16_t>(0xc040), static_cast<int16_t>(0xc080),
      static_cast<int16_t>(0xc0c0)));
  // A power of two is added to the exponent, of numbers that are not 0.
  const __m512i wide = _mm512_cvtepu8_epi32(scales);
  const __m512i pairs = _mm512_or_si512(wide, _mm512_slli_epi32(wide, 16));
  const __m512i exponents = _mm512_slli_epi16(_mm512_sub_epi16(pairs, _mm512_set1_epi16(127)), 7);
  for (int v = 0; v < 4; ++v) {
    __m512i codes = _mm512_loadu_si512(block + 64 * v);
    for (int j = 0; j < 4; ++j, codes = _mm512_srli_epi16(codes, 4)) {
      const __m512i w = _mm512_permutexvar_epi16(codes, table);
      const __mmask32 some = _mm512_test_epi16_mask(w, _mm512_set1_epi16(0x7fff));
      _mm512_store_si512(out + 64 * (4 * v + j), _mm512_mask_add_epi16(w, some, w, exponents));
    }
  }
}

inline void decode_block_vnni(ExactType type, const uint8_t* block, const uint8_t* scales, DType to,
                              uint8_t* out) {
  if (to == DType::bf16 && type == ExactType::fp8) {
    float scale;
    std::memcpy(&scale, scales, 4);
    const float size = scale < 0 ? -scale : scale;
    if (size == 0 || (size > 0x1p-100f && size < 0x1p100f)) return decode_fp8(block, scale, out);
  }
  if (to == DType::bf16 && type == ExactType::mxfp4) {
    const __m128i rows = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
    const __m128i offset = _mm_sub_epi8(rows, _mm_set1_epi8(2));  // 2..252 keep all values normal
    if (_mm_cmple_epu8_mask(offset, _mm_set1_epi8(static_cast<char>(250))) == 0xffff)
      return decode_mxfp4(block, rows, out);
  }
  decode_block(type, block, scales, to, out);
}

// Exact bf16 times bf16: 16 rows x 2 columns an instruction. Two sums, as one would wait for its
// latency.
template <class Blocks, int R>
void multiply_bf16(const RunArgs& args) {
  Blocks blocks(args);
  Prefetcher prefetcher(args);
  for (int64_t tile = 0, index = 0; tile < args.num_tiles; ++tile) {
    __m512 even[R], odd[R];
    for (int r = 0; r < R; ++r) even[r] = odd[r] = _mm512_setzero_ps();
    for (int64_t k = 0; k < args.col_blocks; ++k, ++index) {
      const uint8_t* block = blocks.at(index);
      for (int p = 0; p < 16; p += 2) {
        if constexpr (R > kHardwareRows) prefetcher.step<2>();
        const auto w0 = (__m512bh)_mm512_loadu_si512(block + 64 * p);
        const auto w1 = (__m512bh)_mm512_loadu_si512(block + 64 * p + 64);
        for (int r = 0; r < R; ++r) {
          const auto* x =
              reinterpret_cast<const int8_t*>(args.rows[r]) + (k * kBlockCols + 2 * p) * 2;
          even[r] = _mm512_dpbf16_ps(even[r], w0, (__m512bh)broadcast4(x));
          odd[r] = _mm512_dpbf16_ps(odd[r], w1, (__m512bh)broadcast4(x + 4));
        }
      }
    }
    for (int r = 0; r < R; ++r)
      _mm512_storeu_ps(args.out[r] + tile * kBlockRows, _mm512_add_ps(even[r], odd[r]));
  }
}

// Exact weights of any type in fp32. Pair p of a block: columns 2p (even sum) and 2p + 1 (odd sum).
template <DType D, class Blocks, int R>
void multiply_exact(const RunArgs& args) {
  Blocks blocks(args);
  Prefetcher prefetcher(args);
  for (int64_t tile = 0, index = 0; tile < args.num_tiles; ++tile) {
    __m512 even[R], odd[R];
    for (int r = 0; r < R; ++r) even[r] = odd[r] = _mm512_setzero_ps();
    for (int64_t k = 0; k < args.col_blocks; ++k, ++index) {
      const uint8_t* block = blocks.at(index);
      for (int p = 0; p < 16; ++p) {
        if constexpr (R > kHardwareRows) prefetcher.step<D == DType::fp32 ? 2 : 1>();
        __m512 w0, w1;
        if constexpr (D == DType::fp32) {
          w0 = _mm512_loadu_ps(block + 128 * p);
          w1 = _mm512_loadu_ps(block + 128 * p + 64);
        } else {
          const __m512i w = _mm512_loadu_si512(block + 64 * p);
          if constexpr (D == DType::bf16) {
            w0 = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
            w1 = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(0xffff0000)));
          } else {
            w0 = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(w));
            w1 = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(w, 16)));
          }
        }
        for (int r = 0; r < R; ++r) {
          const auto* x = reinterpret_cast<const float*>(args.rows[r]) + k * kBlockCols + 2 * p;
          even[r] = _mm512_fmadd_ps(w0, _mm512_set1_ps(x[0]), even[r]);
          odd[r] = _mm512_fmadd_ps(w1, _mm512_set1_ps(x[1]), odd[r]);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      _mm512_storeu_ps(args.out[r] + tile * kBlockRows, _mm512_add_ps(even[r], odd[r]));
  }
}

using CodedBlocks = ExactBlocks<decode_block_vnni>;

template <DType D, int R>
void multiply_values(const RunArgs& args) {
  if (is_coded(args.exact_dtype)) return multiply_exact<D, CodedBlocks, R>(args);
  multiply_exact<D, PlainBlocks<D>, R>(args);
}

template <int R>
void multiply_rows(const RunArgs& args) {
  switch (args.level) {
    case Level::bits2:
      return multiply_packed<Level::bits2, R>(args);
    case Level::bits3:
      return multiply_packed<Level::bits3, R>(args);
    case Level::bits4:
      return multiply_packed<Level::bits4, R>(args);
    case Level::bits8:
      return multiply_bits8<R>(args);
    case Level::exact:
      break;
  }
  if (args.layout.form == Form::bf16)
    return is_coded(args.exact_dtype) ? multiply_bf16<CodedBlocks, R>(args)
                                      : multiply_bf16<PlainBlocks<DType::bf16>, R>(args);
  switch (args.value_dtype) {
    case DType::fp32:
      return multiply_values<DType::fp32, R>(args);
    case DType::bf16:
      return multiply_values<DType::bf16, R>(args);
    case DType::fp16:
      return multiply_values<DType::fp16, R>(args);
  }
}

void multiply_vnni(const RunArgs& args) {
  static_assert(kMaxRows == 8);
  switch (args.num_rows) {
    case 1:
      return multiply_rows<1>(args);
    case 2:
      return multiply_rows<2>(args);
    case 3:
      return multiply_rows<3>(args);
    case 4:
      return multiply_rows<4>(args);
    case 5:
      return multiply_rows<5>(args);
    case 6:
      return multiply_rows<6>(args);
    case 7:
      return multiply_rows<7>(args);
    case 8:
      return multiply_rows<8>(args);
  }
}

template <Level L>
void store_values(const RunArgs& args, const uint8_t* const* p, uint8_t value[8][64]) {
  __m512i v[8];
  Unpacker<L> unpack(*args.header);
  unpack(p, v);
  for (int q = 0; q < 8; ++q) _mm512_store_si512(value[q], v[q]);
}

void unpack_tile_vnni(const RunArgs& args, int64_t num_rows, int64_t cols, void* out,
                      DType out_dtype, int64_t ld) {
  switch (args.level) {
    case Level::bits2:
      return unpack_tile_with(args, num_rows, cols, out, out_dtype, ld, store_values<Level::bits2>);
    case Level::bits3:
      return unpack_tile_with(args, num_rows, cols, out, out_dtype, ld, store_values<Level::bits3>);
    case Level::bits4:
      return unpack_tile_with(args, num_rows, cols, out, out_dtype, ld, store_values<Level::bits4>);
    case Level::bits8:
      return unpack_tile_with(args, num_rows, cols, out, out_dtype, ld, store_values<Level::bits8>);
    case Level::exact:
      return unpack_tile_with<decode_block_vnni>(args, num_rows, cols, out, out_dtype, ld,
                                                 store_values<Level::bits2>);
  }
}

}  // namespace

const Kernels kVnniKernels = {"avx512_vnni_bf16", true,     multiply_vnni,   load, store,
                              prepare_group,      activate, unpack_tile_vnni};

}  // namespace comoe
