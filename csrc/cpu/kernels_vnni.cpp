// AVX-512 with VBMI, VNNI, GFNI and BF16 (Zen 4, Sapphire Rapids and later).
#pragma GCC diagnostic ignored \
    "-Wmaybe-uninitialized"  // GCC 12's headers use undefined vectors on purpose
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include <type_traits>

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

// An 8x8 bit matrix for vgf2p8affineqb: bit i of the result is bit `from[i]` of the byte.
constexpr int64_t permutation(int b0, int b1, int b2, int b3, int b4, int b5, int b6, int b7) {
  const int from[8] = {b0, b1, b2, b3, b4, b5, b6, b7};
  uint64_t matrix = 0;
  for (int i = 0; i < 8; ++i) matrix |= uint64_t{1} << (8 * (7 - i) + from[i]);
  return static_cast<int64_t>(matrix);
}
inline __m512i permute(__m512i v, int64_t matrix) {
  return _mm512_gf2p8affine_epi64_epi8(v, _mm512_set1_epi64(matrix), 0);
}

// Quads 2i and 2i + 1 of a block, for i = 0..3: `Unpacker(header)`, then `Block(p)` for each block
// and `pair<i>(block, v)`. Pair by pair, so that a pair can be multiplied while the next is
// unpacked.
template <Level L>
struct Unpacker;

template <>
struct Unpacker<Level::bits2> {
  __m512i table[3];  // code in index bits 0-1, 2-3, 4-5
  explicit Unpacker(const MatrixHeader& h)
      : table{spread_table<0, 1>(h.table2), spread_table<2, 3>(h.table2),
              spread_table<4, 5>(h.table2)} {}
  struct Block {
    __m512i a[2];
    explicit Block(const uint8_t* const* p)
        : a{_mm512_loadu_si512(p[0]), _mm512_loadu_si512(p[0] + 64)} {}
  };
  template <int i>
  inline void pair(const Block& block, __m512i* v) const {
    const __m512i a = block.a[i / 2];
    v[0] = _mm512_permutexvar_epi8(a, table[i % 2 ? 2 : 0]);
    v[1] = _mm512_permutexvar_epi8(i % 2 ? _mm512_srli_epi16(a, 2) : a, table[i % 2 ? 2 : 1]);
  }
};

// One index serves two quads: the third bits of both are brought into the nibble beside their first
// two; those of quads 2 to 5 lie in the right place already.
template <>
struct Unpacker<Level::bits3> {
  __m512i table[4];
  explicit Unpacker(const MatrixHeader& h)
      : table{spread_table<4, 0, 1>(h.table3), spread_table<5, 2, 3>(h.table3),
              spread_table<0, 2, 3>(h.table3), spread_table<1, 4, 5>(h.table3)} {}
  struct Block {
    __m512i a[2], b;
    explicit Block(const uint8_t* const* p)
        : a{_mm512_loadu_si512(p[0]), _mm512_loadu_si512(p[0] + 64)}, b(_mm512_loadu_si512(p[1])) {}
  };
  template <int i>
  inline void pair(const Block& block, __m512i* v) const {
    const __m512i a = block.a[i / 2];
    const __m512i b = i == 0   ? _mm512_slli_epi16(block.b, 4)
                      : i == 3 ? _mm512_srli_epi16(block.b, 4)
                               : block.b;
    const __m512i index =
        i % 2 ? _mm512_srli_epi16(select(splat(0x0c), b, a), 2) : select(splat(0x30), b, a);
    v[0] = _mm512_permutexvar_epi8(index, table[i % 2 ? 2 : 0]);
    v[1] = _mm512_permutexvar_epi8(index, table[i % 2 ? 3 : 1]);
  }
};

// One byte holds the codes of quads 2i and 2i + 1 whole: the third and fourth bits of each are
// brought next to each other, and into the nibble beside the first two of both quads.
template <>
struct Unpacker<Level::bits4> {
  __m512i table[4];
  explicit Unpacker(const uint8_t* t)
      : table{spread_table<5, 4, 0, 1>(t), spread_table<1, 0, 4, 5>(t), spread_table<4, 5, 0, 1>(t),
              spread_table<0, 1, 4, 5>(t)} {}
  explicit Unpacker(const MatrixHeader& h) : Unpacker(h.table4) {}
  struct Block {
    __m512i a[2], bc[2];
    explicit Block(const uint8_t* const* p)
        : a{_mm512_loadu_si512(p[0]), _mm512_loadu_si512(p[0] + 64)} {
      const __m512i b = permute(_mm512_loadu_si512(p[1]), permutation(2, 6, 3, 7, 0, 4, 1, 5));
      const __m512i c = permute(_mm512_loadu_si512(p[2]), permutation(6, 2, 7, 3, 4, 0, 5, 1));
      bc[0] = select(splat(0x55), b, c);
      bc[1] = select(splat(0x55), c, b);
    }
  };
  template <int i>
  inline void pair(const Block& block, __m512i* v) const {
    const __m512i codes = i % 2 ? select(splat(0x0f), block.bc[i / 2], block.a[i / 2])
                                : select(splat(0x0f), block.a[i / 2], block.bc[i / 2]);
    v[0] = _mm512_permutexvar_epi8(codes, table[i]);
    v[1] = _mm512_permutexvar_epi8(_mm512_srli_epi16(codes, 2), table[i]);
  }
};

// The first four bits, moved up by a table, and the last four.
alignas(16) constexpr uint8_t kHighNibble[16] = {0x00, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70,
                                                 0x80, 0x90, 0xa0, 0xb0, 0xc0, 0xd0, 0xe0, 0xf0};
template <>
struct Unpacker<Level::bits8> {
  Unpacker<Level::bits4> high;
  explicit Unpacker(const MatrixHeader&) : high(kHighNibble) {}
  struct Block : Unpacker<Level::bits4>::Block {
    const uint8_t* d;
    explicit Block(const uint8_t* const* p) : Unpacker<Level::bits4>::Block(p), d(p[3]) {}
  };
  template <int i>
  inline void pair(const Block& block, __m512i* v) const {
    high.pair<i>(block, v);
    const __m512i d = _mm512_loadu_si512(block.d + 64 * i);
    v[0] = select(splat(0x0f), d, v[0]);
    v[1] = select(splat(0x0f), _mm512_srli_epi16(d, 4), v[1]);
  }
};

// Walks the blocks of a run upwards with a pointer to each plane. Recomputing the pointers from the
// segment for each block, as BlockCursor does, takes more registers than there are.
template <Level L>
struct PlanePointers {
  static constexpr int kPlanes = static_cast<int>(L) + 1;
  const Segment* here;
  int64_t until;  // the block at which the next segment begins
  const uint8_t* p[kPlanes];
  int64_t end;
  explicit PlanePointers(const RunArgs& args)
      : here(args.segments), end(args.num_tiles * args.col_blocks) {
    enter(0);
  }
  void enter(int64_t block) {
    until = here[1].first < end ? here[1].first : end;
    for (int i = 0; i < kPlanes; ++i) p[i] = here->base[i] + block * kPlaneBytes[i];
  }
  // Past the end it is the last block again, which a kernel that loads ahead does not use.
  inline typename Unpacker<L>::Block next(int64_t block) {
    if (block == until) {
      if (block == end) {
        for (int i = 0; i < kPlanes; ++i) p[i] -= kPlaneBytes[i];
      } else {
        ++here;
        enter(block);
      }
    }
    const typename Unpacker<L>::Block packed(p);
    for (int i = 0; i < kPlanes; ++i) p[i] += kPlaneBytes[i];
    return packed;
  }
};
template <Level L>
constexpr int block_lines() {
  return L == Level::bits2 ? 2 : L == Level::bits3 ? 3 : L == Level::bits4 ? 4 : 8;
}

inline __m512 nearest(__m512 x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// 2^(n + f), n whole and f in [-0.5, 0.5].
inline __m512 exp2(__m512 n, __m512 f) {
  __m512 p = _mm512_set1_ps(1.535336188e-4f);  // as exp2_poly
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.339887440e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.618437357e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550332548e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402264791e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931472028e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}
inline __m512 exp2(__m512 x) {
  const __m512 n = nearest(x);
  return exp2(n, _mm512_sub_ps(x, n));
}

// 2^(log2_min + log2_step * q) of 16 rows, as one factor for q's high nibble and one for its low:
// the multiply-add units, where the polynomial would run, are what several rows wait for.
struct RowScales {
  __m512 high, low;
  explicit RowScales(const MatrixHeader& h) {
    const __m512 i = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 step = _mm512_set1_ps(h.log2_step);
    low = exp2(_mm512_mul_ps(i, step));
    high = exp2(
        _mm512_fmadd_ps(_mm512_mul_ps(i, _mm512_set1_ps(16.0f)), step, _mm512_set1_ps(h.log2_min)));
  }
  inline __m512 operator()(const uint8_t* params) const {
    const __m512i q =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(params)));
    return _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(q, 4), high),
                         _mm512_permutexvar_ps(q, low));
  }
};

inline __m512i row_zeros(const uint8_t* params) {
  return _mm512_cvtepu8_epi32(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(params + kBlockRows)));
}

// f(0), f(1), f(2), f(3) with the number known at compile time.
template <class F>
inline void for_pairs(F&& f) {
  f(std::integral_constant<int, 0>());
  f(std::integral_constant<int, 1>());
  f(std::integral_constant<int, 2>());
  f(std::integral_constant<int, 3>());
}

// ---- products ---------------------------------------------------------------------------------

inline __m512i dot4(__m512i sum, __m512i w, const int8_t* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(sum)
      : "v"(w), "m"(*reinterpret_cast<const int32_t*>(x)));
  return sum;
}
// Not _mm512_setzero_si512, which GCC keeps in a register and copies: that takes an execution unit.
inline __m512i zero_int() {
  __m512i z;
  asm("vpxord %0, %0, %0" : "=v"(z));
  return z;
}
inline __m512i broadcast4(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

// Levels 2, 3, 4: one int32 sum per 64 columns, whose activations share a scale.
template <Level L, int R>
void multiply_packed(const RunArgs& args) {
  const Unpacker<L> unpack(*args.header);
  const RowScales scales(*args.header);
  PlanePointers<L> planes(args);
  Prefetcher prefetcher(args);
  const uint8_t* params = args.params;
  const Int8Group* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = reinterpret_cast<const Int8Group*>(args.rows[r]);
  // Loaded and joined a block ahead: a chain of six instructions, which the CPU's own look-ahead
  // does not hide behind the products of several rows (46 cycles per block of four, now 42).
  auto ahead = planes.next(0);
  for (int64_t tile = 0, block = 0; tile < args.num_tiles; ++tile) {
    __m512 out[R];
    for (int r = 0; r < R; ++r) out[r] = _mm512_setzero_ps();
    int64_t left = args.col_blocks;
    for (int64_t g = 0; g < args.layout.groups; ++g, params += kParamsBytes) {
      __m512 group[R];
      for (int r = 0; r < R; ++r) group[r] = _mm512_setzero_ps();
      // `count` blocks, which share scale `s` of the group. Two chains per row where registers
      // allow, as four in all would wait for their latency; and all rows take a pair of quads as
      // soon as it is unpacked, so that unpacking and multiplying overlap.
      const auto add_blocks = [&](auto count, int s) __attribute__((always_inline)) {
        constexpr int kChains = R <= 4 ? 2 : 1;
        __m512i dot[R][kChains];
        for (int r = 0; r < R; ++r)
          for (int c = 0; c < kChains; ++c) dot[r][c] = zero_int();
        for (int b = 0; b < count; ++b) {
          prefetcher.step<block_lines<L>()>();
          const auto packed = ahead;
          ahead = planes.next(++block);
          for_pairs([&](auto i) __attribute__((always_inline)) {
            __m512i v[2];
            unpack.template pair<i>(packed, v);
            for (int q = 0; q < 2; ++q)
              for (int r = 0; r < R; ++r) {
                const auto* x = reinterpret_cast<const int8_t*>(rows[r][g].q) + s * kScaleCols +
                                b * kBlockCols + 8 * i + 4 * q;
                __m512i& sum = dot[r][(2 * i + q) % kChains];
                sum = dot4(sum, v[q], x);
              }
          });
        }
        for (int r = 0; r < R; ++r) {
          if constexpr (kChains == 2) dot[r][0] = _mm512_add_epi32(dot[r][0], dot[r][1]);
          group[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r][0]),
                                     _mm512_set1_ps(rows[r][g].scale[s]), group[r]);
        }
      };
      if (__builtin_expect(left >= kGroupBlocks, 1)) {
        for (int s = 0; s < kGroupScales; ++s)
          add_blocks(std::integral_constant<int, kScaleBlocks>(), s);
      } else {
        for (int s = 0; s * kScaleBlocks < left; ++s) {
          const auto n = static_cast<int>(left) - s * kScaleBlocks;
          add_blocks(n < kScaleBlocks ? n : kScaleBlocks, s);
        }
      }
      left -= kGroupBlocks;
      const __m512 scale = scales(params), zero = _mm512_cvtepi32_ps(row_zeros(params));
      for (int r = 0; r < R; ++r)
        out[r] = _mm512_fmadd_ps(
            scale, _mm512_fnmadd_ps(zero, _mm512_set1_ps(rows[r][g].sum), group[r]), out[r]);
    }
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(args.out[r] + tile * kBlockRows, out[r]);
  }
}

// Level 8: two int8 planes of activations, one exact int32 sum per group of 128 columns.
template <int R>
void multiply_bits8(const RunArgs& args) {
  constexpr Level L = Level::bits8;
  const Unpacker<L> unpack(*args.header);
  const RowScales scales(*args.header);
  PlanePointers<L> planes(args);
  Prefetcher prefetcher(args);
  const uint8_t* params = args.params;
  const Int16Group* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = reinterpret_cast<const Int16Group*>(args.rows[r]);
  auto ahead = planes.next(0);
  for (int64_t tile = 0, block = 0; tile < args.num_tiles; ++tile) {
    __m512 out[R];
    for (int r = 0; r < R; ++r) out[r] = _mm512_setzero_ps();
    int64_t left = args.col_blocks;
    for (int64_t g = 0; g < args.layout.groups; ++g, params += kParamsBytes) {
      __m512i high[R], low[R];
      for (int r = 0; r < R; ++r) high[r] = zero_int(), low[r] = zero_int();
      const int count = static_cast<int>(left < kGroupBlocks ? left : kGroupBlocks);
      left -= count;
      for (int b = 0; b < count; ++b) {
        prefetcher.step<block_lines<L>()>();
        const auto packed = ahead;
        ahead = planes.next(++block);
        for_pairs([&](auto i) __attribute__((always_inline)) {
          __m512i v[2];
          unpack.template pair<i>(packed, v);
          for (int q = 0; q < 2; ++q)
            for (int r = 0; r < R; ++r) {
              const auto* x = reinterpret_cast<const int8_t*>(rows[r][g].q) + b * 2 * kBlockCols +
                              8 * i + 4 * q;
              high[r] = dot4(high[r], v[q], x);
              low[r] = dot4(low[r], v[q], x + kBlockCols);
            }
        });
      }
      const __m512 scale = scales(params);
      const __m512i zero = row_zeros(params);
      for (int r = 0; r < R; ++r) {
        // Within int32: see multiply_int16.
        const __m512i dot =
            _mm512_sub_epi32(_mm512_add_epi32(_mm512_slli_epi32(high[r], 8), low[r]),
                             _mm512_mullo_epi32(zero, _mm512_set1_epi32(rows[r][g].sum)));
        out[r] = _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(rows[r][g].scale)),
                                 _mm512_cvtepi32_ps(dot), out[r]);
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
template <int pairs = kBlockCols / 2>
inline void decode_fp8(const uint8_t* block, float scale, uint8_t* out) {
  // The code's bits are those of an fp16 number that is 2^8 times too small.
  const __m512 scales = _mm512_set1_ps(scale * 256.0f);
  for (int p = 0; p < pairs; ++p) {
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

inline bool plain_fp8_scale(float scale) {
  const float size = scale < 0 ? -scale : scale;
  return size == 0 || (size > 0x1p-100f && size < 0x1p100f);
}
// 2..252 keep all values normal.
inline bool plain_mxfp4_scales(__m128i scales) {
  const __m128i offset = _mm_sub_epi8(scales, _mm_set1_epi8(2));
  return _mm_cmple_epu8_mask(offset, _mm_set1_epi8(static_cast<char>(250))) == 0xffff;
}

// bf16 of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, twice: vpermw looks at five bits, of
// which the fifth belongs to the next code.
inline __m512i mxfp4_table() {
  return _mm512_broadcast_i64x4(_mm256_setr_epi16(
      0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, static_cast<int16_t>(0x8000),
      static_cast<int16_t>(0xbf00), static_cast<int16_t>(0xbf80), static_cast<int16_t>(0xbfc0),
      static_cast<int16_t>(0xc000), static_cast<int16_t>(0xc040), static_cast<int16_t>(0xc080),
      static_cast<int16_t>(0xc0c0)));
}

inline void decode_mxfp4(const uint8_t* block, __m128i scales, uint8_t* out) {
  const __m512i table = mxfp4_table();
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
    if (plain_fp8_scale(scale)) return decode_fp8(block, scale, out);
  }
  if (to == DType::bf16 && type == ExactType::mxfp4) {
    const __m128i rows = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
    if (plain_mxfp4_scales(rows)) return decode_mxfp4(block, rows, out);
  }
  decode_block(type, block, scales, to, out);
}

// Exact bf16 times bf16: 16 rows x 2 columns an instruction. Two sums, as one would wait for its
// latency.
template <int R>
void multiply_bf16(const RunArgs& args) {
  PlainBlocks<DType::bf16> blocks(args);
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

// The bf16 numbers of FP8 codes 0..127 times a scale, as their low and their high bytes: vpermi2b
// looks up 64 codes at once.
class Fp8Table {
 public:
  void set(const uint8_t* scale_bytes) {
    struct Codes {
      alignas(64) uint8_t code[kBlockRows * kBlockCols] = {};
      constexpr Codes() {
        for (int i = 0; i < 128; ++i) code[i] = static_cast<uint8_t>(i);
      }
    };
    static constexpr Codes codes;
    alignas(64) uint8_t decoded[kBlockRows * kBlockCols * 2];
    float scale;
    std::memcpy(&scale, scale_bytes, 4);
    if (plain_fp8_scale(scale))
      decode_fp8<4>(codes.code, scale, decoded);
    else
      decode_block(ExactType::fp8, codes.code, scale_bytes, DType::bf16, decoded);
    struct Even {
      alignas(64) uint8_t index[64] = {};
      constexpr Even() {
        for (int i = 0; i < 64; ++i) index[i] = static_cast<uint8_t>(2 * i);
      }
    };
    static constexpr Even even;
    const __m512i low = _mm512_load_si512(even.index), high = _mm512_or_si512(low, splat(1));
    for (int i = 0; i < 2; ++i) {
      const __m512i a = _mm512_load_si512(decoded + 128 * i);
      const __m512i b = _mm512_load_si512(decoded + 128 * i + 64);
      low_[i] = _mm512_permutex2var_epi8(a, low, b);
      high_[i] = _mm512_permutex2var_epi8(a, high, b);
    }
  }
  // Two vectors of 32 codes each, one behind the other, to bf16.
  inline void decode(const uint8_t* from, __m512i* to) const {
    // unpack takes the lower or the upper half of each 16 bytes.
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i codes = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(from));
    const __m512i low = _mm512_permutex2var_epi8(low_[0], codes, low_[1]);
    const __m512i high = _mm512_permutex2var_epi8(high_[0], codes, high_[1]);
    const __m512i with_sign = _mm512_ternarylogic_epi32(high, codes, splat(0x80), 0x78);
    to[0] = _mm512_unpacklo_epi8(low, with_sign);
    to[1] = _mm512_unpackhi_epi8(low, with_sign);
  }

 private:
  __m512i low_[2], high_[2];
};

// As multiply_bf16 with decoded blocks, which need not go through memory.
template <int R>
void multiply_fp8(const RunArgs& args) {
  BlockCursor cursor(args);
  Prefetcher prefetcher(args);
  const uint8_t* scales = args.params;
  Fp8Table table;
  for (int64_t tile = 0, index = 0; tile < args.num_tiles; ++tile) {
    __m512 even[R], odd[R];
    for (int r = 0; r < R; ++r) even[r] = odd[r] = _mm512_setzero_ps();
    for (int64_t k = 0; k < args.col_blocks; ++k, ++index) {
      if (k % kGroupBlocks == 0) {
        table.set(scales);
        scales += 4;
      }
      cursor.at(index);
      const uint8_t* block = cursor.plane(0, index, kBlockRows * kBlockCols);
      for (int p = 0; p < 16; p += 2) {
        prefetcher.step<1>();
        __m512i w[2];
        table.decode(block + 32 * p, w);
        for (int r = 0; r < R; ++r) {
          const auto* x =
              reinterpret_cast<const int8_t*>(args.rows[r]) + (k * kBlockCols + 2 * p) * 2;
          even[r] = _mm512_dpbf16_ps(even[r], (__m512bh)w[0], (__m512bh)broadcast4(x));
          odd[r] = _mm512_dpbf16_ps(odd[r], (__m512bh)w[1], (__m512bh)broadcast4(x + 4));
        }
      }
    }
    for (int r = 0; r < R; ++r)
      _mm512_storeu_ps(args.out[r] + tile * kBlockRows, _mm512_add_ps(even[r], odd[r]));
  }
}

// MXFP4: the scale, a power of two, belongs to a row of a block, so the block's sum is scaled.
template <int R>
void multiply_mxfp4(const RunArgs& args) {
  BlockCursor cursor(args);
  Prefetcher prefetcher(args);
  const auto* scales = reinterpret_cast<const __m128i*>(args.params);
  const __m512i table = mxfp4_table();
  for (int64_t tile = 0, index = 0; tile < args.num_tiles; ++tile) {
    __m512 out[R];
    for (int r = 0; r < R; ++r) out[r] = _mm512_setzero_ps();
    for (int64_t k = 0; k < args.col_blocks; ++k, ++index, ++scales) {
      cursor.at(index);
      const uint8_t* block = cursor.plane(0, index, kBlockRows * kBlockCols / 2);
      const __m128i rows = _mm_loadu_si128(scales);
      __m512 even[R], odd[R];
      for (int r = 0; r < R; ++r) even[r] = odd[r] = _mm512_setzero_ps();
      const auto add_pairs = [&](int p, __m512i w0, __m512i w1) __attribute__((always_inline)) {
        for (int r = 0; r < R; ++r) {
          const auto* x =
              reinterpret_cast<const int8_t*>(args.rows[r]) + (k * kBlockCols + 2 * p) * 2;
          even[r] = _mm512_dpbf16_ps(even[r], (__m512bh)w0, (__m512bh)broadcast4(x));
          odd[r] = _mm512_dpbf16_ps(odd[r], (__m512bh)w1, (__m512bh)broadcast4(x + 4));
        }
      };
      prefetcher.step<4>();
      if (plain_mxfp4_scales(rows)) {
        for (int v = 0; v < 4; ++v) {
          const __m512i codes = _mm512_loadu_si512(block + 64 * v);
          const auto decode = [&](int j) {
            return _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * j), table);
          };
          add_pairs(4 * v, decode(0), decode(1));
          add_pairs(4 * v + 2, decode(2), decode(3));
        }
        const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(rows), 23));
        for (int r = 0; r < R; ++r)
          out[r] = _mm512_fmadd_ps(_mm512_add_ps(even[r], odd[r]), scale, out[r]);
      } else {
        alignas(64) uint8_t decoded[kBlockRows * kBlockCols * 2];
        decode_block(ExactType::mxfp4, block, reinterpret_cast<const uint8_t*>(scales), DType::bf16,
                     decoded);
        for (int p = 0; p < 16; p += 2)
          add_pairs(p, _mm512_load_si512(decoded + 64 * p),
                    _mm512_load_si512(decoded + 64 * p + 64));
        for (int r = 0; r < R; ++r) out[r] = _mm512_add_ps(out[r], _mm512_add_ps(even[r], odd[r]));
      }
    }
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(args.out[r] + tile * kBlockRows, out[r]);
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
    return args.exact_dtype == ExactType::fp8     ? multiply_fp8<R>(args)
           : args.exact_dtype == ExactType::mxfp4 ? multiply_mxfp4<R>(args)
                                                  : multiply_bf16<R>(args);
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

// ---- activations ------------------------------------------------------------------------------

// As quantize, of 16 * n values, and the sum of q.
template <int n>
inline float quantize_vectors(const float* src, float top, __m512i* q, int32_t* sum) {
  __m512 x[n];
  __m512i max = _mm512_setzero_si512();
  for (int i = 0; i < n; ++i) {
    x[i] = _mm512_loadu_ps(src + 16 * i);
    max = _mm512_max_epu32(
        max, _mm512_and_si512(_mm512_castps_si512(x[i]), _mm512_set1_epi32(0x7fffffff)));
  }
  const uint32_t max_bits = _mm512_reduce_max_epu32(max);
  const float largest = bits_to_float(max_bits);
  const bool finite = max_bits < 0x7f800000;
  if (!finite || largest < 1e-30f) {
    for (int i = 0; i < n; ++i) q[i] = _mm512_setzero_si512();
    *sum = 0;
    return finite ? 0.0f : bits_to_float(0x7fc00000);
  }
  const __m512 inverse = _mm512_set1_ps(top / largest), magic = _mm512_set1_ps(kRoundMagic);
  __m512i total = _mm512_setzero_si512();
  for (int i = 0; i < n; ++i) {
    q[i] = _mm512_sub_epi32(_mm512_castps_si512(_mm512_fmadd_ps(x[i], inverse, magic)),
                            _mm512_castps_si512(magic));
    total = _mm512_add_epi32(total, q[i]);
  }
  *sum = _mm512_reduce_add_epi32(total);
  return largest / top;
}
inline void store_low_bytes(__m512i v, uint8_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(v));
}

// With prepare_group and activate of generic.h the gaps between the runs, in which no memory is
// read, took 5% of the time of four rows.
void prepare_group_vnni(const float* src, const RowLayout& layout, int64_t group, uint8_t* row) {
  int32_t sum;
  if (layout.form == Form::int8) {
    Int8Group& out = reinterpret_cast<Int8Group*>(row)[group];
    constexpr int n = kScaleCols / 16;
    __m512i q[n];
    out.sum = 0.0f;
    for (int s = 0; s < kGroupScales; ++s) {
      out.scale[s] = quantize_vectors<n>(src + s * kScaleCols, 127.0f, q, &sum);
      out.sum += out.scale[s] * static_cast<float>(sum);
      for (int i = 0; i < n; ++i) store_low_bytes(q[i], out.q + s * kScaleCols + 16 * i);
    }
  } else if (layout.form == Form::int16) {
    Int16Group& out = reinterpret_cast<Int16Group*>(row)[group];
    constexpr int n = kGroupCols / 16, per_block = kBlockCols / 16;
    __m512i q[n];
    out.scale = quantize_vectors<n>(src, 32512.0f, q, &sum);
    out.sum = sum;
    for (int i = 0; i < n; ++i) {
      uint8_t* to = out.q + i / per_block * 2 * kBlockCols + i % per_block * 16;
      const __m512i high = _mm512_add_epi32(q[i], _mm512_set1_epi32(128));
      store_low_bytes(_mm512_srai_epi32(high, 8), to);
      store_low_bytes(q[i], to + kBlockCols);
    }
  } else {
    prepare_group(src, layout, group, row);
  }
}

void activate_vnni(const FfnSpec& spec, const float* gate, const float* up, int64_t n, float* out) {
  if (spec.activation != Activation::silu) return activate(spec, gate, up, n, out);
  const __m512 log2e = _mm512_set1_ps(-1.44269504f), one = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 u = _mm512_loadu_ps(up + i), x = gate ? _mm512_loadu_ps(gate + i) : u;
    // As exp_poly clamps; x is the second operand, so that NaN stays.
    const __m512 c = _mm512_max_ps(_mm512_set1_ps(-88.0f), _mm512_min_ps(_mm512_set1_ps(87.0f), x));
    const __m512 m = nearest(_mm512_mul_ps(c, log2e));
    const __m512 e = exp2(m, _mm512_fmsub_ps(c, log2e, m));  // the product is not rounded
    const __m512 y = _mm512_div_ps(x, _mm512_add_ps(one, e));
    _mm512_storeu_ps(out + i, gate ? _mm512_mul_ps(y, u) : y);
  }
}

template <Level L>
void store_values(const RunArgs& args, const uint8_t* const* p, uint8_t value[8][64]) {
  const Unpacker<L> unpack(*args.header);
  const typename Unpacker<L>::Block packed(p);
  for_pairs([&](auto i) {
    __m512i v[2];
    unpack.template pair<i>(packed, v);
    for (int q = 0; q < 2; ++q) _mm512_store_si512(value[2 * i + q], v[q]);
  });
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

const Kernels kVnniKernels = {"avx512_vnni_bf16", true,          multiply_vnni,    load,    store,
                              prepare_group_vnni, activate_vnni, unpack_tile_vnni, project, attend};

}  // namespace comoe
