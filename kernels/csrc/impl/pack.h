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

static void pack_int8_group(const float* w, int row, int64_t g, uint8_t* block, const Matrix& m) {
  const float scale = search_int8(w), inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  reinterpret_cast<uint16_t*>(block)[8 * g + row] = to_f16(scale);
  int8_t* q = reinterpret_cast<int8_t*>(block + m.quants_offset() + g * 256);
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

// The best of a grid of ranges, each a little narrower than the group's own: clipping the extremes
// buys precision for the rest.
static Int4 search_int4(const float* w) {
  float low = 0.0f, high = 0.0f;
  for (int i = 0; i < kGroup; ++i) {
    low = w[i] < low ? w[i] : low;
    high = w[i] > high ? w[i] : high;
  }
  Int4 best{0.0f, 0.0f, INFINITY};
  for (float a : {1.0f, 0.94f, 0.88f, 0.82f, 0.76f}) {
    for (float b : {1.0f, 0.94f, 0.88f, 0.82f, 0.76f}) {
      float scale = from_f16(to_f16((high * b - low * a) / 15.0f));
      if (!(scale > 0.0f)) continue;
      float zero = clamp(std::nearbyintf(-low * a / scale * 16.0f), 0.0f, 255.0f);
      float error = int4_error(w, scale, zero);
      if (error < best.error) best = {scale, zero, error};
    }
  }
  return best;
}

static void pack_int4_group(const float* w, int row, int64_t g, uint8_t* block, const Matrix& m) {
  Int4 best = search_int4(w);
  float inverse = best.scale > 0.0f ? 1.0f / best.scale : 0.0f, offset = best.zero * 0.0625f;
  reinterpret_cast<uint16_t*>(block)[8 * g + row] = to_f16(best.scale);
  block[m.zeros_offset() + 8 * g + row] = uint8_t(best.zero);
  uint8_t* q = block + m.quants_offset() + g * 128;
  for (int i = 0; i < kGroup; ++i) {
    int value = int(clamp(std::nearbyintf(fma1(w[i], inverse, offset)), 0.0f, 15.0f));
    q[i % 16 / 4 * 32 + row * 4 + i % 4] |= uint8_t(i < 16 ? value : value << 4);
  }
}

// Which row of the source becomes a packed row; -1 for padding.
static int64_t source_row(const PackArgs& a, int64_t row) {
  if (!a.paired) return row < a.source_rows ? row : -1;
  const int64_t half = a.source_rows / 2, block = row / kRows;
  const int64_t index = block / 2 * kRows + row % kRows;
  return index < half ? index + block % 2 * half : -1;
}

static void pack(const PackArgs& a) {
  const Matrix& m = a.target;
  for (int64_t b = a.block_begin; b < a.block_end; ++b) {
    uint8_t* block = const_cast<uint8_t*>(m.block(b));
    std::memset(block, 0, size_t(m.block_bytes()));
    for (int row = 0; row < kRows; ++row) {
      const int64_t index = source_row(a, b * kRows + row);
      if (index < 0) continue;
      const int64_t from = index * m.cols;
      if (is_quantized(m.format)) {
        for (int64_t g = 0; g < m.groups(); ++g) {
          float w[kGroup];
          for (int64_t i = 0; i < kGroup; ++i) {
            int64_t k = g * kGroup + i;
            w[i] = k < m.cols ? source_value(a.source, a.source_format, from + k) : 0.0f;
          }
          (m.format == Format::int8 ? pack_int8_group : pack_int4_group)(w, row, g, block, m);
        }
        continue;
      }
      for (int64_t k = 0; k < m.cols; ++k) {
        float w = source_value(a.source, a.source_format, from + k);
        if (m.format == Format::f32) reinterpret_cast<float*>(block)[8 * k + row] = w;
        else reinterpret_cast<uint16_t*>(block)[8 * k + row] = m.format == Format::f16 ? to_f16(w) : to_bf16(w);
      }
    }
  }
}

static void unpack_row(const Matrix& m, int64_t index, float* y) {
  const uint8_t* block = m.block(index / kRows);
  const int row = int(index % kRows);
  const uint16_t* half = reinterpret_cast<const uint16_t*>(block);
  for (int64_t k = 0; k < m.cols; ++k) {
    int64_t g = k / kGroup, i = k % kGroup;
    const uint8_t* quants = block + m.quants_offset();
    switch (m.format) {
      case Format::f32: y[k] = reinterpret_cast<const float*>(block)[8 * k + row]; break;
      case Format::bf16: y[k] = from_bf16(half[8 * k + row]); break;
      case Format::f16: y[k] = from_f16(half[8 * k + row]); break;
      case Format::int8:
        y[k] = float(int8_t(quants[g * 256 + i / 2 * 16 + row * 2 + i % 2])) * from_f16(half[8 * g + row]);
        break;
      case Format::int4: {
        uint8_t both = quants[g * 128 + i % 16 / 4 * 32 + row * 4 + i % 4];
        int value = 16 * (i < 16 ? both & 15 : both >> 4) - block[m.zeros_offset() + 8 * g + row];
        y[k] = float(value) * (from_f16(half[8 * g + row]) * 0.0625f);
        break;
      }
    }
  }
}
