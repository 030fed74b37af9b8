// AVX2 with FMA and F16C (since 2013).
#include "madd.h"

namespace comoe {
namespace {

struct Avx2 {
  using I = __m256i;
  using F = __m256;
  static constexpr int kBytes = 32;
  static constexpr int kExactRows = 2;  // 2 rows * 2 parts * 2 sums of 16 registers

  static I load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
  static I load_table(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I broadcast8(const int16_t* p) {
    int64_t four;
    std::memcpy(&four, p, 8);
    return _mm256_set1_epi64x(four);
  }
  static I splat8(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
  static I splat32(int32_t v) { return _mm256_set1_epi32(v); }
  static I and_(I a, I b) { return _mm256_and_si256(a, b); }
  static I or_(I a, I b) { return _mm256_or_si256(a, b); }
  template <int n>
  static I sll(I v) {
    return _mm256_slli_epi16(v, n);
  }
  template <int n>
  static I srl(I v) {
    return _mm256_srli_epi16(v, n);
  }
  static I sll32(I v) { return _mm256_slli_epi32(v, 16); }
  static I srl32(I v) { return _mm256_srli_epi32(v, 16); }
  static I lookup(I table, I idx) { return _mm256_shuffle_epi8(table, idx); }
  static I widen_low(I v) { return _mm256_unpacklo_epi8(v, _mm256_setzero_si256()); }
  static I widen_high(I v) { return _mm256_unpackhi_epi8(v, _mm256_setzero_si256()); }
  static I madd(I a, I b) { return _mm256_madd_epi16(a, b); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I mul(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static I add_pairs(I low, I high) { return _mm256_hadd_epi32(low, high); }

  static F zero() { return _mm256_setzero_ps(); }
  static F splat(float v) { return _mm256_set1_ps(v); }
  static F load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static void store_floats(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fmadd(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F fnmadd(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static I to_int(F v) { return _mm256_cvtps_epi32(v); }
  static F as_float(I v) { return _mm256_castsi256_ps(v); }
  static F half_to_float(I v) {  // the low half of each 32 bits
    const I packed =
        _mm256_packus_epi32(_mm256_and_si256(v, _mm256_set1_epi32(0xffff)), _mm256_setzero_si256());
    return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
  }
};

}  // namespace

const Kernels kAvx2Kernels = {"avx2",        false,    multiply_madd<Avx2>,    load,    store,
                              prepare_words, activate, unpack_tile_madd<Avx2>, project, attend};

}  // namespace comoe
