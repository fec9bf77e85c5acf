// Quantising and interleaving weights, and reading a row back.

static inline float source_value(const void* source, Format format, int64_t i) {
  switch (format) {
    case Format::f32: return static_cast<const float*>(source)[i];
    case Format::f16: return from_f16(static_cast<const uint16_t*>(source)[i]);
    default: return from_bf16(static_cast<const uint16_t*>(source)[i]);
  }
}

static inline float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// Squared error of rounding 32 weights to q * scale, |q| <= 127.
static inline float int8_error(const float* w, float scale) {
  const F8 inverse = f8_set1(1.0f / scale), most = f8_set1(127.0f);
  F8 total = f8_zero();
  for (int i = 0; i < kGroup; i += 8) {
    F8 x = f8_load(w + i);
    F8 q = f8_max(f8_min(f8_round(f8_mul(x, inverse)), most), f8_sub(f8_zero(), most));
    F8 e = f8_sub(x, f8_mul(q, f8_set1(scale)));
    total = f8_fma(e, e, total);
  }
  return sum_lanes(total);
}

// The best of the scales that give the largest weight 127 to 96 steps. Weights that were quantised before
// lie on a grid, which one of them often meets: half the error of the plain rule, and a tenth less
// for weights of any kind.
static float search_int8(const float* w) {
  float most = 0.0f, best = 0.0f, best_error = INFINITY;
  for (int i = 0; i < kGroup; ++i) most = std::fabs(w[i]) > most ? std::fabs(w[i]) : most;
  for (int steps = 127; steps > 95; --steps) {
    const float scale = from_f16(to_f16(most / float(steps)));
    if (!(scale > 0.0f)) continue;
    const float error = int8_error(w, scale);
    if (error < best_error) best = scale, best_error = error;
  }
  return best;
}

static void pack_int8_group(const float* w, int row, const Group& group) {
  const float scale = search_int8(w), inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  reinterpret_cast<uint16_t*>(group.scales)[row] = to_f16(scale);
  int8_t* q = reinterpret_cast<int8_t*>(group.quants);
  for (int i = 0; i < kGroup; ++i)
    q[i / 2 * 16 + row * 2 + i % 2] = int8_t(clamp(std::nearbyintf(w[i] * inverse), -127.0f, 127.0f));
}

struct Int4 {
  float scale, zero, error;
};

// Squared error of rounding 32 weights to (q - zero / 16) * scale, 0 <= q <= 15.
static inline float int4_error(const float* w, float scale, float zero) {
  F8 inverse = f8_set1(1.0f / scale), offset = f8_set1(zero * 0.0625f), total = f8_zero();
  for (int i = 0; i < kGroup; i += 8) {
    F8 x = f8_load(w + i);
    F8 q = f8_round(f8_fma(x, inverse, offset));
    q = f8_min(f8_max(q, f8_zero()), f8_set1(15.0f));
    F8 e = f8_sub(x, f8_mul(f8_sub(q, offset), f8_set1(scale)));
    total = f8_fma(e, e, total);
  }
  return sum_lanes(total);
}

// The best of two kinds of grids. Of 15 steps over the group's own range or a little less: clipping the extremes buys
// precision for the rest. And of 14 to 8 steps over all of it, for weights that were quantised to four bits before:
// the part of their grid that a group has is one of these, or every second, fourth or eighth point of one, and comes
// back exactly.
static Int4 search_int4(const float* w) {
  float low = 0.0f, high = 0.0f;
  for (int i = 0; i < kGroup; ++i) {
    low = w[i] < low ? w[i] : low;
    high = w[i] > high ? w[i] : high;
  }
  Int4 best{0.0f, 0.0f, INFINITY};
  auto attempt = [&](float low, float high, float steps) {
    const float scale = from_f16(to_f16((high - low) / steps));
    if (!(scale > 0.0f)) return;
    const float zero = clamp(std::nearbyintf(-low / scale * 16.0f), 0.0f, 255.0f);
    const float error = int4_error(w, scale, zero);
    if (error < best.error) best = {scale, zero, error};
  };
  for (float a : {1.0f, 0.94f, 0.88f, 0.82f, 0.76f})
    for (float b : {1.0f, 0.94f, 0.88f, 0.82f, 0.76f}) attempt(low * a, high * b, 15.0f);
  for (int steps = 14; steps >= 8; --steps) attempt(low, high, float(steps));
  return best;
}

static void pack_int4_group(const float* w, int row, const Group& group) {
  const Int4 best = search_int4(w);
  const float inverse = best.scale > 0.0f ? 1.0f / best.scale : 0.0f, offset = best.zero * 0.0625f;
  reinterpret_cast<uint16_t*>(group.scales)[row] = to_f16(best.scale);
  group.zeros[row] = uint8_t(best.zero);
  auto rounded = [&](int i) { return int(clamp(std::nearbyintf(fma1(w[i], inverse, offset)), 0.0f, 15.0f)); };
  for (int i = 0; i < kGroup / 2; ++i)
    group.quants[i / 4 * 32 + row * 4 + i % 4] = uint8_t(rounded(i) | rounded(i + 16) << 4);
}

// Which row of the source becomes a packed row; -1 for padding.
static int64_t source_row(const PackArgs& a, int64_t row) {
  if (!a.paired) return row < a.source_rows ? row : -1;
  const int64_t half = a.source_rows / 2, block = row / kRows;
  const int64_t index = block / 2 * kRows + row % kRows;
  return index < half ? index + block % 2 * half : -1;
}

static void pack_quantized_row(const PackArgs& a, int64_t block, int row, int64_t index) {
  const Matrix& m = a.target;
  for (int64_t g = 0; g < m.groups(); ++g) {
    float w[kGroup];
    for (int64_t i = 0; i < kGroup; ++i) {
      const int64_t k = g * kGroup + i;
      w[i] = index >= 0 && k < m.cols ? source_value(a.source, a.source_format, index * m.cols + k) : 0.0f;
    }
    (m.format == Format::int8 ? pack_int8_group : pack_int4_group)(w, row, m.group(block, g));
  }
}

static void pack_float_row(const PackArgs& a, int64_t block, int row, int64_t index) {
  const Matrix& m = a.target;
  uint8_t* base = const_cast<uint8_t*>(m.block(block));
  for (int64_t k = 0; k < m.cols; ++k) {
    const float w = index >= 0 ? source_value(a.source, a.source_format, index * m.cols + k) : 0.0f;
    if (m.format == Format::f32) reinterpret_cast<float*>(base)[8 * k + row] = w;
    else reinterpret_cast<uint16_t*>(base)[8 * k + row] = m.format == Format::f16 ? to_f16(w) : to_bf16(w);
  }
}

static void pack(const PackArgs& a) {
  auto pack_row = is_quantized(a.target.format) ? pack_quantized_row : pack_float_row;
  for (int64_t b = a.block_begin; b < a.block_end; ++b)
    for (int row = 0; row < kRows; ++row) pack_row(a, b, row, source_row(a, b * kRows + row));
}

static void unpack_group(const Group& group, Format format, int64_t row, int64_t count, float* y) {
  const float scale = from_f16(reinterpret_cast<const uint16_t*>(group.scales)[row]);
  for (int64_t i = 0; i < count; ++i) {
    if (format == Format::int8) {
      y[i] = float(int8_t(group.quants[i / 2 * 16 + row * 2 + i % 2])) * scale;
    } else {
      const uint8_t both = group.quants[i % 16 / 4 * 32 + row * 4 + i % 4];
      y[i] = float(16 * (i < 16 ? both & 15 : both >> 4) - group.zeros[row]) * (scale * 0.0625f);
    }
  }
}

static void unpack_row(const Matrix& m, int64_t index, float* y) {
  const int64_t block = index / kRows, row = index % kRows;
  if (is_quantized(m.format)) {
    for (int64_t g = 0; g < m.groups(); ++g)
      unpack_group(m.group(block, g), m.format, row, std::min<int64_t>(kGroup, m.cols - g * kGroup), y + g * kGroup);
    return;
  }
  for (int64_t k = 0; k < m.cols; ++k) y[k] = source_value(m.block(block), m.format, 8 * k + row);
}
