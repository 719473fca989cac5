// The targets of a chunk's tokens, found by tile of the vocabulary.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cross_entropy_terms.h"
#include "linear_head.h"

namespace ssd_core::cpu {

struct HeadTargets {
  std::vector<TargetEntry> entries;  // by token
  std::vector<int32_t> token;        // of each entry
  std::vector<RowTarget> rows;       // (n,)
  std::vector<int32_t> by_tile;      // places in entries of this rank's ids, by tile and then by token
  std::vector<int64_t> tile_first;   // (tiles + 1,)

  // ids (N, K) int64, relative to this rank's first, with probs (N, K) float32, or undefined: hard labels.
  void read(
      const Chunk& chunk, const Grid& grid, const at::Tensor& ids, const at::Tensor& probs, const RowOptions& options,
      bool bucket);

  // function(entry, row of the tile, lane)
  template <class Function>
  void each(const Block& block, int64_t panel_width, const Function& function) {
    const int64_t begin = block.panel * panel_width, end = begin + panel_width;
    const auto earlier = [&](int32_t place, int64_t t) { return token[place] < t; };
    const auto* first = by_tile.data() + tile_first[block.tile];
    const auto* last = by_tile.data() + tile_first[block.tile + 1];
    for (const auto* at = std::lower_bound(first, last, begin, earlier); at != last && token[*at] < end; ++at) {
      function(entries[*at], entries[*at].id - block.first, token[*at] - begin);
    }
  }

  // What one rank alone knows, NaN if it is another: the entries' values and the rows' class weights.
  int64_t known() const { return static_cast<int64_t>(entries.size() + rows.size()); }
  void tell(double* out) const;
  // Of each of the ranks, so many numbers after the last one's: the first that is none but NaN.
  void learn(const double* all, int64_t ranks, int64_t stride);

  // Bytes of a token with `support` ids, without those of the grid.
  static int64_t row_bytes(int64_t support) {
    return support * 3 * (sizeof(TargetEntry) + 4) + sizeof(RowTarget);
  }

 private:
  bool is_own(const TargetEntry& entry) const { return entry.id >= 0 && entry.id < own_; }

  int64_t own_ = 0;
};

}  // namespace ssd_core::cpu
