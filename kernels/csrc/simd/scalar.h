// Eight lanes in portable C++: what an unknown processor runs, and what the others are compared with.
// Products are not fused, as a fused one without hardware for it is very slow; so results agree with
// the other instruction sets to rounding, not bit by bit.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../half.h"

constexpr int kUnroll = 1;  // there are no registers to keep anything in, and a minute of compiling to save

struct F8 {
  float a[8];
};
struct I8 {
  int32_t a[8];
};

#define LANES for (int i = 0; i < 8; ++i)
static inline F8 f8_set1(float x) { F8 r; LANES r.a[i] = x; return r; }
static inline F8 f8_zero() { return f8_set1(0.0f); }
static inline F8 f8_load(const float* p) { F8 r; std::memcpy(r.a, p, 32); return r; }
static inline void f8_store(float* p, F8 x) { std::memcpy(p, x.a, 32); }
static inline F8 f8_load_f16(const uint16_t* p) { F8 r; LANES r.a[i] = toptwo::from_f16(p[i]); return r; }
static inline void f8_store_f16(uint16_t* p, F8 x) { LANES p[i] = toptwo::to_f16(x.a[i]); }
static inline F8 f8_load_bf16(const uint16_t* p) { F8 r; LANES r.a[i] = toptwo::from_bf16(p[i]); return r; }
static inline F8 f8_add(F8 a, F8 b) { LANES a.a[i] += b.a[i]; return a; }
static inline F8 f8_sub(F8 a, F8 b) { LANES a.a[i] -= b.a[i]; return a; }
static inline F8 f8_mul(F8 a, F8 b) { LANES a.a[i] *= b.a[i]; return a; }
static inline F8 f8_div(F8 a, F8 b) { LANES a.a[i] /= b.a[i]; return a; }
static inline F8 f8_max(F8 a, F8 b) { LANES a.a[i] = a.a[i] > b.a[i] ? a.a[i] : b.a[i]; return a; }
static inline F8 f8_min(F8 a, F8 b) { LANES a.a[i] = a.a[i] < b.a[i] ? a.a[i] : b.a[i]; return a; }
static inline F8 f8_abs(F8 a) { LANES a.a[i] = std::fabs(a.a[i]); return a; }
static inline F8 f8_fma(F8 a, F8 b, F8 c) { LANES c.a[i] += a.a[i] * b.a[i]; return c; }
static inline float fma1(float a, float b, float c) { return a * b + c; }
static inline F8 f8_round(F8 a) { LANES a.a[i] = std::nearbyintf(a.a[i]); return a; }
static inline F8 f8_exp2(F8 n) {
  LANES n.a[i] = std::bit_cast<float>(uint32_t(int32_t(n.a[i]) + 127) << 23);
  return n;
}
static inline void f8_transpose(F8 (&r)[8]) {
  F8 rows[8];
  LANES rows[i] = r[i];
  for (int j = 0; j < 8; ++j) LANES r[j].a[i] = rows[i].a[j];
}
static inline bool f8_any_nan(F8 a) {
  bool found = false;
  LANES found |= a.a[i] != a.a[i];
  return found;
}
static inline int f8_mask_ge(F8 a, F8 b) {
  int mask = 0;
  LANES mask |= int(a.a[i] >= b.a[i]) << i;
  return mask;
}

static inline I8 i8_set1(int32_t x) { I8 r; LANES r.a[i] = x; return r; }
static inline I8 i8_zero() { return i8_set1(0); }
static inline I8 i8_load(const void* p) { I8 r; std::memcpy(r.a, p, 32); return r; }
static inline I8 i8_broadcast4(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return i8_set1(x);
}
static inline F8 i8_to_f8(I8 a) { F8 r; LANES r.a[i] = float(a.a[i]); return r; }
static inline I8 i8_low_nibbles(I8 a) { LANES a.a[i] &= 0x0f0f0f0f; return a; }
static inline I8 i8_high_nibbles(I8 a) { LANES a.a[i] = int32_t(uint32_t(a.a[i]) >> 4) & 0x0f0f0f0f; return a; }
static inline I8 i8_load_u8(const uint8_t* p) { I8 r; LANES r.a[i] = p[i]; return r; }
static inline I8 i8_sub_zero(I8 a, I8 z, I8 s) { LANES a.a[i] = 16 * a.a[i] - z.a[i] * s.a[i]; return a; }
static inline int32_t signed_byte(int32_t lane, int k) { return int8_t(uint32_t(lane) >> (8 * k)); }
static inline I8 i8_load_s16(const void* p) {
  const int8_t* w = static_cast<const int8_t*>(p);
  I8 r;
  LANES r.a[i] = int32_t(uint32_t(uint16_t(w[2 * i])) | uint32_t(uint16_t(w[2 * i + 1])) << 16);
  return r;
}
static inline int32_t signed_half(int32_t lane, int k) { return int16_t(uint32_t(lane) >> (16 * k)); }
static inline void i8_dot_s16(I8& acc, I8 w, I8 x) {
  LANES for (int k = 0; k < 2; ++k) acc.a[i] += signed_half(w.a[i], k) * signed_half(x.a[i], k);
}
static inline void i8_dot_u4(I8& acc, I8 w, I8 x) {
  LANES for (int k = 0; k < 4; ++k) acc.a[i] += signed_byte(w.a[i], k) * signed_byte(x.a[i], k);
}
static inline I8 i8_sum_u4(I8 acc) { return acc; }
static inline void quantize32_s16(const float* x, float inverse, int16_t* q) {
  for (int i = 0; i < 32; ++i) q[i] = int16_t(std::nearbyintf(x[i] * inverse));
}
static inline int32_t quantize32_s8(const float* x, float inverse, int8_t* q) {
  int32_t sum = 0;
  for (int i = 0; i < 32; ++i) sum += q[i] = int8_t(std::nearbyintf(x[i] * inverse));
  return sum;
}
#undef LANES
