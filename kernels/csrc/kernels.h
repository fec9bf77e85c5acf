// What every instruction set implements: single-threaded kernels over a part of the work, as a table
// of functions. The program decides who computes which part; these decide how.
#pragma once

#include <cstdint>

#include "layout.h"

namespace toptwo {

// What becomes of a product. All but `store` take blocks in pairs, gates and ups, and join them: see ops.Activation.
enum class Epilogue : int { store, silu, gelu_tanh, clamped_swiglu };

// y[t] = W x[t] for the blocks [block_begin, block_end) and `count` tokens.
//
// The sum over inputs runs in one fixed order for every output, whatever the tile: a token's result
// does not depend on its company.
struct GemmArgs {
  Matrix w;
  int64_t block_begin, block_end;
  const uint8_t* x;        // activation rows, quantised if the weights are, else f32
  int64_t x_stride;        // bytes
  const int32_t* x_rows;   // row of token t; null: t itself
  int64_t count;
  float* y;
  int64_t y_stride;        // floats
  const int32_t* y_rows;   // row of token t; null: t itself
  Epilogue epilogue;
  const float* bias = nullptr;  // [O], or [2F], gates first; null: none
  float limit = 0.0f;           // of clamped_swiglu
};

// One query tile over the paged cache of one sequence and one KV head.
struct AttendArgs {
  const float* q;          // [count, D], already scaled
  float* out;              // [count, D']
  const int64_t* limits;   // tokens up to which each query sees, ascending
  int64_t count;
  const void *k, *v;       // caches: k [B, M, D, kSlots], v [B, M, kSlots, D']; v null: the first D' dimensions of k
  Format kv_format;
  const int64_t* blocks;   // the sequence's block table
  int64_t head, num_heads, dim, value_dim;
  int64_t window;          // how many tokens a query sees at most; 0: all up to its limit
  float soft_cap;          // 0: none
  const float* sinks;      // query i has sinks[i % heads]; null: none
  int64_t heads;
  float* scratch;          // attend_scratch() floats
};

constexpr int64_t attend_scratch(int64_t dim, int64_t value_dim, int64_t count) {
  return (dim + value_dim) * kSlots + count * 2;
}

struct NormArgs {
  const float *weight, *bias;  // bias: of layer_norm alone; null: none
  float eps;
  int64_t size;
};

struct RopeArgs {
  const float *cos, *sin;  // [dim / 2] of the token's position
  int64_t dim;             // how many dimensions turn, the first ones of a head
};

struct SampleArgs {
  const float* logits;
  int64_t vocab;
  double temperature, top_p, min_p, uniform;
  int64_t top_k;
};

struct PackArgs {
  const void* source;      // [rows, cols] row-major
  int64_t source_rows;
  bool paired;             // the source is gate rows, then up rows; blocks of them are to alternate
  Format source_format;
  Matrix target;           // data: where to write
  int64_t block_begin, block_end;
};

struct Kernels {
  const char* name;
  void (*quantize_row)(const float* x, int64_t cols, Format weights, uint8_t* row);
  void (*gemm)(const GemmArgs&);
  void (*rms_norm)(const float* x, const NormArgs&, float* y);
  void (*layer_norm)(const float* x, const NormArgs&, float* y);
  void (*rope)(float* x, const RopeArgs&);
  void (*scale)(const float* x, float factor, int64_t size, float* y);
  void (*clip)(const float* x, float limit, int64_t size, float* y);
  void (*add_scaled)(float* y, const float* x, float factor, int64_t size);
  void (*store_k)(const float* k, int64_t dim, Format, void* cache_head, int64_t slot);
  void (*store_v)(const float* v, int64_t dim, Format, void* cache_head, int64_t slot);
  void (*attend)(const AttendArgs&);
  void (*unpack_row)(const Matrix&, int64_t row, float* y);
  void (*pack)(const PackArgs&);
  int64_t (*sample)(const SampleArgs&);
};

extern const Kernels kScalar;
#if defined(TOPTWO_X86)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace toptwo
