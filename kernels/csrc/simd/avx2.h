// Eight lanes by AVX2, FMA and F16C. The same functions as simd/scalar.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// Loops that keep sums in registers are unrolled whole: the compiler copies the sums in every round otherwise.
constexpr int kUnroll = 16;

using F8 = __m256;
using I8 = __m256i;

static inline F8 f8_zero() { return _mm256_setzero_ps(); }
static inline F8 f8_set1(float x) { return _mm256_set1_ps(x); }
static inline F8 f8_load(const float* p) { return _mm256_loadu_ps(p); }
static inline void f8_store(float* p, F8 x) { _mm256_storeu_ps(p, x); }
static inline F8 f8_load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline void f8_store_f16(uint16_t* p, F8 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
static inline F8 f8_load_bf16(const uint16_t* p) {
  __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
static inline F8 f8_add(F8 a, F8 b) { return _mm256_add_ps(a, b); }
static inline F8 f8_sub(F8 a, F8 b) { return _mm256_sub_ps(a, b); }
static inline F8 f8_mul(F8 a, F8 b) { return _mm256_mul_ps(a, b); }
static inline F8 f8_div(F8 a, F8 b) { return _mm256_div_ps(a, b); }
static inline F8 f8_max(F8 a, F8 b) { return _mm256_max_ps(a, b); }
static inline F8 f8_min(F8 a, F8 b) { return _mm256_min_ps(a, b); }
static inline F8 f8_abs(F8 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline F8 f8_fma(F8 a, F8 b, F8 c) { return _mm256_fmadd_ps(a, b, c); }
static inline float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline F8 f8_round(F8 a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// 2^n for whole n in [-126, 127].
static inline F8 f8_exp2(F8 n) {
  I8 e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}
// Lane j of row i becomes lane i of row j.
static inline void f8_transpose(F8 (&r)[8]) {
  F8 pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}
static inline bool f8_any_nan(F8 a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
// Bit i is set where lane i of a >= b.
static inline int f8_mask_ge(F8 a, F8 b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ));
}

static inline I8 i8_zero() { return _mm256_setzero_si256(); }
static inline I8 i8_load(const void* p) { return _mm256_loadu_si256(static_cast<const I8*>(p)); }
static inline I8 i8_set1(int32_t x) { return _mm256_set1_epi32(x); }
static inline I8 i8_broadcast4(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return _mm256_set1_epi32(x);
}
static inline F8 i8_to_f8(I8 a) { return _mm256_cvtepi32_ps(a); }
static inline I8 i8_low_nibbles(I8 a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
static inline I8 i8_high_nibbles(I8 a) { return i8_low_nibbles(_mm256_srli_epi16(a, 4)); }
// Eight bytes, widened.
static inline I8 i8_load_u8(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
// 16 a - z * s, where z is an unsigned byte and s fits 16 bits.
static inline I8 i8_sub_zero(I8 a, I8 z, I8 s) {
  return _mm256_sub_epi32(_mm256_slli_epi32(a, 4), _mm256_madd_epi16(z, s));
}
// 16 signed bytes, widened: two 16-bit numbers in each lane.
static inline I8 i8_load_s16(const void* p) {
  return _mm256_cvtepi8_epi16(_mm_load_si128(static_cast<const __m128i*>(p)));
}
// acc += the two products of each lane's 16-bit numbers.
static inline void i8_dot_s16(I8& acc, I8 w, I8 x) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  acc = _mm256_dpwssd_epi32(acc, w, x);
#else
  // The addition is spelt out and stays where it is: left alone, the compiler multiplies everything first
  // and then lacks registers for the sums, which costs a quarter of the speed.
  const I8 products = _mm256_madd_epi16(w, x);
  __asm__ volatile("vpaddd %1, %0, %0" : "+x"(acc) : "x"(products));
#endif
}
// acc += the four products of each lane: unsigned nibbles times signed bytes. Without VNNI two 16-bit sums of
// pairs are kept in a lane; after eight calls they are below 8 * 2 * 15 * 127 = 30480 and so still exact.
static inline void i8_dot_u4(I8& acc, I8 w, I8 x) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  acc = _mm256_dpbusd_epi32(acc, w, x);
#else
  const I8 products = _mm256_maddubs_epi16(w, x);
  __asm__ volatile("vpaddw %1, %0, %0" : "+x"(acc) : "x"(products));
#endif
}
// What i8_dot_u4 added up, as one number for each lane.
static inline I8 i8_sum_u4(I8 acc) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return acc;
#else
  return _mm256_madd_epi16(acc, _mm256_set1_epi16(1));
#endif
}
// 32 floats times `inverse`, rounded to nearest even.
struct Rounded {
  I8 a, b, c, d;
};
static inline Rounded round32(const float* x, float inverse) {
  const F8 scale = f8_set1(inverse);
  auto rounded = [&](int i) { return _mm256_cvtps_epi32(f8_mul(f8_load(x + i), scale)); };
  return {rounded(0), rounded(8), rounded(16), rounded(24)};
}
static inline void quantize32_s16(const float* x, float inverse, int16_t* q) {
  const Rounded r = round32(x, inverse);
  I8* out = reinterpret_cast<I8*>(q);
  // Packing works within halves of a register; the permutation puts the quarters in order.
  _mm256_storeu_si256(out, _mm256_permute4x64_epi64(_mm256_packs_epi32(r.a, r.b), 0xd8));
  _mm256_storeu_si256(out + 1, _mm256_permute4x64_epi64(_mm256_packs_epi32(r.c, r.d), 0xd8));
}
// Returns the sum of the rounded numbers.
static inline int32_t quantize32_s8(const float* x, float inverse, int8_t* q) {
  const Rounded r = round32(x, inverse);
  I8 bytes = _mm256_packs_epi16(_mm256_packs_epi32(r.a, r.b), _mm256_packs_epi32(r.c, r.d));
  bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256(reinterpret_cast<I8*>(q), bytes);
  const I8 sums = _mm256_add_epi32(_mm256_add_epi32(r.a, r.b), _mm256_add_epi32(r.c, r.d));
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  s = _mm_hadd_epi32(s, s);
  return _mm_cvtsi128_si32(_mm_hadd_epi32(s, s));
}
