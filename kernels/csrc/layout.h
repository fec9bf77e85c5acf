// How weights and quantised activations lie in memory. Shared by every instruction set.
//
// A matrix [O, I] is cut into blocks of 8 rows. Inside a block the rows are interleaved, so that one
// vector register holds the same inputs of 8 rows and a dot product needs no horizontal sum:
//
//   f32         I x [8 rows]
//   bf16, f16   I x [8 rows]
//   int8        G x { [8 f16 scales], [16 half vectors of 8 rows x 2 inputs] }
//   int4        of two blocks together: G x { [16 f16 scales], [16 u8 zeros], then for each of the two
//               [4 vectors of 8 rows x 4 inputs] }: vector j holds inputs 4j..4j+3 of the group in its low
//               nibbles and inputs 16+4j.. in its high ones
//
// G = ceil(I / 32) groups of 32 inputs; rows and inputs that do not exist are zero. A weight is
// q * scale in int8 and (16 q - zero) * scale / 16 in int4. All that a group needs lies in one place:
// memory is read front to back, and prefetchers need not follow a plane for each part of each block.
//
// Activations that meet int8 weights are rounded to 13 bits, which costs nothing on processors that multiply
// 16-bit numbers as fast as bytes, and makes the weights the only source of error: G x 32 int16, G f32
// scales. Those that meet int4 are int8: G x 32 int8, G f32 scales, G i32 sums.
#pragma once

#include <cstddef>
#include <cstdint>

namespace toptwo {

constexpr int kRows = 8;    // rows of a block
constexpr int kGroup = 32;  // inputs that share a scale
constexpr int kSlots = 16;  // tokens of a KV block

// Bytes of a group: of an int8 block, and of two int4 blocks.
constexpr int64_t kInt8Group = 16 + 256, kInt4Group = 32 + 16 + 2 * 128;

enum class Format : int { f32, bf16, f16, int8, int4 };

// Where the parts of group g lie that belong to block b.
struct Group {
  uint8_t *scales, *zeros, *quants;
};

constexpr bool is_quantized(Format f) { return f == Format::int8 || f == Format::int4; }
constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Matrix {
  Format format;
  int64_t rows, cols;
  const uint8_t* data;

  int64_t blocks() const { return round_up((rows + kRows - 1) / kRows, format == Format::int4 ? 2 : 1); }
  int64_t groups() const { return (cols + kGroup - 1) / kGroup; }
  int64_t block_bytes() const {
    switch (format) {
      case Format::f32: return cols * 32;
      case Format::bf16:
      case Format::f16: return cols * 16;
      case Format::int8: return groups() * kInt8Group;
      case Format::int4: return groups() * kInt4Group / 2;
    }
    return 0;
  }
  int64_t bytes() const { return round_up(blocks() * block_bytes(), 64); }
  // Of an int4 matrix only even blocks have a place of their own.
  const uint8_t* block(int64_t b) const { return data + b * block_bytes(); }
  Group group(int64_t b, int64_t g) const {
    uint8_t* base = const_cast<uint8_t*>(block(format == Format::int4 ? b / 2 * 2 : b));
    if (format == Format::int8) return {base + g * kInt8Group, nullptr, base + g * kInt8Group + 16};
    base += g * kInt4Group;
    return {base + b % 2 * 16, base + 32 + b % 2 * 8, base + 48 + b % 2 * 128};
  }
};

// Largest magnitude of a rounded activation. 32 x 127 x 4095 < 2^24: a group's sum is exact in float32.
constexpr float kLevels16 = 4095.0f, kLevels8 = 127.0f;

// Where the parts of an activation row begin, in bytes, by the format of the weights it meets.
struct RowLayout {
  int64_t groups, number_bytes;
  RowLayout(int64_t cols, Format weights)
      : groups((cols + kGroup - 1) / kGroup), number_bytes(weights == Format::int8 ? 2 : 1) {}
  int64_t scales() const { return groups * kGroup * number_bytes; }
  int64_t sums() const { return scales() + groups * 4; }
  int64_t bytes() const { return round_up(sums() + groups * 4, 64); }
};

}  // namespace toptwo
