// The Mixture-of-Experts operations of a program: the router's choice, and the experts' work.

#include <algorithm>
#include <cmath>

#include "program.h"

namespace toptwo {

namespace {

// Choose top_k of the E logits of a token. Ties go to the lowest expert id.
void choose(const RouterSpec& spec, float* scores, int64_t* ids, float* weights) {
  const int64_t experts = spec.num_experts, top_k = spec.top_k;
  auto score = [&spec](float* values, int64_t count) {
    if (spec.sigmoid) {
      for (int64_t i = 0; i < count; ++i) values[i] = 1.0f / (1.0f + std::exp(-values[i]));
      return;
    }
    const float most = *std::max_element(values, values + count);
    float sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) sum += values[i] = std::exp(values[i] - most);
    for (int64_t i = 0; i < count; ++i) values[i] /= sum;
  };
  if (!spec.over_selected) score(scores, experts);
  for (int64_t slot = 0; slot < top_k; ++slot) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts; ++e) {
      const bool taken = std::find(ids, ids + slot, e) != ids + slot;
      // A score that is no number is never larger; some expert must be chosen all the same.
      if (!taken && (best < 0 || scores[e] > scores[best])) best = e;
    }
    ids[slot] = best;
    weights[slot] = scores[best];
  }
  if (spec.over_selected) score(weights, top_k);
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
    constexpr int64_t at_once = 4;
    float* logits = reinterpret_cast<float*>(c.scratch);
    c.member.for_each((tokens + at_once - 1) / at_once, [&](int64_t i) {
      const int64_t first = i * at_once, count = std::min(at_once, tokens - first);
      c.kernels.gemm({router_, 0, router_.blocks(), reinterpret_cast<const uint8_t*>(x_ + first * router_.cols),
                      router_.cols * 4, nullptr, count, logits + first * experts, experts, nullptr,
                      Epilogue::store});
      for (int64_t t = first; t < first + count; ++t)
        choose(spec_, logits + t * experts, ids_ + t * spec_.top_k, weights_ + t * spec_.top_k);
    });
  }
  int64_t scratch_bytes(int64_t tokens) const override { return tokens * spec_.num_experts * 4; }

 private:
  const float* x_;
  Matrix router_;
  RouterSpec spec_;
  int64_t* ids_;
  float* weights_;
};

// A pair is one (token, slot). Pairs are sorted by expert, so that an expert's weights are read once for
// all of its tokens; a pair's result lands in its own row and is combined in slot order.
class Experts : public Instruction {
 public:
  Experts(const float* x, const int64_t* ids, const float* weights, Matrix gate_up, Matrix down, int64_t num_experts,
          int64_t top_k, float* out)
      : x_(x), ids_(ids), weights_(weights), gate_up_(gate_up), down_(down), num_experts_(num_experts),
        top_k_(top_k), out_(out) {}

  void run(Context& c) const override {
    const int64_t tokens = c.step.num_tokens, pairs = tokens * top_k_, ffn = down_.cols;
    const Rooms r = rooms(c.scratch, tokens);
    const uint8_t* x = reinterpret_cast<const uint8_t*>(x_);
    int64_t x_stride = gate_up_.cols * 4, h_stride = ffn * 4;
    const bool quantized = is_quantized(gate_up_.format);
    if (quantized) x_stride = RowLayout(gate_up_.cols, gate_up_.format).bytes(), h_stride = RowLayout(ffn, down_.format).bytes(), x = r.x;
    const int64_t quantizing = quantized ? (tokens + 7) / 8 : 0;
    c.member.for_each(quantizing + 1, [&](int64_t i) {
      if (i == 0) return sort_pairs(r, tokens);
      for (int64_t t = 8 * (i - 1); t < std::min(tokens, 8 * i); ++t)
        c.kernels.quantize_row(x_ + t * gate_up_.cols, gate_up_.cols, gate_up_.format, r.x + t * x_stride);
    });
    const int64_t active = r.starts[num_experts_ + 1];

    product(c, r, active, gate_up_, [&](int64_t first) {
      return GemmArgs{{}, 0, 0, x, x_stride, r.tokens + first, 0, r.hidden + first * ffn, ffn, nullptr,
                      Epilogue::swiglu};
    });
    const uint8_t* h = reinterpret_cast<const uint8_t*>(r.hidden);
    if (quantized) {
      c.member.for_each((pairs + 3) / 4, [&](int64_t i) {
        for (int64_t p = 4 * i; p < std::min(pairs, 4 * i + 4); ++p)
          c.kernels.quantize_row(r.hidden + p * ffn, ffn, down_.format, r.h + p * h_stride);
      });
      h = r.h;
    }
    product(c, r, active, down_, [&](int64_t first) {
      return GemmArgs{{}, 0, 0, h + first * h_stride, h_stride, nullptr, 0, r.result, down_.rows, r.pairs + first,
                      Epilogue::store};
    });
    c.member.for_each((tokens + 3) / 4, [&](int64_t i) {
      for (int64_t t = 4 * i; t < std::min(tokens, 4 * i + 4); ++t) combine(c, r, t);
    });
  }

  int64_t scratch_bytes(int64_t tokens) const override { return rooms(nullptr, tokens).bytes; }

 private:
  // The parts of the scratch memory.
  struct Rooms {
    uint8_t *x, *h;          // quantised inputs of the two products
    float *hidden, *result;  // [P, F] in sorted order, [P, H] in the pairs' own
    int32_t *tokens, *pairs; // of each sorted pair
    int64_t *starts, *active;  // [E + 2]: an expert's first sorted pair; behind them how many are active
    int64_t bytes;
  };

  Rooms rooms(uint8_t* base, int64_t tokens) const {
    Rooms r{};
    int64_t at = 0;
    const int64_t pairs = tokens * top_k_;
    auto take = [&](int64_t bytes) {
      uint8_t* room = base + at;
      at += round_up(bytes, 64);
      return room;
    };
    r.x = take(tokens * RowLayout(gate_up_.cols, gate_up_.format).bytes());
    r.h = take(pairs * RowLayout(down_.cols, down_.format).bytes());
    r.hidden = reinterpret_cast<float*>(take(pairs * down_.cols * 4));
    r.result = reinterpret_cast<float*>(take(pairs * down_.rows * 4));
    r.tokens = reinterpret_cast<int32_t*>(take(pairs * 4));
    r.pairs = reinterpret_cast<int32_t*>(take(pairs * 4));
    r.starts = reinterpret_cast<int64_t*>(take((num_experts_ + 2) * 8));
    r.active = reinterpret_cast<int64_t*>(take(num_experts_ * 8));
    r.bytes = at;
    return r;
  }

  void sort_pairs(const Rooms& r, int64_t tokens) const {
    const int64_t pairs = tokens * top_k_;
    std::fill(r.starts, r.starts + num_experts_ + 2, 0);
    for (int64_t p = 0; p < pairs; ++p) ++r.starts[ids_[p] + 1];
    int64_t active = 0;
    for (int64_t e = 0; e < num_experts_; ++e) {
      if (r.starts[e + 1]) r.active[active++] = e;
      r.starts[e + 1] += r.starts[e];
    }
    for (int64_t p = 0; p < pairs; ++p) {
      const int64_t at = r.starts[ids_[p]]++;
      r.tokens[at] = int32_t(p / top_k_);
      r.pairs[at] = int32_t(p);
    }
    for (int64_t e = num_experts_; e > 0; --e) r.starts[e] = r.starts[e - 1];
    r.starts[0] = 0;
    r.starts[num_experts_ + 1] = active;
  }

  // One product of every active expert with its tokens, cut into chunks of rows.
  template <class Args>
  void product(Context& c, const Rooms& r, int64_t active, const Matrix& stack, Args&& args) const {
    constexpr int64_t chunk = 8;
    const int64_t chunks = (stack.blocks() + chunk - 1) / chunk;
    c.member.for_each(active * chunks, [&](int64_t i) {
      const int64_t expert = r.active[i / chunks], begin = i % chunks * chunk;
      GemmArgs a = args(r.starts[expert]);
      a.w = stack;
      a.w.data = stack.data + expert * stack.bytes();
      a.block_begin = begin;
      a.block_end = std::min(stack.blocks(), begin + chunk);
      a.count = r.starts[expert + 1] - r.starts[expert];
      c.kernels.gemm(a);
    });
  }

  void combine(Context& c, const Rooms& r, int64_t t) const {
    const int64_t hidden = down_.rows;
    float* out = out_ + t * hidden;
    std::fill(out, out + hidden, 0.0f);
    for (int64_t slot = 0; slot < top_k_; ++slot) {
      const int64_t p = t * top_k_ + slot;
      c.kernels.add_scaled(out, r.result + p * hidden, weights_[p], hidden);
    }
  }

  const float* x_;
  const int64_t* ids_;
  const float* weights_;
  Matrix gate_up_, down_;
  int64_t num_experts_, top_k_;
  float* out_;
};

}  // namespace

InstructionPtr make_route(const float* x, Matrix router, RouterSpec spec, int64_t* ids, float* weights) {
  return std::make_unique<Route>(x, router, spec, ids, weights);
}

InstructionPtr make_experts(const float* x, const int64_t* ids, const float* weights, Matrix gate_up, Matrix down,
                            int64_t num_experts, int64_t top_k, float* out) {
  return std::make_unique<Experts>(x, ids, weights, gate_up, down, num_experts, top_k, out);
}

}  // namespace toptwo
