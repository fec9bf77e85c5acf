// 16-bit floats in portable C++: the formats of weights, scales and KV.
#pragma once

#include <bit>
#include <cstdint>

namespace toptwo {

static inline float from_bf16(uint16_t h) { return std::bit_cast<float>(uint32_t(h) << 16); }

// Round to nearest even; NaN stays NaN.
static inline uint16_t to_bf16(float f) {
  uint32_t u = std::bit_cast<uint32_t>(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

static inline float from_f16(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ff) << 13);
  if (rest >= 0x0400) return std::bit_cast<float>(sign | ((rest << 13) + 0x38000000u));
  float subnormal = float(rest) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

// Round to nearest even; too large becomes infinity, as the processor's conversion does.
static inline uint16_t to_f16(float f) {
  uint32_t u = std::bit_cast<uint32_t>(f), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffffu;
  if (rest > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (rest >= 0x47800000u) return uint16_t(sign | 0x7c00);
  if (rest < 0x38800000u) {
    // Adding 0.5 lets the floating-point unit round to the subnormal's step, 2^-24.
    float shifted = std::bit_cast<float>(rest) + 0.5f;
    return uint16_t(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  uint32_t rounded = rest + 0xfffu + ((rest >> 13) & 1);
  return uint16_t(sign | ((rounded - 0x38000000u) >> 13));
}

}  // namespace toptwo
