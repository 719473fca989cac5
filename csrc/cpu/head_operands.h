// What the products of a head are made of: its weight by tiles, and a chunk of hidden states in both orders.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>

#include "tile_kernels.h"

namespace ssd_core::cpu {

constexpr int64_t kTile = 256;  // rows of a vocabulary tile; the gradient filter's tiles by definition

inline int64_t divide_up(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}

// Uninitialised, and in huge pages where the system gives them: for what is kept (workspace.h). Fresh ones of every call
// can come cold from a virtual machine's host, and then cost more than the call.
at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);

inline at::Tensor value_or_undefined(const std::optional<at::Tensor>& x) {
  return x.has_value() ? *x : at::Tensor();
}

inline at::Tensor contiguous_or_undefined(const std::optional<at::Tensor>& x) {
  return x.has_value() && x->defined() ? x->contiguous() : at::Tensor();
}

// Class weights (V,) float32, or undefined, with one more behind them: kernels read them in pairs.
at::Tensor paired_class_weights(const std::optional<at::Tensor>& class_weight);

// Threads that a call counts its bytes for. Not less than some, so that the chunks of a budget, which decide the order
// of d_weight's sums, are the same on few threads.
inline int64_t counted_threads() {
  return std::max(4, at::get_num_threads());
}

// Whichever thread is free takes the next, in order.
template <class Function>
void dynamic_for(int64_t begin, int64_t end, const Function& function) {
  std::atomic<int64_t> next(begin);
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < end;) {
      function(i);
    }
  });
}

// What products are made of: float32 words, or bfloat16 pairs where the machine multiplies those.
struct Words {
  const TileKernels* kernels;
  const TileKernels* floats;  // of the same panel, for statistics of tiles
  bool pairs;
  bool wide;  // float32 is kept

  int64_t words(int64_t n) const { return pairs ? divide_up(n, 2) : n; }
  int64_t element() const { return pairs ? 2 : 4; }
  int64_t kept_element() const { return wide ? 4 : 2; }
  int64_t kept_row() const { return kernels->panel * kept_element() * (pairs ? 2 : 1); }  // bytes between its words
};

Words words_of(at::ScalarType dtype, bool softcap);

// The head's weight, by tiles whose rows are words.
class Weight {
 public:
  // `order` (V,) int64, or undefined: which rows of weight follow each other.
  Weight(const at::Tensor& weight, at::ScalarType dtype, const Words& words, const at::Tensor& order);

  int64_t scratch() const { return direct_ ? 0 : kTile * words_.words(hidden_) * 4; }

  struct Rows {
    const char* data;
    int64_t row;            // bytes
    const int64_t* places;  // which rows of data; null: 0 and so on

    const char* at(int64_t j) const { return data + (places ? places[j] : j) * row; }
  };

  // Rows `first` to `first + count`, as they are or made in `scratch`, of so many bytes as scratch() says.
  Rows tile(int64_t first, int64_t count, char* scratch) const;

 private:
  void put(int64_t first, int64_t count, char* out, int64_t stride) const;
  void fetch(int64_t first, int64_t last) const;  // into the cache, rows that tile() copies from anywhere

  const at::Tensor& weight_;
  at::ScalarType dtype_;
  Words words_;
  at::Tensor order_;
  int64_t hidden_;
  bool direct_;  // rows are words as they are
};

// u (rows, panel) = the rows of a tile times a panel of tokens, `depth` words long.
void multiply_tokens(
    const Words& words, const Weight::Rows& weight, const char* tokens, int64_t depth, int64_t rows, float* u);

// Distance in words of the rows of transposed words: an odd number of cache lines, or the rows of many heads would all
// meet in a few sets of the cache.
inline int64_t slice_stride(int64_t width) {
  return (divide_up(width, 16) | 1) * 16;
}

// Element (row, lane) of rows of words, pairs of them below each other.
void store_word_element(const Words& words, char* rows, int64_t row, int64_t lane, float value);

// A gradient where a block's are: in place of what was kept, and by rows of the vocabulary.
void store_gradient(
    const Words& words, char* kept, char* by_row, int64_t row_bytes, int64_t row, int64_t lane, float value);

// Floats to elements `at` and on of a contiguous tensor of any floating dtype; added to those of a float32 one.
void store_floats(const at::Tensor& to, int64_t at, const float* from, int64_t count, bool add);

// Panels of b with tokens in the lanes, (panels, words of D, panel): x (n, D) contiguous, in words.
void pack_by_token(const char* x, int64_t n, int64_t hidden, const Words& words, uint32_t* out);

// Panels of b with coordinates in the lanes, (panels of D, words of n, panel).
void pack_by_coordinate(const char* x, int64_t n, int64_t hidden, const Words& words, uint32_t* out, int64_t depth);

}  // namespace ssd_core::cpu
