// Attention as operations of a program: over keys and values of several heads, and over latent vectors.

#include <algorithm>
#include <cstring>

#include "program.h"

namespace toptwo {

namespace {

// Query heads that read the same keys and values: the part of a layer that one member takes of a tile.
struct Heads {
  const float* q;     // of the step's first token
  int64_t q_width;    // floats of a token in q
  float* out;
  int64_t out_width;
  int64_t count;
};

int64_t own_floats_for(int64_t dim, int64_t value_dim, int64_t queries) {
  return queries * (dim + value_dim + 2) + attend_scratch(dim, value_dim, queries);
}

// The queries of a tile's tokens, each with `heads`; `a` says the rest of what is not the tile's.
void attend(Instruction::Context& c, const Step::QueryTile& tile, const Heads& heads, float scale, AttendArgs a) {
  a.count = tile.count * heads.count, a.heads = heads.count;
  float *q = c.own, *out = q + a.count * a.dim, *rest = out + a.count * a.value_dim;
  int64_t* limits = reinterpret_cast<int64_t*>(rest);
  const int64_t last = c.step.query_starts[tile.row + 1], size = heads.count * a.dim;
  for (int64_t t = 0; t < tile.count; ++t) {
    c.kernels.scale(heads.q + (tile.first + t) * heads.q_width, scale, size, q + t * size);
    // The row's last query sees the whole context, the one before it one token less.
    std::fill_n(limits + t * heads.count, heads.count, c.step.context_lens[tile.row] - (last - 1 - tile.first - t));
  }
  a.q = q, a.out = out, a.limits = limits, a.scratch = rest + 2 * a.count;
  a.blocks = c.step.block_tables + tile.row * c.step.table_width;
  c.kernels.attend(a);
  const int64_t out_size = heads.count * a.value_dim;
  for (int64_t t = 0; t < tile.count; ++t)
    std::memcpy(heads.out + (tile.first + t) * heads.out_width, out + t * out_size, size_t(out_size) * 4);
}

class Attention : public Instruction {
 public:
  Attention(float* qkv, RopeTables rope, Cache kv, AttentionSpec spec, float* out)
      : qkv_(qkv), rope_(rope), kv_(kv), spec_(spec), out_(out) {}

  void run(Context& c) const override {
    c.for_tokens(c.step.num_tokens, [&](int64_t t) { turn_and_store(c, t); });
    const int64_t tiles = int64_t(c.step.tiles.size()), kv_heads = spec_.num_kv_heads, dim = spec_.dim;
    c.member.for_each(tiles * kv_heads, [&](int64_t i) {
      const int64_t head = i % kv_heads, first = head * per_kv_head();
      const Heads heads{qkv_ + first * dim, width(), out_ + first * dim, spec_.num_heads * dim, per_kv_head()};
      AttendArgs a{};
      a.k = kv_.k, a.v = kv_.v, a.kv_format = kv_.format;
      a.head = head, a.num_heads = kv_heads, a.dim = a.value_dim = dim;
      a.window = spec_.window, a.soft_cap = spec_.soft_cap, a.sinks = spec_.sinks ? spec_.sinks + first : nullptr;
      attend(c, c.step.tiles[size_t(i / kv_heads)], heads, spec_.scale, a);
    });
  }
  int64_t own_floats() const override { return own_floats_for(spec_.dim, spec_.dim, Step::kTile * per_kv_head()); }

 private:
  int64_t per_kv_head() const { return spec_.num_heads / spec_.num_kv_heads; }
  int64_t width() const { return (spec_.num_heads + 2 * spec_.num_kv_heads) * spec_.dim; }

  void turn_and_store(Context& c, int64_t t) const {
    const int64_t num_heads = spec_.num_heads, num_kv_heads = spec_.num_kv_heads, dim = spec_.dim;
    float* row = qkv_ + t * width();
    const RopeArgs angles = rope_.at(c.step.positions[t]);
    for (int64_t head = 0; head < num_heads + num_kv_heads; ++head) c.kernels.rope(row + head * dim, angles);
    const int64_t slot = c.step.slots[t];
    for (int64_t head = 0; head < num_kv_heads; ++head) {
      const int64_t at = (slot / kSlots * num_kv_heads + head) * dim * kSlots * kv_.number_bytes();
      const float* k = row + (num_heads + head) * dim;
      c.kernels.store_k(k, dim, kv_.format, static_cast<uint8_t*>(kv_.k) + at, slot % kSlots);
      c.kernels.store_v(k + num_kv_heads * dim, dim, kv_.format, static_cast<uint8_t*>(kv_.v) + at, slot % kSlots);
    }
  }

  float* qkv_;
  RopeTables rope_;
  Cache kv_;
  AttentionSpec spec_;
  float* out_;
};

// One KV head, whose values are the first C dimensions of its keys, serves all query heads.
class LatentAttention : public Instruction {
 public:
  LatentAttention(float* q, float* latents, RopeTables rope, Cache kv, LatentSpec spec, float* out)
      : q_(q), latents_(latents), rope_(rope), kv_(kv), spec_(spec), out_(out) {}

  void run(Context& c) const override {
    const int64_t num_heads = spec_.num_heads, dim = this->dim();
    c.for_tokens(c.step.num_tokens, [&](int64_t t) { turn_and_store(c, t); });
    const int64_t tiles = int64_t(c.step.tiles.size()), parts = (num_heads + heads_at_once() - 1) / heads_at_once();
    c.member.for_each(tiles * parts, [&](int64_t i) {
      const int64_t first = i % parts * heads_at_once(), count = std::min(heads_at_once(), num_heads - first);
      const Heads heads{q_ + first * dim, num_heads * dim, out_ + first * spec_.latent_dim,
                        num_heads * spec_.latent_dim, count};
      AttendArgs a{};
      a.k = kv_.k, a.kv_format = kv_.format;
      a.num_heads = 1, a.dim = dim, a.value_dim = spec_.latent_dim;
      attend(c, c.step.tiles[size_t(i / parts)], heads, spec_.scale, a);
    });
  }
  int64_t own_floats() const override {
    return own_floats_for(dim(), spec_.latent_dim, Step::kTile * heads_at_once());
  }

 private:
  int64_t dim() const { return spec_.latent_dim + spec_.rope_dim; }
  // Each part of the heads widens the cache for itself. Eight share that work well and still fit the processor's
  // own cache together with a tile's tokens; fewer, so that a single token is work for four members.
  int64_t heads_at_once() const { return std::min<int64_t>(8, (spec_.num_heads + 3) / 4); }

  void turn_and_store(Context& c, int64_t t) const {
    const RopeArgs angles = rope_.at(c.step.positions[t]);
    float *q = q_ + t * spec_.num_heads * dim(), *latent = latents_ + t * dim();
    for (int64_t head = 0; head < spec_.num_heads; ++head)
      c.kernels.rope(q + head * dim() + spec_.latent_dim, angles);
    c.kernels.rope(latent + spec_.latent_dim, angles);
    const int64_t slot = c.step.slots[t], at = slot / kSlots * dim() * kSlots * kv_.number_bytes();
    c.kernels.store_k(latent, dim(), kv_.format, static_cast<uint8_t*>(kv_.k) + at, slot % kSlots);
  }

  float *q_, *latents_;
  RopeTables rope_;
  Cache kv_;
  LatentSpec spec_;
  float* out_;
};

}  // namespace

InstructionPtr make_attention(float* qkv, RopeTables rope, Cache kv, AttentionSpec spec, float* out) {
  return std::make_unique<Attention>(qkv, rope, kv, spec, out);
}

InstructionPtr make_latent_attention(float* q, float* latents, RopeTables rope, Cache kv, LatentSpec spec,
                                     float* out) {
  return std::make_unique<LatentAttention>(q, latents, rope, kv, spec, out);
}

}  // namespace toptwo
