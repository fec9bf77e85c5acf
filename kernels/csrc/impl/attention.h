// Attention over the paged cache with a running maximum (FlashAttention, arXiv 2205.14135).
//
// A cache block of 16 tokens is one step of the softmax, aligned to the start of the sequence. Keys lie
// transposed, so that lanes are tokens. Every query takes the same steps in the same order however
// many queries share the tile: decoding and chunks of a prompt agree bit by bit.

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

// One softmax step of one query over the first `seen` tokens of a block; out is not normalised yet.
template <Format F>
static inline void absorb(F8 (&s)[2], int64_t seen, const void* v, int64_t dim, Softmax& state, float* out) {
  float weights[kSlots];
  if (seen < kSlots) {
    f8_store(weights, s[0]);
    f8_store(weights + 8, s[1]);
    for (int64_t j = seen; j < kSlots; ++j) weights[j] = -INFINITY;
    s[0] = f8_load(weights);
    s[1] = f8_load(weights + 8);
  }
  float most = max_lanes(f8_max(s[0], s[1]));
  most = most > state.most ? most : state.most;
  f8_store(weights, f8_exp(f8_sub(s[0], f8_set1(most))));
  f8_store(weights + 8, f8_exp(f8_sub(s[1], f8_set1(most))));
  for (int64_t j = seen; j < kSlots; ++j) weights[j] = 0.0f;
  // e^0 is 1 to the last bit, so that most blocks need no exponential here.
  const float shrink = most == state.most ? 1.0f : state.most == -INFINITY ? 0.0f : exp1(state.most - most);
  state.most = most;
  state.sum = fma1(state.sum, shrink, sum_lanes(f8_add(f8_load(weights), f8_load(weights + 8))));
  // Values behind the last seen token may be anything: they are not touched.
  int64_t d = 0;
  for (; d + 32 <= dim; d += 32) {
    F8 acc[4];
    for (int i = 0; i < 4; ++i) acc[i] = f8_mul(f8_load(out + d + 8 * i), f8_set1(shrink));
    for (int64_t j = 0; j < seen; ++j) {
      const F8 w = f8_set1(weights[j]);
      for (int i = 0; i < 4; ++i) acc[i] = f8_fma(w, kv_load<F>(v, j * dim + d + 8 * i), acc[i]);
    }
    for (int i = 0; i < 4; ++i) f8_store(out + d + 8 * i, acc[i]);
  }
  for (; d < dim; d += 8) {
    F8 acc = f8_mul(f8_load(out + d), f8_set1(shrink));
    for (int64_t j = 0; j < seen; ++j) acc = f8_fma(f8_set1(weights[j]), kv_load<F>(v, j * dim + d), acc);
    f8_store(out + d, acc);
  }
}

template <Format F, int NQ>
static inline void queries(const AttendArgs& a, int64_t first, int64_t start, const void* k, const void* v,
                           Softmax* states) {
  F8 s[NQ][2];
  score<F, NQ>(a.q + first * a.dim, a.dim, k, s);
  for (int i = 0; i < NQ; ++i) {
    const int64_t seen = a.limits[first + i] - start;
    absorb<F>(s[i], seen < kSlots ? seen : kSlots, v, a.dim, states[first + i], a.out + (first + i) * a.dim);
  }
}

// All queries from `first` on over one block.
template <Format F>
static void block_step(const AttendArgs& a, int64_t first, int64_t start, const void* k, const void* v,
                       Softmax* states) {
  int64_t i = first;
  for (; i + 4 <= a.count; i += 4) queries<F, 4>(a, i, start, k, v, states);
  switch (a.count - i) {
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

template <Format F>
static void attend_to(const AttendArgs& a) {
  const int64_t size = a.dim * kSlots, bytes = size * (F == Format::f32 ? 4 : 2);
  float *k_room = a.scratch, *v_room = k_room + size;
  Softmax* states = reinterpret_cast<Softmax*>(v_room + size);
  for (int64_t i = 0; i < a.count; ++i) states[i] = {-INFINITY, 0.0f};
  for (int64_t i = 0; i < a.count * a.dim; ++i) a.out[i] = 0.0f;
  int64_t first = 0;
  const int64_t limit = a.limits[a.count - 1];
  auto tile = [&](const void* cache, int64_t block) {
    return static_cast<const uint8_t*>(cache) + (a.blocks[block] * a.num_heads + a.head) * bytes;
  };
  for (int64_t start = 0, block = 0; start < limit; start += kSlots, ++block) {
    const uint8_t *k = tile(a.k, block), *v = tile(a.v, block);
    if (start + kSlots < limit) {  // blocks lie apart: no processor guesses where the next one is
      prefetch(tile(a.k, block + 1), bytes);
      prefetch(tile(a.v, block + 1), bytes);
    }
    while (a.limits[first] <= start) ++first;  // queries that have seen all of theirs
    if (a.count - first <= 4) block_step<F>(a, first, start, k, v, states);
    else block_step<Format::f32>(a, first, start, widen<F>(k, size, k_room), widen<F>(v, size, v_room), states);
  }
  for (int64_t i = 0; i < a.count; ++i) scale(a.out + i * a.dim, 1.0f / states[i].sum, a.dim, a.out + i * a.dim);
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
