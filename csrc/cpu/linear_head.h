// What the fused losses of a head share: its products, in chunks of tokens and tiles of the vocabulary, and the two
// passes over them. What an op makes of the logits is a RowPass.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <tuple>

#include "head_operands.h"
#include "tile_kernels.h"

namespace ssd_core::cpu {

constexpr int64_t kMaxPanel = 64;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The sizes of a call.
struct Grid {
  int64_t panel;   // tokens side by side
  int64_t panels;  // of a chunk at most
  int64_t vocab;   // the student's
  int64_t extent;  // ids of the tiles: more than vocab if a teacher has more
  int64_t tiles;

  int64_t rows(int64_t tile) const { return std::min(kTile, extent - tile * kTile); }
};

// The tokens that a call is busy with: `begin` to `begin + n` of those that count.
struct Chunk {
  int64_t begin, n;
  int64_t panels;
  at::Tensor index;  // (n,) their places in the input; undefined: `begin` and so on

  at::Tensor of(const at::Tensor& x) const;  // their rows of x (N, ...), contiguous
};

// A tile of the vocabulary, at a panel of the chunk's tokens.
struct Block {
  int64_t tile, panel;
  int64_t first, rows;  // ids of the tile
  int64_t own;          // those that the student has: rows, or fewer
};

// What an op makes of logits: of raw outputs u (rows, panel) of a block, tokens in the lanes.
//
// Pass A looks at each block once and may keep what the gradient will be made of; a pass that needs a second look at
// all of it before its rows are finished says so. Pass B makes the gradient in place of what was kept. Where only some of
// the columns are kept, every later pass begins with the products of the others again. Blocks of a tile are one thread's,
// those of different tiles run side by side.
class RowPass {
 public:
  virtual ~RowPass() = default;

  // What is kept: values v in float32, or their exponentials as words.
  virtual bool keeps_values() const = 0;
  virtual int64_t more_kept() const { return 0; }  // bytes of a logit that follow those of the tile
  virtual int64_t extent(int64_t vocab) const { return vocab; }
  virtual void allocate(const Grid& grid, const Words& words) = 0;
  virtual void open(const Chunk& chunk) = 0;

  // Of one thread: bytes, and what it does before the blocks of a tile.
  virtual int64_t scratch() const { return 0; }
  virtual void open_tile(int64_t tile, char* scratch) {}

  // u has room for an even number of rows. `kept`: null if nothing is; of a pass that keeps values, u itself. `again`:
  // the statistics are there already, of a block whose products are taken a second time.
  virtual void look(const Block& block, float* u, void* kept, bool again, char* scratch) = 0;
  virtual void normalise() {}  // all blocks have been looked at
  virtual bool looks_twice() const { return false; }
  virtual void look_twice(const Block& block, void* kept) {}
  virtual void finish() = 0;

  // With respect to u: in place of what was kept, in the layout of words, and by rows of the vocabulary.
  virtual void gradient(const Block& block, void* kept, char* by_row, int64_t row_bytes) = 0;
};

// Of a row, or of the part of it that one rank has: the max of v, and the sum of exp(slope * (v - max)).
struct Exponentials {
  double max, sum;
};

// The max of v, sum_j c_j and sum_j c_j (max - v_j).
struct Spread {
  double max, weight, sum;
};

// A number for each (token, tile) of a chunk: (panels, tiles, panel), an even number of tiles.
class TileNumbers {
 public:
  void allocate(const Grid& grid);
  void pad(const Grid& grid, float number);  // the tile that makes them even
  float* of(int64_t panel, int64_t tile = 0) const {
    return data_.mutable_data_ptr<float>() + (panel * tiles_ + tile) * width_;
  }
  int64_t tiles() const { return tiles_; }
  int64_t width() const { return width_; }
  bool defined() const { return data_.defined(); }

 private:
  at::Tensor data_;
  int64_t tiles_ = 0, width_ = 0;
};

// What each tile adds to a sum of exponentials exp(slope * v): its max of v, and its sum relative to that.
struct TileExponentials {
  TileNumbers max, sum;

  void allocate(const Grid& grid);
  void open(const Grid& grid);  // before the tiles of a chunk
  // The row's, of a panel: max (panel,), sum (panel,). From then on `max` holds exp(slope * (tile's max - row's max)).
  void finish(const Words& words, float slope, int64_t panel, float* row_max, double* row_sum) const;
  // Of a token whose row is only a part: exponents are relative to the max of all of it, `factor` that of the part's.
  void rebase(int64_t panel, int64_t lane, double factor) const;
};

// What each tile adds to sum_j c_j (max v - v_j), which label smoothing takes; c null: 1.
class TileSpread {
 public:
  void allocate(const Grid& grid);
  bool defined() const { return sum_.defined(); }
  // v (rows, panel) of a block and its max.
  void look(const Words& words, const Block& block, const float* v, const float* max, const float* class_weight);
  void finish(const Grid& grid, const float* class_weight, int64_t panel, Spread* row) const;  // (panel,)

 private:
  TileNumbers sum_, max_;
};

struct HeadGradients {
  at::Tensor input, weight, bias;  // undefined: not asked for
};

class GradFilter;

struct HeadCall {
  const at::Tensor& input;   // (N, D)
  const at::Tensor& weight;  // (V, D)
  const at::Tensor& bias;    // (V,) or undefined
  const at::Tensor& index;   // (M,) int64 tokens that count; undefined: all
  at::ScalarType dtype;      // that products are taken in
  bool scaled;               // whether gradients are wanted at all
  std::array<bool, 3> needs;  // and of which of input, weight, bias
  bool keep_float32;         // those of weight and bias stay in float32
  int64_t rows, columns;     // of a chunk
  // (V,) int64: the place of each tile's rows in weight and bias, contiguous; undefined: as they are. All else that
  // depends on the vocabulary is in this order.
  at::Tensor order = {};
  // Other ranks have the rest of the vocabulary: d_input, which is to be summed over them, stays in float32, and a
  // chunk has `rows` tokens whatever a panel has, for all look at the same ones at a time.
  bool shared = false;

  int64_t id(int64_t place) const { return order.defined() ? order.const_data_ptr<int64_t>()[place] : place; }
  int64_t count() const { return index.defined() ? index.size(0) : input.size(0); }
};

HeadGradients run_head(const HeadCall& call, RowPass& pass, GradFilter* filter = nullptr);

// Bytes that it holds at most, beyond inputs and gradients, in chunks of so many rows and columns. Rows come in whole
// panels and columns in whole tiles, or all; `cast`: the weight is of another dtype, or its rows are not contiguous.
int64_t head_bytes(
    int64_t rows, int64_t columns, int64_t vocab, int64_t hidden, at::ScalarType dtype, bool values, bool cast,
    int64_t more_kept = 0);

// Rows of a panel, columns of a tile.
std::tuple<int64_t, int64_t> tile_shape(at::ScalarType dtype);
// Bytes of what is multiplied: 4 where there are no products of 16 bits, or none that pay.
int64_t product_itemsize(at::ScalarType dtype);

}  // namespace ssd_core::cpu
