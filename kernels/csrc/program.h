// A recorded step: the list of fused operations that a model's forward pass consists of.
//
// The model is run once, at load, against buffers for the largest step; every operation appends itself
// here. Afterwards a step of any size is one call that runs the list in one parallel region. Buffers
// belong to whoever recorded.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels.h"
#include "step.h"
#include "team.h"

namespace toptwo {

// Which dimension of a step an operation runs over.
enum class Extent : int { tokens, selected };

class Instruction {
 public:
  struct Context {
    const Step& step;
    const Kernels& kernels;
    Team::Member& member;
    uint8_t* scratch;  // shared by the members, rewritten by every instruction
    float* own;        // this member's alone

    int64_t count(Extent e) const { return e == Extent::tokens ? step.num_tokens : step.num_selected; }

    // Call f(i) for every i < count, a few at a time on some member: element-wise work.
    template <class F>
    void for_tokens(int64_t count, F&& f) const {
      constexpr int64_t at_once = 8;
      member.for_each((count + at_once - 1) / at_once, [&](int64_t chunk) {
        for (int64_t i = chunk * at_once; i < std::min(count, (chunk + 1) * at_once); ++i) f(i);
      });
    }
  };

  virtual ~Instruction() = default;
  virtual void run(Context&) const = 0;
  // Bytes of shared scratch for a step of `tokens`.
  virtual int64_t scratch_bytes(int64_t) const { return 0; }
  // Floats of each member's own scratch.
  virtual int64_t own_floats() const { return 0; }
};

using InstructionPtr = std::unique_ptr<Instruction>;

InstructionPtr make_embed(Matrix table, float* out);

// `count` slices of a row of `stride` floats, from `first` on, each for itself; out may be x.
struct Slices {
  int64_t stride, first, count;
};
InstructionPtr make_norm(bool centered, const float* x, NormArgs norm, Slices slices, float* out, Extent extent);

InstructionPtr make_select(const float* x, int64_t size, float* out);

// y += x
InstructionPtr make_add(const float* x, float* y, int64_t size, Extent extent);

// x *= by, or x cut off at -by and by.
enum class Elementwise : int { scale, clip };
InstructionPtr make_elementwise(Elementwise what, float* x, float by, int64_t size, Extent extent);

// w is the first of `heads` matrices that lie one after the other. Each is multiplied with its own head of x, whose
// last `rest` columns are copied behind the product.
struct HeadSplit {
  int64_t heads, rest;
};
InstructionPtr make_linear(const float* x, Matrix w, HeadSplit split, const float* bias, float* out, Extent extent);

// Angles of every position, [L, half].
struct RopeTables {
  const float *cos, *sin;
  int64_t half;
  RopeArgs at(int64_t position) const { return {cos + position * half, sin + position * half, 2 * half}; }
};

// What a layer keeps of its tokens. v is null where values are part of the keys.
struct Cache {
  void *k, *v;
  Format format;
  int64_t number_bytes() const { return format == Format::f32 ? 4 : 2; }
};

struct AttentionSpec {
  int64_t num_heads, num_kv_heads, dim;
  float scale;
  int64_t window;      // 0: none
  float soft_cap;      // 0: none
  const float* sinks;  // [N]; null: none
};
// qkv is turned in place.
InstructionPtr make_attention(float* qkv, RopeTables rope, Cache kv, AttentionSpec spec, float* out);

struct LatentSpec {
  int64_t num_heads, latent_dim, rope_dim;
  float scale;
};
// q and latents are turned in place.
InstructionPtr make_latent_attention(float* q, float* latents, RopeTables rope, Cache kv, LatentSpec spec, float* out);

struct RouterSpec {
  enum class Score : int { softmax, sigmoid, sparsemixer };
  int64_t num_experts, top_k;
  Score score;
  bool over_selected, renormalize;
  float scale;
  int64_t num_groups, top_groups;
  bool best_two;
  float jitter;
  const float *logit_bias, *selection_bias;  // [E]; null: none
};
InstructionPtr make_route(const float* x, Matrix router, RouterSpec spec, int64_t* ids, float* weights);

// Each token's top_k experts and their weights. counts: int64 [E], to which is added how often each expert was chosen;
// null: nobody counts.
struct Choice {
  const int64_t* ids;
  const float* weights;
  int64_t top_k;
  int64_t* counts;
};
// gate_up and down are the first of `count` matrices that lie one after the other, as their biases do.
struct ExpertStack {
  Matrix gate_up, down;
  int64_t count;
  Epilogue activation;
  const float *gate_up_bias, *down_bias;  // null: none
  float limit;
};
InstructionPtr make_experts(const float* x, Choice choice, ExpertStack stack, float* out);

class Program {
 public:
  Program(Team& team, const Kernels& kernels, int64_t max_tokens)
      : team_(team), kernels_(kernels), max_tokens_(max_tokens) {}
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  void add(InstructionPtr instruction);
  int64_t size() const { return int64_t(instructions_.size()); }
  // Raises std::invalid_argument for a step larger than recorded.
  void run(Step& step);

 private:
  Team& team_;
  const Kernels& kernels_;
  int64_t max_tokens_;
  std::vector<InstructionPtr> instructions_;
  int64_t scratch_bytes_ = 0, own_floats_ = 0;
  std::vector<uint8_t> scratch_;
};

}  // namespace toptwo
