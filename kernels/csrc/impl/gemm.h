// Matrix products over interleaved blocks. A tile is NT tokens x NB blocks of 8 rows; tiles of every
// size add up the inputs of an output in the same order, so GEMV and GEMM agree bit by bit.

// For one token four streams of weights keep memory busy: four blocks, or four pairs of them in int4. Several
// tokens share a load of the weights; registers are then short, two blocks are all that fit, and memory is kept
// busy by asking for weights ahead of their use.
constexpr int kTokens = 4, kNarrow = 2;
constexpr int wide(Format f) { return f == Format::int4 ? 8 : 4; }

static inline void prefetch(const uint8_t* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(data + i);
}

template <int NT>
struct Inputs {
  const uint8_t* row[NT];
  RowLayout layout;
  bool first;  // of the tiles that read these weights: the others find them in the cache
};

template <Format F>
static inline F8 load_weights(const uint8_t* block, int64_t k) {
  if constexpr (F == Format::f32) return f8_load(reinterpret_cast<const float*>(block) + 8 * k);
  const uint16_t* half = reinterpret_cast<const uint16_t*>(block) + 8 * k;
  return F == Format::f16 ? f8_load_f16(half) : f8_load_bf16(half);
}

template <Format F, int NT, int NB>
static inline void float_tile(const Matrix& w, const uint8_t* block, const Inputs<NT>& x, F8 (&acc)[NT][NB]) {
  const int64_t stride = w.block_bytes();
  for (int64_t k = 0; k < w.cols; ++k) {
    F8 weights[NB];
    for (int b = 0; b < NB; ++b) weights[b] = load_weights<F>(block + b * stride, k);
    for (int t = 0; t < NT; ++t) {
      F8 input = f8_set1(reinterpret_cast<const float*>(x.row[t])[k]);
      for (int b = 0; b < NB; ++b) acc[t][b] = f8_fma(input, weights[b], acc[t][b]);
    }
  }
}

template <int NT, int NB>
static inline void int8_tile(const Matrix& w, const uint8_t* block, const Inputs<NT>& x, F8 (&acc)[NT][NB]) {
  const int64_t stride = w.block_bytes(), groups = w.groups();
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* base = block + g * kInt8Group;
    if (NB == kNarrow && x.first)  // the same place in the next tile
      for (int b = 0; b < NB; ++b) prefetch(base + (NB + b) * stride, kInt8Group);
    I8 dot[NT][NB];
    for (int t = 0; t < NT; ++t)
      for (int b = 0; b < NB; ++b) dot[t][b] = i8_zero();
#pragma GCC unroll kUnroll
    for (int j = 0; j < 16; ++j) {
      I8 weights[NB];
      for (int b = 0; b < NB; ++b) weights[b] = i8_load_s16(base + b * stride + 16 + 16 * j);
      for (int t = 0; t < NT; ++t) {
        const I8 input = i8_broadcast4(x.row[t] + (g * kGroup + 2 * j) * 2);
        for (int b = 0; b < NB; ++b) i8_dot_s16(dot[t][b], weights[b], input);
      }
    }
    for (int b = 0; b < NB; ++b) {
      F8 scales = f8_load_f16(reinterpret_cast<const uint16_t*>(base + b * stride));
      for (int t = 0; t < NT; ++t) {
        float scale = reinterpret_cast<const float*>(x.row[t] + x.layout.scales())[g];
        acc[t][b] = f8_fma(i8_to_f8(dot[t][b]), f8_mul(scales, f8_set1(scale)), acc[t][b]);
      }
    }
  }
}

template <int NT, int NB>
static inline void int4_tile(const Matrix& w, const uint8_t* block, const Inputs<NT>& x, F8 (&acc)[NT][NB]) {
  const int64_t stride = 2 * w.block_bytes(), groups = w.groups();
  for (int64_t g = 0; g < groups; ++g) {
    if (NB == kNarrow && x.first) prefetch(block + g * kInt4Group + 1024, kInt4Group);
    const uint8_t* base[NB];
    I8 dot[NT][NB];
    for (int b = 0; b < NB; ++b) base[b] = block + b / 2 * stride + g * kInt4Group;
    for (int t = 0; t < NT; ++t)
      for (int b = 0; b < NB; ++b) dot[t][b] = i8_zero();
#pragma GCC unroll kUnroll
    for (int j = 0; j < 8; ++j) {
      I8 weights[NB];
      for (int b = 0; b < NB; ++b) {
        const I8 both = i8_load(base[b] + 48 + b % 2 * 128 + j % 4 * 32);
        weights[b] = j < 4 ? i8_low_nibbles(both) : i8_high_nibbles(both);
      }
      for (int t = 0; t < NT; ++t) {
        const I8 input = i8_broadcast4(x.row[t] + g * kGroup + 4 * j);
        for (int b = 0; b < NB; ++b) i8_dot_u4(dot[t][b], weights[b], input);
      }
    }
    for (int b = 0; b < NB; ++b) {
      F8 scales = f8_load_f16(reinterpret_cast<const uint16_t*>(base[b] + b % 2 * 16));
      I8 zero = i8_load_u8(base[b] + 32 + b % 2 * 8);
      for (int t = 0; t < NT; ++t) {
        I8 sum = i8_set1(reinterpret_cast<const int32_t*>(x.row[t] + x.layout.sums())[g]);
        float scale = reinterpret_cast<const float*>(x.row[t] + x.layout.scales())[g] * 0.0625f;
        F8 value = i8_to_f8(i8_sub_zero(i8_sum_u4(dot[t][b]), zero, sum));
        acc[t][b] = f8_fma(value, f8_mul(scales, f8_set1(scale)), acc[t][b]);
      }
    }
  }
}

static inline void store_rows(float* y, F8 value, int64_t rows) {
  if (rows >= kRows) return f8_store(y, value);
  float lanes[8];
  f8_store(lanes, value);
  for (int64_t i = 0; i < rows; ++i) y[i] = lanes[i];
}

// The first `rows` of eight numbers.
static inline F8 load_rows(const float* p, int64_t rows) {
  if (rows >= kRows) return f8_load(p);
  float lanes[8] = {};
  for (int64_t i = 0; i < rows; ++i) lanes[i] = p[i];
  return f8_load(lanes);
}

// A block of gates and one of ups, joined. `at`: which of the F gates is the first. A function of its own, as it is
// called once per output and would be inlined in every tile.
__attribute__((noinline)) static F8 join(const GemmArgs& a, F8 gate, F8 up, int64_t at) {
  if (a.bias) {
    const int64_t ffn = a.y_stride;
    gate = f8_add(gate, load_rows(a.bias + at, ffn - at));
    up = f8_add(up, load_rows(a.bias + ffn + at, ffn - at));
  }
  F8 x = gate;  // of the sigmoid
  if (a.epilogue == Epilogue::gelu_tanh) {
    // (1 + tanh(u)) / 2 is sigmoid(2u), here with u = sqrt(2 / pi) (gate + 0.044715 gate^3).
    const F8 cubic = f8_fma(f8_mul(gate, gate), f8_set1(0.044715f), f8_set1(1.0f));
    x = f8_mul(f8_mul(f8_set1(1.5957691216f), gate), cubic);
  } else if (a.epilogue == Epilogue::clamped_swiglu) {
    const F8 most = f8_set1(a.limit), least = f8_set1(-a.limit);
    gate = f8_min(most, gate);  // in this order, so that what is no number stays none
    up = f8_add(f8_min(most, f8_max(least, up)), f8_set1(1.0f));
    x = f8_mul(f8_set1(1.702f), gate);
  }
  return f8_mul(f8_mul(gate, f8_sigmoid(x)), up);
}

template <Format F, int NT, int NB>
static void tile(const GemmArgs& a, int64_t token, int64_t block) {
  Inputs<NT> x{{}, RowLayout(a.w.cols, F), token == 0};
  for (int t = 0; t < NT; ++t)
    x.row[t] = a.x + (a.x_rows ? a.x_rows[token + t] : token + t) * a.x_stride;
  F8 acc[NT][NB];
  for (int t = 0; t < NT; ++t)
    for (int b = 0; b < NB; ++b) acc[t][b] = f8_zero();

  const uint8_t* data = a.w.block(block);
  if constexpr (F == Format::int8) int8_tile<NT, NB>(a.w, data, x, acc);
  else if constexpr (F == Format::int4) int4_tile<NT, NB>(a.w, data, x, acc);
  else float_tile<F, NT, NB>(a.w, data, x, acc);

  for (int t = 0; t < NT; ++t) {
    int64_t row = (a.y_rows ? a.y_rows[token + t] : token + t) * a.y_stride;
    if (a.epilogue == Epilogue::store) {
      for (int b = 0; b < NB; ++b) {
        int64_t at = (block + b) * kRows, rows = a.w.rows - at;
        store_rows(a.y + row + at, a.bias ? f8_add(acc[t][b], load_rows(a.bias + at, rows)) : acc[t][b], rows);
      }
    } else {
      for (int b = 0; b + 1 < NB; b += 2) {
        int64_t at = (block + b) / 2 * kRows;
        store_rows(a.y + row + at, join(a, acc[t][b], acc[t][b + 1], at), a.y_stride - at);
      }
    }
  }
}

template <Format F, int NB>
static void all_tokens(const GemmArgs& a, int64_t block) {
  int64_t token = 0;
  for (; token + kTokens <= a.count; token += kTokens) tile<F, kTokens, NB>(a, token, block);
  switch (a.count - token) {
    case 3: tile<F, 3, NB>(a, token, block); break;
    case 2: tile<F, 2, NB>(a, token, block); break;
    case 1: tile<F, 1, NB>(a, token, block); break;
  }
}

template <Format F>
static void gemm_of(const GemmArgs& a) {
  constexpr int kWide = wide(F);
  int64_t block = a.block_begin;
  if (a.count == 1)
    for (; block + kWide <= a.block_end; block += kWide) tile<F, 1, kWide>(a, 0, block);
  if (F == Format::int8 && a.count == 2)
    for (; block + kWide <= a.block_end; block += kWide) tile<F, 2, kWide>(a, 0, block);
  for (; block + kNarrow <= a.block_end; block += kNarrow) all_tokens<F, kNarrow>(a, block);
  if constexpr (F != Format::int4)
    for (; block < a.block_end; ++block) all_tokens<F, 1>(a, block);
}

static void gemm(const GemmArgs& a) {
  switch (a.w.format) {
    case Format::f32: return gemm_of<Format::f32>(a);
    case Format::bf16: return gemm_of<Format::bf16>(a);
    case Format::f16: return gemm_of<Format::f16>(a);
    case Format::int8: return gemm_of<Format::int8>(a);
    case Format::int4: return gemm_of<Format::int4>(a);
  }
}
