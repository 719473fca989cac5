// Certified gradient filtering; the definition is ssd_core/reference/grad_filter.py. Per token the lightest tiles of
// the vocabulary are skipped while their softmax mass stays within a bound; their part G of the gradient is replaced by
// M_it c_j with M_it = sum_j G_ij over tile t and c_j = sum_i G_ij / sum_i M_it.
//
// The gradient itself is made as always. What is active of it is copied together, by tile and token, and waits: one
// product of a tile with many tokens is cheaper than many with a few. What waits is multiplied when there is no room for
// more, and at the end of the call.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "linear_head.h"
#include "ranks.h"

namespace ssd_core::cpu {

class GradFilter {
 public:
  // Of the finished chunk's token i: the softmax mass of each tile (tiles,), infinite where it holds a target; and what
  // the softmax enters its gradient with.
  struct Tokens {
    std::function<void(int64_t i, float* mass)> masses;
    std::function<double(int64_t i)> weight;
  };

  // A bound of 0: exact. About `held_bytes` of active gradient wait at most.
  GradFilter(double delta_input, double delta_weight, int64_t held_bytes, Tokens tokens, const Ranks& ranks);

  bool filters_input() const { return input_ >= 0; }
  bool filters_weight() const { return weight_ >= 0; }

  // d_input: zeros; d_weight: all of it is written.
  void allocate(
      const HeadCall& call, const Grid& grid, const Words& words, const Weight& weight, const at::Tensor& d_input,
      const at::Tensor& d_weight);
  // A chunk whose rows are finished: what is active. x (n, D): its hidden states as products take them.
  void open(const Chunk& chunk, const at::Tensor& x);
  // Before the gradients of tiles `first_tile` to `last_tile`: what waits is multiplied if theirs would be too much.
  void make_room(int64_t first_tile, int64_t last_tile);
  int64_t room() const;  // bytes of gradient at a time, of which all may be active
  // One tile's gradient, both ways, its first panel at `kept`.
  void take(const Block& all, const char* kept, int64_t kept_stride, const char* by_row, int64_t row_bytes);
  void end_chunk();
  // What waits, and the moment match of all that was skipped.
  void close();

  // (3,) the largest and the mean mass that was skipped of a token, of all ranks together, and the fraction of (token,
  // tile) pairs that stayed.
  at::Tensor certificate() const;

 private:
  // Rows of active gradient of one tile and chunk.
  struct Held {
    int64_t chunk, begin;    // place in states_, first token
    int64_t count;           // of tokens
    const uint32_t* tokens;  // (count,) of the chunk
    const uint32_t* words;   // (count, words of a tile)
  };
  // What one bound skips.
  struct Share {
    double delta;
    std::vector<uint8_t> skips;                // (tiles, rows of a chunk)
    std::vector<int32_t> active;               // tokens of the chunk, by tile
    std::vector<int64_t> active_first;         // (tiles + 1,)
    uint32_t* room = nullptr;                  // for what is active of tile `room_first` and those that follow
    int64_t room_first = 0;
    std::vector<float> token_mass;             // M (tiles, M)
    std::vector<float> column_mass;            // sum_i G_ij (V,)
    double skipped_max = 0, skipped_sum = 0, active_count = 0;
    std::vector<std::vector<Held>> held;       // by tile
  };

  void select(Share& share);
  void add_directions();
  bool holds(const Share& share) const;  // whether what it leaves meets a product
  int64_t held_row() const { return words_.words(kTile) + 1; }  // words of a token that waits, its place included
  int64_t bytes_of(const at::Tensor& x) const;
  void flush(bool last);
  void flush_weight(int64_t tile, bool last);
  void input_slice(int64_t tile, float* mean_row, uint32_t* slice) const;
  void input_products(int64_t first_tile, int64_t last_tile, const uint32_t* slices);
  // A panel of coordinates, the q-th, to those of token i of the call.
  void add_to_input(int64_t i, int64_t q, const float* from);
  void weight_products(int64_t tile, float* product) const;
  // Add c_j times the tile's direction to `product` (rows, width).
  void match_weight(int64_t tile, float* product) const;
  void match_input(const float* mean_rows);
  // c_j of the tile.
  std::vector<float> shape_of(const Share& share, int64_t tile) const;

  std::vector<Share> shares_;
  int input_ = -1, weight_ = -1;  // places in shares, or none
  int64_t held_limit_;
  Tokens tokens_;
  const Ranks& ranks_;
  const HeadCall* call_ = nullptr;
  const Weight* head_weight_ = nullptr;
  Grid grid_;
  Words words_;
  Chunk chunk_;
  int64_t hidden_ = 0, width_ = 0, count_ = 0;  // width: of a row of coordinates, in whole panels
  bool wants_input_ = false, wants_weight_ = false, positive_ = false, negative_ = false, flushed_ = false;
  std::vector<at::Tensor> states_;  // x of each chunk that waits
  int64_t state_bytes_ = 0, waiting_bytes_ = 0;
  at::Tensor waiting_;                         // where all that waits is
  at::Tensor d_input_, d_weight_;
  at::Tensor d_input_sum_;                     // float32: d_input itself, or (M, D)
  at::Tensor directions_;                      // M^T x (tiles, width) float32
  at::Tensor d_weight_sum_;                    // float32, if what waits had to be multiplied before the end
};

// Bytes that it holds at most beyond those of the head and `held_bytes`, with one bound or two; `wide_input`: d_input is
// of another dtype than float32.
int64_t grad_filter_bytes(
    int64_t tokens, int64_t rows, int64_t vocab, int64_t hidden, at::ScalarType dtype, int64_t bounds, bool wide_input);

}  // namespace ssd_core::cpu
