// The dense operations of a program, and how each is divided among the members of the team.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "program.h"

namespace toptwo {

namespace {

constexpr int64_t kTokensAtOnce = 8;  // of element-wise work
constexpr int64_t kChunkBlocks = 8;   // of matrix rows: 64 outputs

int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Call f(token) for every token, in chunks.
template <class F>
void for_tokens(Team::Member& member, int64_t count, F&& f) {
  member.for_each(pieces(count, kTokensAtOnce), [&](int64_t i) {
    for (int64_t t = i * kTokensAtOnce; t < std::min(count, (i + 1) * kTokensAtOnce); ++t) f(t);
  });
}

class Embed : public Instruction {
 public:
  Embed(Matrix table, float* out) : table_(table), out_(out) {}
  void run(Context& c) const override {
    for_tokens(c.member, c.step.num_tokens,
               [&](int64_t t) { c.kernels.unpack_row(table_, c.step.ids[t], out_ + t * table_.cols); });
  }

 private:
  Matrix table_;
  float* out_;
};

class Norm : public Instruction {
 public:
  Norm(bool centered, const float* x, const float* weight, float eps, int64_t size, float* out, Extent extent)
      : centered_(centered), x_(x), weight_(weight), eps_(eps), size_(size), out_(out), extent_(extent) {}
  void run(Context& c) const override {
    auto norm = centered_ ? c.kernels.layer_norm : c.kernels.rms_norm;
    for_tokens(c.member, c.count(extent_),
               [&](int64_t t) { norm(x_ + t * size_, weight_, eps_, size_, out_ + t * size_); });
  }

 private:
  bool centered_;
  const float *x_, *weight_;
  float eps_;
  int64_t size_;
  float* out_;
  Extent extent_;
};

class Add : public Instruction {
 public:
  Add(const float* x, float* y, int64_t size) : x_(x), y_(y), size_(size) {}
  void run(Context& c) const override {
    for_tokens(c.member, c.step.num_tokens,
               [&](int64_t t) { c.kernels.add_scaled(y_ + t * size_, x_ + t * size_, 1.0f, size_); });
  }

 private:
  const float* x_;
  float* y_;
  int64_t size_;
};

class Select : public Instruction {
 public:
  Select(const float* x, int64_t size, float* out) : x_(x), size_(size), out_(out) {}
  void run(Context& c) const override {
    for_tokens(c.member, c.step.num_selected, [&](int64_t s) {
      std::memcpy(out_ + s * size_, x_ + c.step.selected[s] * size_, size_t(size_) * 4);
    });
  }

 private:
  const float* x_;
  int64_t size_;
  float* out_;
};

class Linear : public Instruction {
 public:
  Linear(const float* x, Matrix w, float* out, Extent extent) : x_(x), w_(w), out_(out), extent_(extent) {}

  void run(Context& c) const override {
    const int64_t count = c.count(extent_);
    const uint8_t* x = reinterpret_cast<const uint8_t*>(x_);
    int64_t stride = w_.cols * 4;
    if (is_quantized(w_.format)) {
      stride = RowLayout(w_.cols, w_.format).bytes();
      for_tokens(c.member, count, [&](int64_t t) {
        c.kernels.quantize_row(x_ + t * w_.cols, w_.cols, w_.format, c.scratch + t * stride);
      });
      x = c.scratch;
    }
    c.member.for_each(pieces(w_.blocks(), kChunkBlocks), [&](int64_t i) {
      c.kernels.gemm({w_, i * kChunkBlocks, std::min(w_.blocks(), (i + 1) * kChunkBlocks), x, stride, nullptr, count,
                      out_, w_.rows, nullptr, Epilogue::store});
    });
  }
  int64_t scratch_bytes(int64_t tokens) const override { return tokens * RowLayout(w_.cols, w_.format).bytes(); }

 private:
  const float* x_;
  Matrix w_;
  float* out_;
  Extent extent_;
};

class Attention : public Instruction {
 public:
  Attention(float* qkv, const float* cos, const float* sin, void* k, void* v, Format kv_format, AttentionShape shape,
            float* out)
      : qkv_(qkv), cos_(cos), sin_(sin), k_(k), v_(v), kv_format_(kv_format), shape_(shape), out_(out) {}

  void run(Context& c) const override {
    for_tokens(c.member, c.step.num_tokens, [&](int64_t t) { turn_and_store(c, t); });
    const int64_t tiles = int64_t(c.step.tiles.size());
    c.member.for_each(tiles * shape_.num_kv_heads, [&](int64_t i) {
      attend(c, c.step.tiles[size_t(i / shape_.num_kv_heads)], i % shape_.num_kv_heads);
    });
  }

  int64_t own_floats() const override {
    const int64_t queries = Step::kTile * per_kv_head();
    return queries * (2 * shape_.dim + 2) + attend_scratch(shape_.dim, queries);
  }

 private:
  int64_t per_kv_head() const { return shape_.num_heads / shape_.num_kv_heads; }
  int64_t width() const { return (shape_.num_heads + 2 * shape_.num_kv_heads) * shape_.dim; }

  void turn_and_store(Context& c, int64_t t) const {
    const auto [num_heads, num_kv_heads, dim, scale] = shape_;
    float* row = qkv_ + t * width();
    const int64_t position = c.step.positions[t], slot = c.step.slots[t];
    const RopeArgs angles{cos_ + position * dim / 2, sin_ + position * dim / 2, dim};
    for (int64_t head = 0; head < num_heads + num_kv_heads; ++head) c.kernels.rope(row + head * dim, angles);
    const int64_t bytes = dim * kSlots * (kv_format_ == Format::f32 ? 4 : 2);
    for (int64_t head = 0; head < num_kv_heads; ++head) {
      const int64_t at = (slot / kSlots * num_kv_heads + head) * bytes;
      const float* k = row + (num_heads + head) * dim;
      c.kernels.store_k(k, dim, kv_format_, static_cast<uint8_t*>(k_) + at, slot % kSlots);
      c.kernels.store_v(k + num_kv_heads * dim, dim, kv_format_, static_cast<uint8_t*>(v_) + at, slot % kSlots);
    }
  }

  // All queries of a tile that read one KV head: the tile's tokens, each with its group of heads.
  void attend(Context& c, const Step::QueryTile& tile, int64_t kv_head) const {
    const int64_t dim = shape_.dim, group = per_kv_head(), count = tile.count * group;
    float *q = c.own, *out = q + count * dim, *scratch = out + count * dim;
    int64_t* limits = reinterpret_cast<int64_t*>(scratch);
    const int64_t last = c.step.query_starts[tile.row + 1];
    for (int64_t t = 0; t < tile.count; ++t) {
      const float* heads = qkv_ + (tile.first + t) * width() + kv_head * group * dim;
      c.kernels.scale(heads, shape_.scale, group * dim, q + t * group * dim);
      // The row's last query sees the whole context, the one before it one token less.
      for (int64_t g = 0; g < group; ++g)
        limits[t * group + g] = c.step.context_lens[tile.row] - (last - 1 - tile.first - t);
    }
    c.kernels.attend({q, out, limits, count, k_, v_, kv_format_, c.step.block_tables + tile.row * c.step.table_width,
                      kv_head, shape_.num_kv_heads, dim, scratch + 2 * count});
    for (int64_t t = 0; t < tile.count; ++t)
      std::memcpy(out_ + ((tile.first + t) * shape_.num_heads + kv_head * group) * dim, out + t * group * dim,
                  size_t(group * dim) * 4);
  }

  float* qkv_;
  const float *cos_, *sin_;
  void *k_, *v_;
  Format kv_format_;
  AttentionShape shape_;
  float* out_;
};

}  // namespace

InstructionPtr make_embed(Matrix table, float* out) { return std::make_unique<Embed>(table, out); }

InstructionPtr make_norm(bool centered, const float* x, const float* weight, float eps, int64_t size, float* out,
                         Extent extent) {
  return std::make_unique<Norm>(centered, x, weight, eps, size, out, extent);
}

InstructionPtr make_select(const float* x, int64_t size, float* out) {
  return std::make_unique<Select>(x, size, out);
}

InstructionPtr make_add(const float* x, float* y, int64_t size) { return std::make_unique<Add>(x, y, size); }

InstructionPtr make_linear(const float* x, Matrix w, float* out, Extent extent) {
  return std::make_unique<Linear>(x, w, out, extent);
}

InstructionPtr make_attention(float* qkv, const float* cos, const float* sin, void* k, void* v, Format kv_format,
                              AttentionShape shape, float* out) {
  return std::make_unique<Attention>(qkv, cos, sin, k, v, kv_format, shape, out);
}

}  // namespace toptwo
