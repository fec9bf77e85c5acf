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

// By a quotient of polynomials, to about 3e-7 of its value (Eigen's ptanh). Beyond the bounds it is 1 to the last bit.
static inline F8 f8_tanh(F8 x) {
  x = f8_min(f8_set1(7.99881172180175781f), f8_max(f8_set1(-7.99881172180175781f), x));
  const F8 square = f8_mul(x, x);
  F8 p = f8_set1(-2.76076847742355e-16f), q = f8_set1(1.19825839466702e-06f);
  for (float c : {2.00018790482477e-13f, -8.60467152213735e-11f, 5.12229709037114e-08f, 1.48572235717979e-05f,
                  6.37261928875436e-04f, 4.89352455891786e-03f})
    p = f8_fma(p, square, f8_set1(c));
  for (float c : {1.18534705686654e-04f, 2.26843463243900e-03f, 4.89352518554385e-03f})
    q = f8_fma(q, square, f8_set1(c));
  return f8_div(f8_mul(x, p), q);
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

static void rms_norm(const float* x, const NormArgs& a, float* y) {
  const auto [weight, bias, eps, size] = a;
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

static void layer_norm(const float* x, const NormArgs& a, float* y) {
  const auto [weight, bias, eps, size] = a;
  F8 sums = f8_zero(), squares = f8_zero();
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) sums = f8_add(sums, f8_load(x + i));
  float sum = sum_lanes(sums);
  for (; i < size; ++i) sum += x[i];
  const float mean = sum / float(size);
  for (i = 0; i + 8 <= size; i += 8) {
    const F8 d = f8_sub(f8_load(x + i), f8_set1(mean));
    squares = f8_fma(d, d, squares);
  }
  float square = sum_lanes(squares);
  for (; i < size; ++i) square = fma1(x[i] - mean, x[i] - mean, square);
  const float scale = 1.0f / std::sqrt(square / float(size) + eps);
  for (i = 0; i < size; ++i) y[i] = weight[i] * ((x[i] - mean) * scale);
  if (bias) for (i = 0; i < size; ++i) y[i] += bias[i];
}

// Dimension i turns together with dimension i + dim / 2.
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

// What is no number stays none.
static void clip(const float* x, float limit, int64_t size, float* y) {
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) f8_store(y + i, f8_min(f8_set1(limit), f8_max(f8_set1(-limit), f8_load(x + i))));
  for (; i < size; ++i) y[i] = x[i] < -limit ? -limit : x[i] > limit ? limit : x[i];
}

static void add_scaled(float* y, const float* x, float factor, int64_t size) {
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) f8_store(y + i, f8_fma(f8_load(x + i), f8_set1(factor), f8_load(y + i)));
  for (; i < size; ++i) y[i] = fma1(x[i], factor, y[i]);
}
