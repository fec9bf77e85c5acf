// A recorded step: the list of fused operations that a model's forward pass consists of.
//
// The model is run once, at load, against buffers for the largest step; every operation appends itself
// here. Afterwards a step of any size is one call that runs the list in one parallel region. Buffers
// belong to whoever recorded.
#pragma once

#include <memory>
#include <vector>

#include "kernels.h"
#include "step.h"
#include "team.h"

namespace toptwo {

struct RouterSpec {
  int64_t num_experts, top_k;
  bool sigmoid, over_selected, renormalize;
  float scale;
};

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

InstructionPtr make_norm(bool centered, const float* x, const float* weight, float eps, int64_t size, float* out,
                         Extent extent);

InstructionPtr make_select(const float* x, int64_t size, float* out);

// y += x
InstructionPtr make_add(const float* x, float* y, int64_t size);

InstructionPtr make_linear(const float* x, Matrix w, float* out, Extent extent);

struct AttentionShape {
  int64_t num_heads, num_kv_heads, dim;
  float scale;
};
// qkv is turned in place.
InstructionPtr make_attention(float* qkv, const float* cos, const float* sin, void* k, void* v, Format kv_format,
                              AttentionShape shape, float* out);

InstructionPtr make_route(const float* x, Matrix router, RouterSpec spec, int64_t* ids, float* weights);

// gate_up and down are the first of `num_experts` matrices that lie one after the other.
InstructionPtr make_experts(const float* x, const int64_t* ids, const float* weights, Matrix gate_up, Matrix down,
                            int64_t num_experts, int64_t top_k, float* out);

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
