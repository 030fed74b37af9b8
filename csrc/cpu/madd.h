// Kernels for x86 without VNNI, written once for vectors of 32 (AVX2) or 64 bytes (AVX-512).
// Activations are int16 at every quantised level: weights are widened to 16 bits and multiplied in
// pairs (vpmaddwd), which cannot overflow, where the 8-bit product of pairs (vpmaddubsw) saturates.
//
// V gives: I, F (integer and float vector), kBytes, and the operations used below.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "generic.h"

namespace comoe {
namespace {

// n integers as int16, and their sum.
inline int32_t store_words(const int32_t* q, int n, int16_t* to) {
  int32_t sum = 0;
  for (int i = 0; i < n; ++i) sum += q[i];
  for (int i = 0; i < n; ++i) to[i] = static_cast<int16_t>(q[i]);
  return sum;
}

// As prepare_group, with q as int16.
inline void prepare_words(const float* src, const RowLayout& layout, int64_t group, uint8_t* row) {
  if (layout.form != Form::int8 && layout.form != Form::int16)
    return prepare_group(src, layout, group, row);
  int32_t q[kGroupCols];
  if (layout.form == Form::int16) {
    Int16Group& out = reinterpret_cast<Int16Group*>(row)[group];
    out.scale = quantize(src, kGroupCols, 32512.0f, q);
    out.sum = store_words(q, kGroupCols, reinterpret_cast<int16_t*>(out.q));
    return;
  }
  Int8Group& out = reinterpret_cast<Int8Group*>(row)[group];
  out.sum = 0.0f;
  for (int s = 0; s < kGroupScales; ++s) {
    out.scale[s] = quantize(src + s * kScaleCols, kScaleCols, 127.0f, q);
    auto* to = reinterpret_cast<int16_t*>(out.q) + s * kScaleCols;
    out.sum += out.scale[s] * static_cast<float>(store_words(q, kScaleCols, to));
  }
}

// Moves bits up by `by` (down when negative); what comes in from neighbouring bytes is masked off
// after.
template <class V, int by, int mask>
inline typename V::I bits(typename V::I v) {
  if constexpr (by > 0) v = V::template sll<by>(v);
  if constexpr (by < 0) v = V::template srl<-by>(v);
  return V::and_(v, V::splat8(mask));
}

// Values of part `part` (kBytes of the 64 lanes) of quad q.
template <class V, Level L, int q>
inline typename V::I quad(const uint8_t* const* p, int part, typename V::I table) {
  using I = typename V::I;
  constexpr int top = static_cast<int>(L) + 2;  // bits of a code, below 8
  const int at = part * V::kBytes;
  const I a = V::load(p[0] + 64 * (q / 4) + at);
  if constexpr (L == Level::bits2) {
    return V::lookup(table, bits<V, -2 * (q % 4), 3>(a));
  } else if constexpr (L == Level::bits8) {
    const I d = V::load(p[3] + 64 * (q / 2) + at);
    return V::or_(
        V::or_(bits<V, 6 - 2 * (q % 4), 0xc0>(a), bits<V, 5 - q, 0x20>(V::load(p[1] + at))),
        V::or_(bits<V, 4 - q, 0x10>(V::load(p[2] + at)), bits<V, q % 2 ? -4 : 0, 0x0f>(d)));
  } else {
    I code = V::or_(bits<V, top - 2 - 2 * (q % 4), 3 << (top - 2)>(a),
                    bits<V, top - 3 - q, 1 << (top - 3)>(V::load(p[1] + at)));
    if constexpr (L == Level::bits4) code = V::or_(code, bits<V, -q, 1>(V::load(p[2] + at)));
    return V::lookup(table, code);
  }
}

template <class V, Level L>
inline void unpack_part(const uint8_t* const* p, int part, typename V::I table, typename V::I* v) {
  v[0] = quad<V, L, 0>(p, part, table);
  v[1] = quad<V, L, 1>(p, part, table);
  v[2] = quad<V, L, 2>(p, part, table);
  v[3] = quad<V, L, 3>(p, part, table);
  v[4] = quad<V, L, 4>(p, part, table);
  v[5] = quad<V, L, 5>(p, part, table);
  v[6] = quad<V, L, 6>(p, part, table);
  v[7] = quad<V, L, 7>(p, part, table);
}

template <class V, Level L>
void multiply_quantised(const RunArgs& args) {
  using I = typename V::I;
  using F = typename V::F;
  constexpr int kParts = 64 / V::kBytes, kPartRows = kBlockRows / kParts;
  constexpr bool fine = L != Level::bits8;  // more than one scale per group
  using Group = std::conditional_t<fine, Int8Group, Int16Group>;
  const MatrixHeader& h = *args.header;
  const I table = V::load_table(L == Level::bits2   ? h.table2
                                : L == Level::bits3 ? h.table3
                                                    : h.table4);
  const int64_t groups = args.layout.groups;
  BlockCursor cursor(args);
  Prefetcher prefetcher(args);
  for (int64_t tile = 0, block = 0; tile < args.num_tiles; ++tile) {
    F out[kMaxRows][kParts];
    for (int r = 0; r < args.num_rows; ++r)
      for (int part = 0; part < kParts; ++part) out[r][part] = V::zero();
    for (int64_t g = 0; g < groups; ++g) {
      F sums[kMaxRows][kParts];
      I totals[kMaxRows][kParts];
      for (int r = 0; r < args.num_rows; ++r)
        for (int part = 0; part < kParts; ++part) {
          sums[r][part] = V::zero();
          totals[r][part] = V::splat8(0);
        }
      const int64_t first = g * kGroupBlocks;
      const int64_t last =
          first + kGroupBlocks < args.col_blocks ? first + kGroupBlocks : args.col_blocks;
      for (int64_t k = first; k < last; ++k, ++block) {
        cursor.at(block);
        const uint8_t* p[4];
        for (int plane = 0; plane <= static_cast<int>(L); ++plane)
          p[plane] = cursor.plane(plane, block, kPlaneBytes[plane]);
        prefetcher.step<L == Level::bits8 ? 8 : static_cast<int>(L) + 2>();
        for (int part = 0; part < kParts; ++part) {
          I v[8];
          unpack_part<V, L>(p, part, table, v);
          for (int r = 0; r < args.num_rows; ++r) {
            const Group& group = reinterpret_cast<const Group*>(args.rows[r])[g];
            const auto* x = reinterpret_cast<const int16_t*>(group.q) + (k - first) * kBlockCols;
            I low = V::splat8(0), high = low;  // rows 0, 1 and rows 2, 3 of each 16 bytes
            for (int q = 0; q < 8; ++q) {
              const I four = V::broadcast8(x + 4 * q);
              low = V::add(low, V::madd(V::widen_low(v[q]), four));
              high = V::add(high, V::madd(V::widen_high(v[q]), four));
            }
            I& total = totals[r][part];
            total = V::add(total, V::add_pairs(low, high));
            if constexpr (fine) {
              if (k + 1 != last && (k + 1) % kScaleBlocks != 0) continue;
              const F scale = V::splat(group.scale[(k - first) / kScaleBlocks]);
              sums[r][part] = V::fmadd(V::to_float(total), scale, sums[r][part]);
              total = V::splat8(0);
            }
          }
        }
      }
      alignas(64) float scale[kBlockRows], zero[kBlockRows];
      group_params(args, tile * groups + g, scale, zero);
      for (int r = 0; r < args.num_rows; ++r)
        for (int part = 0; part < kParts; ++part) {
          const F s = V::load_floats(scale + part * kPartRows),
                  z = V::load_floats(zero + part * kPartRows);
          const Group& group = reinterpret_cast<const Group*>(args.rows[r])[g];
          if constexpr (fine) {
            out[r][part] =
                V::fmadd(s, V::fnmadd(z, V::splat(group.sum), sums[r][part]), out[r][part]);
          } else {  // exact in int32: see multiply_int16
            const I dot = V::sub(totals[r][part], V::mul(V::to_int(z), V::splat32(group.sum)));
            out[r][part] =
                V::fmadd(V::mul(s, V::splat(group.scale)), V::to_float(dot), out[r][part]);
          }
        }
    }
    for (int r = 0; r < args.num_rows; ++r)
      for (int part = 0; part < kParts; ++part)
        V::store_floats(args.out[r] + tile * kBlockRows + part * kPartRows, out[r][part]);
  }
}

// Exact weights in fp32, R rows at a time so that the sums stay in registers.
template <class V, DType D, class Blocks, int R>
void multiply_exact(const RunArgs& args, int first_row) {
  using I = typename V::I;
  using F = typename V::F;
  constexpr int kParts = 64 / V::kBytes, kPartRows = kBlockRows / kParts;
  constexpr int kPairBytes = D == DType::fp32 ? 128 : 64;
  Blocks blocks(args);
  Prefetcher prefetcher(args);
  for (int64_t tile = 0, block = 0; tile < args.num_tiles; ++tile) {
    F even[R][kParts], odd[R][kParts];
    for (int r = 0; r < R; ++r)
      for (int part = 0; part < kParts; ++part) even[r][part] = odd[r][part] = V::zero();
    for (int64_t k = 0; k < args.col_blocks; ++k, ++block) {
      const uint8_t* w = blocks.at(block);
      for (int pair = 0; pair < 16; ++pair) {
        prefetcher.step<kPairBytes / 64>();
        for (int part = 0; part < kParts; ++part) {
          F w0, w1;
          if constexpr (D == DType::fp32) {
            const auto* column =
                reinterpret_cast<const float*>(w + kPairBytes * pair) + part * kPartRows;
            w0 = V::load_floats(column);
            w1 = V::load_floats(column + kBlockRows);
          } else {
            const I both = V::load(w + kPairBytes * pair + part * V::kBytes);
            if constexpr (D == DType::bf16) {
              w0 = V::as_float(V::sll32(both));
              w1 = V::as_float(V::and_(both, V::splat32(static_cast<int32_t>(0xffff0000))));
            } else {
              w0 = V::half_to_float(both);
              w1 = V::half_to_float(V::srl32(both));
            }
          }
          for (int r = 0; r < R; ++r) {
            const auto* x = reinterpret_cast<const float*>(args.rows[first_row + r]) +
                            k * kBlockCols + 2 * pair;
            even[r][part] = V::fmadd(w0, V::splat(x[0]), even[r][part]);
            odd[r][part] = V::fmadd(w1, V::splat(x[1]), odd[r][part]);
          }
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int part = 0; part < kParts; ++part)
        V::store_floats(args.out[first_row + r] + tile * kBlockRows + part * kPartRows,
                        V::add(even[r][part], odd[r][part]));
  }
}

template <class V, DType D, class Blocks>
void multiply_exact_blocks(const RunArgs& args) {
  int r = 0;
  for (; r + V::kExactRows <= args.num_rows; r += V::kExactRows)
    multiply_exact<V, D, Blocks, V::kExactRows>(args, r);
  for (; r < args.num_rows; ++r) multiply_exact<V, D, Blocks, 1>(args, r);
}

template <class V, DType D>
void multiply_exact_rows(const RunArgs& args) {
  if (is_coded(args.exact_dtype)) return multiply_exact_blocks<V, D, ExactBlocks<>>(args);
  multiply_exact_blocks<V, D, PlainBlocks<D>>(args);
}

template <class V>
void multiply_madd(const RunArgs& args) {
  switch (args.level) {
    case Level::bits2:
      return multiply_quantised<V, Level::bits2>(args);
    case Level::bits3:
      return multiply_quantised<V, Level::bits3>(args);
    case Level::bits4:
      return multiply_quantised<V, Level::bits4>(args);
    case Level::bits8:
      return multiply_quantised<V, Level::bits8>(args);
    case Level::exact:
      break;
  }
  switch (args.value_dtype) {
    case DType::fp32:
      return multiply_exact_rows<V, DType::fp32>(args);
    case DType::bf16:
      return multiply_exact_rows<V, DType::bf16>(args);
    case DType::fp16:
      return multiply_exact_rows<V, DType::fp16>(args);
  }
}

template <class V, Level L>
void store_values(const RunArgs& args, const uint8_t* const* p, uint8_t value[8][64]) {
  const MatrixHeader& h = *args.header;
  const auto table = V::load_table(L == Level::bits2   ? h.table2
                                   : L == Level::bits3 ? h.table3
                                                       : h.table4);
  for (int part = 0; part < 64 / V::kBytes; ++part) {
    typename V::I v[8];
    unpack_part<V, L>(p, part, table, v);
    for (int q = 0; q < 8; ++q) std::memcpy(value[q] + part * V::kBytes, &v[q], V::kBytes);
  }
}

template <class V>
void unpack_tile_madd(const RunArgs& args, int64_t num_rows, int64_t cols, void* out,
                      DType out_dtype, int64_t ld) {
  switch (args.level) {
    case Level::bits2:
      return unpack_tile_with(args, num_rows, cols, out, out_dtype, ld,
                              store_values<V, Level::bits2>);
    case Level::bits3:
      return unpack_tile_with(args, num_rows, cols, out, out_dtype, ld,
                              store_values<V, Level::bits3>);
    case Level::bits4:
      return unpack_tile_with(args, num_rows, cols, out, out_dtype, ld,
                              store_values<V, Level::bits4>);
    case Level::bits8:
      return unpack_tile_with(args, num_rows, cols, out, out_dtype, ld,
                              store_values<V, Level::bits8>);
    case Level::exact:
      return unpack_tile(args, num_rows, cols, out, out_dtype, ld);
  }
}

}  // namespace
}  // namespace comoe
