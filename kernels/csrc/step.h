// What changes from step to step. A program is recorded once; a step tells it which tokens to run.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace toptwo {

// All arrays are the caller's and outlive the run. Rows are sequences; names as in ops.StepBatch.
struct Step {
  int64_t num_tokens = 0, num_rows = 0, num_selected = 0;
  const int64_t* ids = nullptr;           // [T]
  const int64_t* positions = nullptr;     // [T]
  const int64_t* slots = nullptr;         // [T] block * kSlots + offset
  const int64_t* query_starts = nullptr;  // [R + 1]
  const int64_t* context_lens = nullptr;  // [R]
  const int64_t* block_tables = nullptr;  // [R, table_width]
  int64_t table_width = 0;
  const int64_t* selected = nullptr;      // [S] tokens whose logits are wanted

  // Consecutive queries of one row that one member computes together.
  struct QueryTile {
    int64_t row, first, count;
  };
  static constexpr int64_t kTile = 16;
  std::vector<QueryTile> tiles;

  void cut_tiles() {
    tiles.clear();
    for (int64_t row = 0; row < num_rows; ++row)
      for (int64_t t = query_starts[row]; t < query_starts[row + 1]; t += kTile)
        tiles.push_back({row, t, query_starts[row + 1] - t < kTile ? query_starts[row + 1] - t : kTile});
    // Long contexts first, so that no member is left alone with the longest.
    int64_t last = int64_t(tiles.size()) - 1;
    for (int64_t i = 0; i < last - i; ++i) std::swap(tiles[size_t(i)], tiles[size_t(last - i)]);
  }
};

}  // namespace toptwo
