// Element-wise kernels: exponentials, norms, RoPE, quantising a row of activations.

// e^x to about 1e-7, by 2^n * e^r with |r| <= ln(2)/2 and a polynomial (Cephes' expf).
static inline F8 f8_exp(F8 x) {
  x = f8_min(f8_max(x, f8_set1(-87.3f)), f8_set1(88.0f));
  F8 n = f8_round(f8_mul(x, f8_set1(1.44269504088896341f)));
  F8 r = f8_fma(n, f8_set1(-0.693359375f), x);
  r = f8_fma(n, f8_set1(2.12194440e-4f), r);
  F8 p = f8_set1(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = f8_fma(p, r, f8_set1(c));
  p = f8_add(f8_fma(p, f8_mul(r, r), r), f8_set1(1.0f));
  return f8_mul(p, f8_exp2(n));
}

static inline float exp1(float x) {
  float lanes[8];
  f8_store(lanes, f8_exp(f8_set1(x)));
  return lanes[0];
}

static inline F8 f8_sigmoid(F8 x) {
  F8 one = f8_set1(1.0f);
  return f8_div(one, f8_add(one, f8_exp(f8_sub(f8_zero(), x))));
}

static inline float sum_lanes(F8 x) {
  float a[8];
  f8_store(a, x);
  return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
}

static inline float max_lanes(F8 x) {
  float a[8];
  f8_store(a, x);
  float most = a[0];
  for (int i = 1; i < 8; ++i) most = a[i] > most ? a[i] : most;
  return most;
}

// One row of activations for weights of the given format.
static void quantize_row(const float* x, int64_t cols, Format weights, uint8_t* row) {
  const RowLayout layout(cols, weights);
  const float levels = weights == Format::int8 ? kLevels16 : kLevels8;
  float* scales = reinterpret_cast<float*>(row + layout.scales());
  int32_t* sums = reinterpret_cast<int32_t*>(row + layout.sums());
  for (int64_t g = 0; g < layout.groups; ++g) {
    const float* from = x + g * kGroup;
    float padded[kGroup];
    if ((g + 1) * kGroup > cols) {
      for (int64_t i = 0; i < kGroup; ++i) padded[i] = g * kGroup + i < cols ? from[i] : 0.0f;
      from = padded;
    }
    F8 most = f8_abs(f8_load(from));
    for (int i = 8; i < kGroup; i += 8) most = f8_max(most, f8_abs(f8_load(from + i)));
    const float amax = max_lanes(most);
    scales[g] = amax / levels;
    // The smallest numbers have no finite inverse; they are as good as zero.
    const float inverse = amax > 1e-30f ? levels / amax : 0.0f;
    if (weights == Format::int8) quantize32_s16(from, inverse, reinterpret_cast<int16_t*>(row) + g * kGroup);
    else sums[g] = quantize32_s8(from, inverse, reinterpret_cast<int8_t*>(row) + g * kGroup);
  }
}

static void rms_norm(const float* x, const float* weight, float eps, int64_t size, float* y) {
  F8 squares = f8_zero();
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) squares = f8_fma(f8_load(x + i), f8_load(x + i), squares);
  float sum = sum_lanes(squares);
  for (; i < size; ++i) sum = fma1(x[i], x[i], sum);
  float scale = 1.0f / std::sqrt(sum / float(size) + eps);
  for (i = 0; i + 8 <= size; i += 8)
    f8_store(y + i, f8_mul(f8_load(weight + i), f8_mul(f8_load(x + i), f8_set1(scale))));
  for (; i < size; ++i) y[i] = weight[i] * (x[i] * scale);
}

static void layer_norm(const float* x, const float* weight, float eps, int64_t size, float* y) {
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < size; ++i) sum += x[i];
  float mean = float(sum / double(size));
  for (int64_t i = 0; i < size; ++i) squares += double(x[i] - mean) * double(x[i] - mean);
  float scale = float(1.0 / std::sqrt(squares / double(size) + eps));
  for (int64_t i = 0; i < size; ++i) y[i] = weight[i] * ((x[i] - mean) * scale);
}

// Dimension i turns together with dimension i + D/2.
static void rope(float* x, const RopeArgs& a) {
  int64_t half = a.dim / 2;
  float *first = x, *second = x + half;
  int64_t i = 0;
  for (; i + 8 <= half; i += 8) {
    F8 p = f8_load(first + i), q = f8_load(second + i), c = f8_load(a.cos + i), s = f8_load(a.sin + i);
    f8_store(first + i, f8_sub(f8_mul(p, c), f8_mul(q, s)));
    f8_store(second + i, f8_fma(q, c, f8_mul(p, s)));
  }
  for (; i < half; ++i) {
    float p = first[i], q = second[i];
    first[i] = p * a.cos[i] - q * a.sin[i];
    second[i] = fma1(q, a.cos[i], p * a.sin[i]);
  }
}

static void scale(const float* x, float factor, int64_t size, float* y) {
  for (int64_t i = 0; i < size; ++i) y[i] = x[i] * factor;
}

static void add_scaled(float* y, const float* x, float factor, int64_t size) {
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) f8_store(y + i, f8_fma(f8_load(x + i), f8_set1(factor), f8_load(y + i)));
  for (; i < size; ++i) y[i] = fma1(x[i], factor, y[i]);
}
