// The experts' work as an operation of a program.

#include <algorithm>

#include "program.h"

namespace toptwo {

namespace {

// A pair is one (token, slot). Pairs are sorted by expert, so that an expert's weights are read once for
// all of its tokens; a pair's result lands in its own row and is combined in slot order.
class Experts : public Instruction {
 public:
  Experts(const float* x, Choice choice, ExpertStack stack, float* out)
      : x_(x), choice_(choice), stack_(stack), out_(out) {}

  void run(Context& c) const override {
    const Matrix &gate_up = stack_.gate_up, &down = stack_.down;
    const int64_t tokens = c.step.num_tokens, pairs = tokens * choice_.top_k, hidden = down.rows, ffn = down.cols;
    const Rooms r = rooms(c.scratch, tokens);
    const uint8_t* x = reinterpret_cast<const uint8_t*>(x_);
    int64_t x_stride = hidden * 4, h_stride = ffn * 4;
    const bool quantized = is_quantized(down.format);
    if (quantized) {
      x_stride = RowLayout(hidden, down.format).bytes(), h_stride = RowLayout(ffn, down.format).bytes();
      x = r.x;
    }
    const int64_t quantizing = quantized ? (tokens + 7) / 8 : 0;
    c.member.for_each(quantizing + 1, [&](int64_t i) {
      if (i == 0) return sort_pairs(r, tokens);
      for (int64_t t = 8 * (i - 1); t < std::min(tokens, 8 * i); ++t)
        c.kernels.quantize_row(x_ + t * hidden, hidden, down.format, r.x + t * x_stride);
    });
    const int64_t active = r.starts[stack_.count + 1];

    product(c, r, active, gate_up, [&](int64_t expert) {
      const float* bias = stack_.gate_up_bias ? stack_.gate_up_bias + expert * 2 * ffn : nullptr;
      const int64_t first = r.starts[expert];
      return GemmArgs{{}, 0, 0, x, x_stride, r.tokens + first, 0, r.hidden + first * ffn, ffn, nullptr,
                      stack_.activation, bias, stack_.limit};
    });
    const uint8_t* h = reinterpret_cast<const uint8_t*>(r.hidden);
    if (quantized) {
      c.member.for_each((pairs + 3) / 4, [&](int64_t i) {
        for (int64_t p = 4 * i; p < std::min(pairs, 4 * i + 4); ++p)
          c.kernels.quantize_row(r.hidden + p * ffn, ffn, down.format, r.h + p * h_stride);
      });
      h = r.h;
    }
    product(c, r, active, down, [&](int64_t expert) {
      const float* bias = stack_.down_bias ? stack_.down_bias + expert * hidden : nullptr;
      const int64_t first = r.starts[expert];
      return GemmArgs{{}, 0, 0, h + first * h_stride, h_stride, nullptr, 0, r.result, hidden, r.pairs + first,
                      Epilogue::store, bias};
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
    const int64_t pairs = tokens * choice_.top_k;
    auto take = [&](int64_t bytes) {
      uint8_t* room = base + at;
      at += round_up(bytes, 64);
      return room;
    };
    r.x = take(tokens * RowLayout(stack_.gate_up.cols, stack_.gate_up.format).bytes());
    r.h = take(pairs * RowLayout(stack_.down.cols, stack_.down.format).bytes());
    r.hidden = reinterpret_cast<float*>(take(pairs * stack_.down.cols * 4));
    r.result = reinterpret_cast<float*>(take(pairs * stack_.down.rows * 4));
    r.tokens = reinterpret_cast<int32_t*>(take(pairs * 4));
    r.pairs = reinterpret_cast<int32_t*>(take(pairs * 4));
    r.starts = reinterpret_cast<int64_t*>(take((stack_.count + 2) * 8));
    r.active = reinterpret_cast<int64_t*>(take(stack_.count * 8));
    r.bytes = at;
    return r;
  }

  void sort_pairs(const Rooms& r, int64_t tokens) const {
    const int64_t pairs = tokens * choice_.top_k, *ids = choice_.ids;
    std::fill(r.starts, r.starts + stack_.count + 2, 0);
    for (int64_t p = 0; p < pairs; ++p) ++r.starts[ids[p] + 1];
    int64_t active = 0;
    for (int64_t e = 0; e < stack_.count; ++e) {
      if (r.starts[e + 1]) r.active[active++] = e;
      if (choice_.counts) choice_.counts[e] += r.starts[e + 1];
      r.starts[e + 1] += r.starts[e];
    }
    for (int64_t p = 0; p < pairs; ++p) {
      const int64_t at = r.starts[ids[p]]++;
      r.tokens[at] = int32_t(p / choice_.top_k);
      r.pairs[at] = int32_t(p);
    }
    for (int64_t e = stack_.count; e > 0; --e) r.starts[e] = r.starts[e - 1];
    r.starts[0] = 0;
    r.starts[stack_.count + 1] = active;
  }

  // One product of every active expert with its tokens, cut into chunks of rows.
  template <class Args>
  void product(Context& c, const Rooms& r, int64_t active, const Matrix& stack, Args&& args) const {
    constexpr int64_t chunk = 8;
    const int64_t chunks = (stack.blocks() + chunk - 1) / chunk;
    c.member.for_each(active * chunks, [&](int64_t i) {
      const int64_t expert = r.active[i / chunks], begin = i % chunks * chunk;
      GemmArgs a = args(expert);
      a.w = stack;
      a.w.data = stack.data + expert * stack.bytes();
      a.block_begin = begin;
      a.block_end = std::min(stack.blocks(), begin + chunk);
      a.count = r.starts[expert + 1] - r.starts[expert];
      c.kernels.gemm(a);
    });
  }

  void combine(Context& c, const Rooms& r, int64_t t) const {
    const int64_t hidden = stack_.down.rows;
    float* out = out_ + t * hidden;
    std::fill(out, out + hidden, 0.0f);
    for (int64_t slot = 0; slot < choice_.top_k; ++slot) {
      const int64_t p = t * choice_.top_k + slot;
      c.kernels.add_scaled(out, r.result + p * hidden, choice_.weights[p], hidden);
    }
  }

  const float* x_;
  Choice choice_;
  ExpertStack stack_;
  float* out_;
};

}  // namespace

InstructionPtr make_experts(const float* x, Choice choice, ExpertStack stack, float* out) {
  return std::make_unique<Experts>(x, choice, stack, out);
}

}  // namespace toptwo
