// AVX-512 F, BW, VL, DQ (Skylake-X and later), without VNNI.
#pragma GCC diagnostic ignored \
    "-Wmaybe-uninitialized"  // GCC 12's headers use undefined vectors on purpose
#pragma GCC diagnostic ignored "-Wuninitialized"
#include "madd.h"

namespace comoe {
namespace {

struct Avx512 {
  using I = __m512i;
  using F = __m512;
  static constexpr int kBytes = 64;
  static constexpr int kExactRows = 4;

  static I load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static I load_table(const uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I broadcast8(const int16_t* p) {
    int64_t four;
    std::memcpy(&four, p, 8);
    return _mm512_set1_epi64(four);
  }
  static I splat8(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
  static I splat32(int32_t v) { return _mm512_set1_epi32(v); }
  static I and_(I a, I b) { return _mm512_and_si512(a, b); }
  static I or_(I a, I b) { return _mm512_or_si512(a, b); }
  template <int n>
  static I sll(I v) {
    return _mm512_slli_epi16(v, n);
  }
  template <int n>
  static I srl(I v) {
    return _mm512_srli_epi16(v, n);
  }
  static I sll32(I v) { return _mm512_slli_epi32(v, 16); }
  static I srl32(I v) { return _mm512_srli_epi32(v, 16); }
  static I lookup(I table, I idx) { return _mm512_shuffle_epi8(table, idx); }
  static I widen_low(I v) { return _mm512_unpacklo_epi8(v, _mm512_setzero_si512()); }
  static I widen_high(I v) { return _mm512_unpackhi_epi8(v, _mm512_setzero_si512()); }
  static I madd(I a, I b) { return _mm512_madd_epi16(a, b); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I add_pairs(I low, I high) {
    const F a = _mm512_castsi512_ps(low), b = _mm512_castsi512_ps(high);
    return _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)),
                            _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd)));
  }

  static F zero() { return _mm512_setzero_ps(); }
  static F splat(float v) { return _mm512_set1_ps(v); }
  static F load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static void store_floats(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fmadd(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fnmadd(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static I to_int(F v) { return _mm512_cvtps_epi32(v); }
  static F as_float(I v) { return _mm512_castsi512_ps(v); }
  static F half_to_float(I v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }
};

}  // namespace

const Kernels kAvx512Kernels = {"avx512",      false,    multiply_madd<Avx512>,    load,    store,
                                prepare_words, activate, unpack_tile_madd<Avx512>, project, attend};

}  // namespace comoe
