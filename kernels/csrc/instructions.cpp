// The dense operations of a program, and how each is divided among the members of the team.

#include <algorithm>
#include <cstring>

#include "program.h"

namespace toptwo {

namespace {

constexpr int64_t kChunkBlocks = 8;   // of matrix rows: 64 outputs

int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

class Embed : public Instruction {
 public:
  Embed(Matrix table, float* out) : table_(table), out_(out) {}
  void run(Context& c) const override {
    c.for_tokens(c.step.num_tokens,
                 [&](int64_t t) { c.kernels.unpack_row(table_, c.step.ids[t], out_ + t * table_.cols); });
  }

 private:
  Matrix table_;
  float* out_;
};

class Norm : public Instruction {
 public:
  Norm(bool centered, const float* x, NormArgs norm, Slices slices, float* out, Extent extent)
      : centered_(centered), x_(x), norm_(norm), slices_(slices), out_(out), extent_(extent) {}
  void run(Context& c) const override {
    auto norm = centered_ ? c.kernels.layer_norm : c.kernels.rms_norm;
    c.for_tokens(c.count(extent_), [&](int64_t t) {
      for (int64_t i = 0; i < slices_.count; ++i) {
        const int64_t at = t * slices_.stride + slices_.first + i * norm_.size;
        norm(x_ + at, norm_, out_ + at);
      }
    });
  }

 private:
  bool centered_;
  const float* x_;
  NormArgs norm_;
  Slices slices_;
  float* out_;
  Extent extent_;
};

class Add : public Instruction {
 public:
  Add(const float* x, float* y, int64_t size, Extent extent) : x_(x), y_(y), size_(size), extent_(extent) {}
  void run(Context& c) const override {
    c.for_tokens(c.count(extent_),
                 [&](int64_t t) { c.kernels.add_scaled(y_ + t * size_, x_ + t * size_, 1.0f, size_); });
  }

 private:
  const float* x_;
  float* y_;
  int64_t size_;
  Extent extent_;
};

class InPlace : public Instruction {
 public:
  InPlace(Elementwise what, float* x, float by, int64_t size, Extent extent)
      : what_(what), x_(x), by_(by), size_(size), extent_(extent) {}
  void run(Context& c) const override {
    auto apply = what_ == Elementwise::scale ? c.kernels.scale : c.kernels.clip;
    c.for_tokens(c.count(extent_), [&](int64_t t) { apply(x_ + t * size_, by_, size_, x_ + t * size_); });
  }

 private:
  Elementwise what_;
  float *x_, by_;
  int64_t size_;
  Extent extent_;
};

class Select : public Instruction {
 public:
  Select(const float* x, int64_t size, float* out) : x_(x), size_(size), out_(out) {}
  void run(Context& c) const override {
    c.for_tokens(c.step.num_selected, [&](int64_t s) {
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
  Linear(const float* x, Matrix w, HeadSplit split, const float* bias, float* out, Extent extent)
      : x_(x), w_(w), split_(split), bias_(bias), out_(out), extent_(extent) {}

  void run(Context& c) const override {
    const int64_t count = c.count(extent_), heads = split_.heads;
    const int64_t in = w_.cols + split_.rest, out = w_.rows + split_.rest;
    const uint8_t* x = reinterpret_cast<const uint8_t*>(x_);
    int64_t head_bytes = in * 4;
    if (is_quantized(w_.format)) {
      head_bytes = RowLayout(w_.cols, w_.format).bytes();
      c.for_tokens(count * heads, [&](int64_t i) {
        c.kernels.quantize_row(x_ + i * in, w_.cols, w_.format, c.scratch + i * head_bytes);
      });
      x = c.scratch;
    }
    const int64_t chunks = pieces(w_.blocks(), kChunkBlocks);
    c.member.for_each(heads * chunks, [&](int64_t i) {
      const int64_t head = i / chunks, begin = i % chunks * kChunkBlocks;
      Matrix w = w_;
      w.data += head * w_.bytes();
      c.kernels.gemm({w, begin, std::min(w.blocks(), begin + kChunkBlocks), x + head * head_bytes, heads * head_bytes,
                      nullptr, count, out_ + head * out, heads * out, nullptr, Epilogue::store, bias_});
      if (begin > 0 || split_.rest == 0) return;
      for (int64_t t = 0; t < count; ++t)
        std::memcpy(out_ + (t * heads + head) * out + w_.rows, x_ + (t * heads + head) * in + w_.cols,
                    size_t(split_.rest) * 4);
    });
  }
  int64_t scratch_bytes(int64_t tokens) const override {
    return is_quantized(w_.format) ? tokens * split_.heads * RowLayout(w_.cols, w_.format).bytes() : 0;
  }

 private:
  const float* x_;
  Matrix w_;
  HeadSplit split_;
  const float* bias_;
  float* out_;
  Extent extent_;
};

}  // namespace

InstructionPtr make_embed(Matrix table, float* out) { return std::make_unique<Embed>(table, out); }

InstructionPtr make_norm(bool centered, const float* x, NormArgs norm, Slices slices, float* out, Extent extent) {
  return std::make_unique<Norm>(centered, x, norm, slices, out, extent);
}

InstructionPtr make_select(const float* x, int64_t size, float* out) {
  return std::make_unique<Select>(x, size, out);
}

InstructionPtr make_add(const float* x, float* y, int64_t size, Extent extent) {
  return std::make_unique<Add>(x, y, size, extent);
}

InstructionPtr make_elementwise(Elementwise what, float* x, float by, int64_t size, Extent extent) {
  return std::make_unique<InPlace>(what, x, by, size, extent);
}

InstructionPtr make_linear(const float* x, Matrix w, HeadSplit split, const float* bias, float* out, Extent extent) {
  return std::make_unique<Linear>(x, w, split, bias, out, extent);
}

}  // namespace toptwo
