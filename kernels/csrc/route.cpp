// The router as an operation of a program: its product, and the choice of experts.

#include <algorithm>
#include <cmath>
#include <numeric>

#include "program.h"

namespace toptwo {

namespace {

// Where a token's choice is made: numbers of every expert, and ids that are still to be chosen from.
struct Room {
  float *scores, *ranked;
  int64_t *left, *groups;
};

void apply(RouterSpec::Score score, float* values, int64_t count) {
  if (score == RouterSpec::Score::sigmoid) {
    for (int64_t i = 0; i < count; ++i) values[i] = 1.0f / (1.0f + std::exp(-values[i]));
    return;
  }
  const float most = *std::max_element(values, values + count);
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += values[i] = std::exp(values[i] - most);
  for (int64_t i = 0; i < count; ++i) values[i] /= sum;
}

// Take the id with the largest value out of those that are left, which ascend: the lowest of equals. A value that is
// no number is never larger; some id must be taken all the same.
int64_t take_best(const float* values, int64_t* left, int64_t count) {
  int64_t* best = std::max_element(left, left + count, [&](int64_t a, int64_t b) { return values[a] < values[b]; });
  const int64_t id = *best;
  std::copy(best + 1, left + count, best);
  return id;
}

float strength(const RouterSpec& spec, const float* group, int64_t size) {
  if (!spec.best_two) return *std::max_element(group, group + size);
  float best = -INFINITY, second = -INFINITY;
  for (int64_t i = 0; i < size; ++i) {
    second = std::max(second, std::min(best, group[i]));
    best = std::max(best, group[i]);
  }
  return best + second;
}

// Fill in `left` with the experts of the best groups; returns how many.
int64_t within_best_groups(const RouterSpec& spec, const Room& r) {
  const int64_t size = spec.num_experts / spec.num_groups;
  float* strengths = r.ranked + spec.num_experts;
  for (int64_t g = 0; g < spec.num_groups; ++g) strengths[g] = strength(spec, r.ranked + g * size, size);
  std::iota(r.left, r.left + spec.num_groups, 0);
  for (int64_t i = 0; i < spec.top_groups; ++i) r.groups[i] = take_best(strengths, r.left, spec.num_groups - i);
  std::sort(r.groups, r.groups + spec.top_groups);
  for (int64_t i = 0; i < spec.top_groups; ++i)
    std::iota(r.left + i * size, r.left + (i + 1) * size, r.groups[i] * size);
  return spec.top_groups * size;
}

// An expert's weight is its part of a softmax over the logits that are left and not far below it.
void mix_sparsely(const RouterSpec& spec, const Room& r, int64_t* ids, float* weights) {
  for (int64_t slot = 0; slot < spec.top_k; ++slot) {
    const int64_t count = spec.num_experts - slot, best = take_best(r.scores, r.left, count);
    const float most = r.scores[best];
    float sum = 1.0f;  // of e^(logit - most): its own, and those of the others
    for (int64_t i = 0; i < count - 1; ++i) {
      const float logit = r.scores[r.left[i]], distance = (most - logit) / std::max(std::fabs(logit), most);
      if (!(distance > 2.0f * spec.jitter)) sum += std::exp(logit - most);
    }
    ids[slot] = best;
    weights[slot] = 1.0f / sum * spec.scale;
  }
}

// Choose top_k experts by the logits in r.scores; ties go to the lowest id. The rules are those of reference/route.py.
void choose(const RouterSpec& spec, const Room& r, int64_t* ids, float* weights) {
  const int64_t experts = spec.num_experts, top_k = spec.top_k;
  std::iota(r.left, r.left + experts, 0);
  if (spec.score == RouterSpec::Score::sparsemixer) return mix_sparsely(spec, r, ids, weights);
  if (!spec.over_selected) apply(spec.score, r.scores, experts);
  for (int64_t e = 0; e < experts; ++e)
    r.ranked[e] = spec.selection_bias ? r.scores[e] + spec.selection_bias[e] : r.scores[e];
  const int64_t count = spec.num_groups > 1 ? within_best_groups(spec, r) : experts;
  for (int64_t slot = 0; slot < top_k; ++slot) {
    ids[slot] = take_best(r.ranked, r.left, count - slot);
    weights[slot] = r.scores[ids[slot]];
  }
  if (spec.over_selected) apply(spec.score, weights, top_k);
  float sum = 0.0f;
  for (int64_t i = 0; i < top_k; ++i) sum += weights[i];
  for (int64_t i = 0; i < top_k; ++i) weights[i] = (spec.renormalize ? weights[i] / sum : weights[i]) * spec.scale;
}

class Route : public Instruction {
 public:
  Route(const float* x, Matrix router, RouterSpec spec, int64_t* ids, float* weights)
      : x_(x), router_(router), spec_(spec), ids_(ids), weights_(weights) {}

  void run(Context& c) const override {
    const int64_t tokens = c.step.num_tokens, experts = spec_.num_experts;
    float* logits = c.own;
    Room room{nullptr, logits + kAtOnce * experts, nullptr, nullptr};
    room.left = reinterpret_cast<int64_t*>(room.ranked + 2 * experts);
    room.groups = room.left + experts;
    c.member.for_each((tokens + kAtOnce - 1) / kAtOnce, [&](int64_t i) {
      const int64_t first = i * kAtOnce, count = std::min(kAtOnce, tokens - first);
      c.kernels.gemm({router_, 0, router_.blocks(), reinterpret_cast<const uint8_t*>(x_ + first * router_.cols),
                      router_.cols * 4, nullptr, count, logits, experts, nullptr, Epilogue::store, spec_.logit_bias});
      for (int64_t t = 0; t < count; ++t) {
        room.scores = logits + t * experts;
        choose(spec_, room, ids_ + (first + t) * spec_.top_k, weights_ + (first + t) * spec_.top_k);
      }
    });
  }
  // Logits; ranks and the strengths of groups; two lists of ids.
  int64_t own_floats() const override { return (kAtOnce + 2 + 4) * spec_.num_experts; }

 private:
  static constexpr int64_t kAtOnce = 4;

  const float* x_;
  Matrix router_;
  RouterSpec spec_;
  int64_t* ids_;
  float* weights_;
};

}  // namespace

InstructionPtr make_route(const float* x, Matrix router, RouterSpec spec, int64_t* ids, float* weights) {
  return std::make_unique<Route>(x, router, spec, ids, weights);
}

}  // namespace toptwo
