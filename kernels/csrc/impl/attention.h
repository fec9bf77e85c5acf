// Attention over the paged cache with a running maximum (FlashAttention, arXiv 2205.14135).
//
// A cache block of 16 tokens is one step of the softmax, aligned to the start of the sequence. Keys lie
// transposed, so that lanes are tokens. Every query takes the same steps in the same order however
// many queries share the tile: decoding and chunks of a prompt agree bit by bit. A query with a window
// starts at the block where that begins.

// The D x 16 keys or 16 x D values of one cache block and head.
template <Format F>
static inline F8 kv_load(const void* tile, int64_t i) {
  if constexpr (F == Format::f32) return f8_load(static_cast<const float*>(tile) + i);
  const uint16_t* half = static_cast<const uint16_t*>(tile) + i;
  return F == Format::f16 ? f8_load_f16(half) : f8_load_bf16(half);
}

// What one query has seen so far: the largest score, and the sum of the weights relative to it.
struct Softmax {
  float most, sum;
};

// Which of a block's tokens a query sees.
struct Span {
  int64_t from, to;
};

// Scores of NQ queries for the 16 tokens of a block.
template <Format F, int NQ>
static inline void score(const float* q, int64_t dim, const void* k, F8 (&s)[NQ][2]) {
  for (int i = 0; i < NQ; ++i) s[i][0] = s[i][1] = f8_zero();
  for (int64_t d = 0; d < dim; ++d) {
    const F8 low = kv_load<F>(k, d * kSlots), high = kv_load<F>(k, d * kSlots + 8);
    for (int i = 0; i < NQ; ++i) {
      const F8 x = f8_set1(q[i * dim + d]);
      s[i][0] = f8_fma(x, low, s[i][0]);
      s[i][1] = f8_fma(x, high, s[i][1]);
    }
  }
}

// 8 NV dimensions of the weighted sum of values, from d on. Values of tokens that are not seen may be anything: they
// are not touched.
template <Format F, int NV>
static inline void add_values(const float* weights, Span seen, const void* v, int64_t dim, int64_t d, float shrink,
                              float* out) {
  F8 acc[NV];
  for (int i = 0; i < NV; ++i) acc[i] = f8_mul(f8_load(out + d + 8 * i), f8_set1(shrink));
  for (int64_t j = seen.from; j < seen.to; ++j) {
    const F8 w = f8_set1(weights[j]);
    for (int i = 0; i < NV; ++i) acc[i] = f8_fma(w, kv_load<F>(v, j * dim + d + 8 * i), acc[i]);
  }
  for (int i = 0; i < NV; ++i) f8_store(out + d + 8 * i, acc[i]);
}

// One softmax step of one query over the tokens that it sees of a block; out is not normalised yet.
template <Format F>
static inline void absorb(F8 (&s)[2], Span seen, const void* v, int64_t dim, Softmax& state, float* out) {
  float weights[kSlots];
  auto hide = [&](float with) {
    for (int64_t j = 0; j < seen.from; ++j) weights[j] = with;
    for (int64_t j = seen.to; j < kSlots; ++j) weights[j] = with;
  };
  if (seen.from > 0 || seen.to < kSlots) {
    f8_store(weights, s[0]);
    f8_store(weights + 8, s[1]);
    hide(-INFINITY);
    s[0] = f8_load(weights);
    s[1] = f8_load(weights + 8);
  }
  float most = max_lanes(f8_max(s[0], s[1]));
  most = most > state.most ? most : state.most;
  f8_store(weights, f8_exp(f8_sub(s[0], f8_set1(most))));
  f8_store(weights + 8, f8_exp(f8_sub(s[1], f8_set1(most))));
  hide(0.0f);
  // e^0 is 1 to the last bit, so that most blocks need no exponential here.
  const float shrink = most == state.most ? 1.0f : state.most == -INFINITY ? 0.0f : exp1(state.most - most);
  state.most = most;
  state.sum = fma1(state.sum, shrink, sum_lanes(f8_add(f8_load(weights), f8_load(weights + 8))));
  int64_t d = 0;
  for (; d + 64 <= dim; d += 64) add_values<F, 8>(weights, seen, v, dim, d, shrink, out);
  for (; d + 32 <= dim; d += 32) add_values<F, 4>(weights, seen, v, dim, d, shrink, out);
  for (; d < dim; d += 8) add_values<F, 1>(weights, seen, v, dim, d, shrink, out);
}

// The first token that a query sees.
static inline int64_t first_seen(const AttendArgs& a, int64_t query) {
  return a.window && a.limits[query] > a.window ? a.limits[query] - a.window : 0;
}

template <Format F, int NQ>
static inline void queries(const AttendArgs& a, int64_t first, int64_t start, const void* k, const void* v,
                           Softmax* states) {
  F8 s[NQ][2];
  score<F, NQ>(a.q + first * a.dim, a.dim, k, s);
  if (a.soft_cap > 0.0f) {
    const F8 cap = f8_set1(a.soft_cap);
    for (int i = 0; i < NQ; ++i)
      for (F8& x : s[i]) x = f8_mul(cap, f8_tanh(f8_div(x, cap)));
  }
  for (int i = 0; i < NQ; ++i) {
    const int64_t from = first_seen(a, first + i) - start, to = a.limits[first + i] - start;
    absorb<F>(s[i], {from > 0 ? from : 0, to < kSlots ? to : kSlots}, v, a.value_dim, states[first + i],
              a.out + (first + i) * a.value_dim);
  }
}

// The queries from `first` to `end` over one block.
template <Format F>
static void block_step(const AttendArgs& a, int64_t first, int64_t end, int64_t start, const void* k, const void* v,
                       Softmax* states) {
  int64_t i = first;
  for (; i + 4 <= end; i += 4) queries<F, 4>(a, i, start, k, v, states);
  switch (end - i) {
    case 3: return queries<F, 3>(a, i, start, k, v, states);
    case 2: return queries<F, 2>(a, i, start, k, v, states);
    case 1: return queries<F, 1>(a, i, start, k, v, states);
  }
}

// Many queries share a block: its numbers are widened once.
template <Format F>
static const float* widen(const void* tile, int64_t size, float* room) {
  if constexpr (F == Format::f32) return static_cast<const float*>(tile);
  for (int64_t i = 0; i < size; i += 8) f8_store(room + i, kv_load<F>(tile, i));
  return room;
}

// The values that are the first `dim` dimensions of a block's keys.
static const float* values_of(const float* k, int64_t dim, float* room) {
  for (int64_t d = 0; d < dim; d += 8)
    for (int64_t j = 0; j < kSlots; j += 8) {
      F8 square[8];
      for (int i = 0; i < 8; ++i) square[i] = f8_load(k + (d + i) * kSlots + j);
      f8_transpose(square);
      for (int i = 0; i < 8; ++i) f8_store(room + (j + i) * dim + d, square[i]);
    }
  return room;
}

template <Format F>
static void attend_to(const AttendArgs& a) {
  constexpr int64_t bytes = F == Format::f32 ? 4 : 2;
  const int64_t k_size = a.dim * kSlots, v_size = a.value_dim * kSlots;
  float *k_room = a.scratch, *v_room = k_room + k_size;
  Softmax* states = reinterpret_cast<Softmax*>(v_room + v_size);
  // A sink is a score that comes before all others.
  for (int64_t i = 0; i < a.count; ++i)
    states[i] = a.sinks ? Softmax{a.sinks[i % a.heads], 1.0f} : Softmax{-INFINITY, 0.0f};
  for (int64_t i = 0; i < a.count * a.value_dim; ++i) a.out[i] = 0.0f;
  const int64_t limit = a.limits[a.count - 1];
  auto tile = [&](const void* cache, int64_t size, int64_t block) {
    return static_cast<const uint8_t*>(cache) + (a.blocks[block] * a.num_heads + a.head) * size * bytes;
  };
  // Queries before `first` have seen all of theirs; those from `end` on begin later.
  int64_t first = 0, end = 0;
  for (int64_t block = first_seen(a, 0) / kSlots, start = block * kSlots; start < limit; start += kSlots, ++block) {
    const uint8_t *k = tile(a.k, k_size, block), *v = a.v ? tile(a.v, v_size, block) : nullptr;
    if (start + kSlots < limit) {  // blocks lie apart: no processor guesses where the next one is
      prefetch(tile(a.k, k_size, block + 1), k_size * bytes);
      if (v) prefetch(tile(a.v, v_size, block + 1), v_size * bytes);
    }
    while (a.limits[first] <= start) ++first;
    while (end < a.count && first_seen(a, end) < start + kSlots) ++end;
    if (v && end - first <= 4) {
      block_step<F>(a, first, end, start, k, v, states);
    } else {
      const float* keys = widen<F>(k, k_size, k_room);
      const float* values = v ? widen<F>(v, v_size, v_room) : values_of(keys, a.value_dim, v_room);
      block_step<Format::f32>(a, first, end, start, keys, values, states);
    }
  }
  for (int64_t i = 0; i < a.count; ++i)
    scale(a.out + i * a.value_dim, 1.0f / states[i].sum, a.value_dim, a.out + i * a.value_dim);
}

static void attend(const AttendArgs& a) {
  switch (a.kv_format) {
    case Format::f32: return attend_to<Format::f32>(a);
    case Format::f16: return attend_to<Format::f16>(a);
    default: return attend_to<Format::bf16>(a);
  }
}

static void store_k(const float* k, int64_t dim, Format format, void* head, int64_t slot) {
  for (int64_t d = 0; d < dim; ++d) {
    int64_t at = d * kSlots + slot;
    if (format == Format::f32) static_cast<float*>(head)[at] = k[d];
    else static_cast<uint16_t*>(head)[at] = format == Format::f16 ? to_f16(k[d]) : to_bf16(k[d]);
  }
}

static void store_v(const float* v, int64_t dim, Format format, void* head, int64_t slot) {
  for (int64_t d = 0; d < dim; ++d) {
    int64_t at = slot * dim + d;
    if (format == Format::f32) static_cast<float*>(head)[at] = v[d];
    else static_cast<uint16_t*>(head)[at] = format == Format::f16 ? to_f16(v[d]) : to_bf16(v[d]);
  }
}
