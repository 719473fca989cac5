#include "linear_head.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "grad_filter.h"
#include "workspace.h"

namespace ssd_core::cpu {

namespace {

constexpr int64_t kStepBytes = 8 << 20;  // of gradient, between its two uses

class Head {
 public:
  Head(const HeadCall& call, RowPass& pass, GradFilter* filter)
      : call_(call), pass_(pass), filter_(filter), words_(words_of(call.dtype, pass.keeps_values())),
        kernels_(*words_.kernels), weight_(call.weight, call.dtype, words_, call.order), panel_(kernels_.panel),
        count_(call.count()), hidden_(call.input.size(1)) {
    grid_.panel = panel_;
    const int64_t needed = divide_up(std::max<int64_t>(count_, 1), panel_);
    grid_.panels = std::min(divide_up(std::max<int64_t>(call.rows, 1), panel_), needed);
    grid_.vocab = call.weight.size(0);
    grid_.extent = pass.extent(grid_.vocab);
    grid_.tiles = divide_up(grid_.extent, kTile);
    step_ = call.shared ? std::min(std::max<int64_t>(call.rows, 1), grid_.panels * panel_) : grid_.panels * panel_;
    span_ = call.columns >= grid_.extent ? grid_.tiles : std::max<int64_t>(1, call.columns / kTile);
    for (int k = 0; k < 3; ++k) {
      needs_[k] = call.needs[k] && call.scaled;
    }
  }

  HeadGradients run() {
    allocate();
    for (int64_t begin = 0; begin < count_; begin += step_) {
      run_chunk(begin, std::min(step_, count_ - begin));
    }
    if (filter_ && call_.scaled) {
      filter_->close();
    }
    if (d_weight_.defined() && !call_.keep_float32 && d_weight_.scalar_type() != call_.weight.scalar_type()) {
      d_weight_ = at::empty(call_.weight.sizes(), call_.weight.options()).copy_(d_weight_);
    }
    if (d_bias_.defined() && call_.order.defined()) {
      d_bias_ = at::empty_like(d_bias_).index_copy_(0, call_.order, d_bias_);
    }
    if (d_bias_.defined() && !call_.keep_float32) {
      d_bias_ = d_bias_.to(call_.bias.scalar_type());
    }
    return {d_input_, d_weight_, d_bias_};
  }

 private:
  void allocate() {
    const auto floats = call_.input.options().dtype(at::kFloat);
    const auto bytes = [&](int64_t n) { return workspace_.empty({std::max<int64_t>(n, 1)}, at::kByte); };
    const int64_t chunk = grid_.panels * panel_;
    kept_tile_ = kTile * panel_ * (words_.kept_element() + pass_.more_kept());
    kept_stride_ = std::min(span_, grid_.tiles) * kept_tile_;
    by_token_ = bytes(grid_.panels * words_.words(hidden_) * panel_ * 4);
    pass_.allocate(grid_, words_);
    if (call_.scaled || pass_.looks_twice()) {
      kept_ = bytes(grid_.panels * kept_stride_);
    }
    const bool filtered_input = filter_ && filter_->filters_input();
    const bool filtered_weight = filter_ && filter_->filters_weight();
    if (needs_[0]) {
      d_input_ = at::zeros(call_.input.sizes(), call_.shared ? floats : call_.input.options());
      if (!filtered_input) {
        d_tokens_ = workspace_.empty({grid_.panels, hidden_, panel_}, at::kFloat);
      }
    }
    if (needs_[1]) {
      const bool once = !call_.keep_float32 && (filtered_weight || count_ <= step_);
      const auto options = call_.weight.options().dtype(once ? call_.weight.scalar_type() : at::kFloat);
      d_weight_ = count_ > 0 ? at::empty(call_.weight.sizes(), options) : at::zeros(call_.weight.sizes(), options);
      if (!filtered_weight) {
        by_coordinate_ = bytes(divide_up(hidden_, panel_) * words_.words(chunk) * panel_ * 4);
      }
    }
    if (needs_[2]) {
      d_bias_ = at::zeros({grid_.vocab}, floats);
    }
    if (filter_) {
      filter_->allocate(call_, grid_, words_, weight_, d_input_, d_weight_);
    }
  }

  void run_chunk(int64_t begin, int64_t n) {
    const at::Tensor index = call_.index.defined() ? call_.index.slice(0, begin, begin + n) : at::Tensor();
    chunk_ = {begin, n, divide_up(n, panel_), index};
    const at::ScalarType compute = words_.pairs ? at::kBFloat16 : at::kFloat;
    const at::Tensor x = chunk_.of(call_.input).to(call_.dtype).to(compute).contiguous();
    const auto* data = static_cast<const char*>(x.const_data_ptr());
    pack_by_token(data, n, hidden_, words_, static_cast<uint32_t*>(by_token_.mutable_data_ptr()));
    if (by_coordinate_.defined()) {
      auto* out = static_cast<uint32_t*>(by_coordinate_.mutable_data_ptr());
      pack_by_coordinate(data, n, hidden_, words_, out, depth_of_tokens());
    }
    pass_.open(chunk_);
    look_at_all();
    pass_.normalise();
    if (pass_.looks_twice()) {
      for (int64_t k = spans() - 1; k >= 0; --k) {
        const Span span = keep_span(k);
        each_block(span.first, span.last, [&](const Block& block, int64_t p) {
          pass_.look_twice(block, kept_of(p, block.tile, span.first));
        });
      }
    }
    pass_.finish();
    if (filter_) {
      filter_->open(chunk_, x);
    }
    if (!call_.scaled) {
      return;
    }
    for (int64_t k = 0; k < spans(); ++k) {
      const Span span = keep_span(k);
      const int64_t first = span.first, last = span.last;
      // in steps whose gradient is still in cache when d_input's product reads it, and that threads share evenly, but
      // where they decide when the filter multiplies
      const int64_t most = filter_ ? std::min(kStepBytes, filter_->room()) : kStepBytes;
      const int64_t steps = divide_up((last - first) * kTile * chunk_.n * words_.element(), most);
      const int64_t threads = filter_ ? 1 : at::get_num_threads();
      const int64_t step = divide_up(divide_up(last - first, steps), threads) * threads;
      for (int64_t tile = first; tile < last; tile += step) {
        if (filter_) {
          filter_->make_room(tile, std::min(tile + step, last));
        }
        gradients(tile, std::min(tile + step, last), first);
        if (d_tokens_.defined()) {
          input_products(tile, std::min(tile + step, last), first);
        }
      }
    }
    if (d_tokens_.defined()) {
      store_input();
    }
    if (filter_) {
      filter_->end_chunk();
    }
  }

  // The vocabulary in spans of as many tiles as can be kept. The gradient goes up the vocabulary, a second look before it
  // down: what pass A keeps is the span that comes next, and not the one that has the rest.
  struct Span {
    int64_t first, last;  // tiles
  };
  int64_t spans() const { return divide_up(grid_.tiles, span_); }
  Span span(int64_t k) const {
    const int64_t missing = pass_.looks_twice() ? spans() * span_ - grid_.tiles : 0;
    return {std::max<int64_t>(k * span_ - missing, 0), std::min((k + 1) * span_ - missing, grid_.tiles)};
  }

  void look_at_all() {
    kept_span_ = pass_.looks_twice() ? spans() - 1 : call_.scaled ? 0 : -1;
    const Span kept = kept_span_ < 0 ? Span{0, 0} : span(kept_span_);
    look(0, kept.first, false, false);
    look(kept.first, kept.last, true, false);
    look(kept.last, grid_.tiles, false, false);
  }

  // Its products again, unless it is what is kept.
  Span keep_span(int64_t k) {
    const Span wanted = span(k);
    if (kept_span_ != k) {
      look(wanted.first, wanted.last, true, true);
      kept_span_ = k;
    }
    return wanted;
  }

  Block block(int64_t tile, int64_t panel) const {
    const int64_t first = tile * kTile;
    return {tile, panel, first, grid_.rows(tile), std::clamp<int64_t>(grid_.vocab - first, 0, kTile)};
  }

  template <class Function>
  void each_block(int64_t first_tile, int64_t last_tile, const Function& function) const {
    at::parallel_for(first_tile, last_tile, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t p = 0; p < chunk_.panels; ++p) {
          function(block(t, p), p);
        }
      }
    });
  }

  int64_t depth_of_tokens() const { return words_.words(chunk_.panels * panel_); }

  // What is kept of a tile, the first of them `origin`.
  char* kept_of(int64_t p, int64_t tile, int64_t origin) const {
    return static_cast<char*>(kept_.mutable_data_ptr()) + p * kept_stride_ +
        (tile - origin) * kept_tile_;
  }

  // The products of some tiles, and what the pass makes of them.
  void look(int64_t first_tile, int64_t last_tile, bool keep, bool again) {
    const int64_t depth = words_.words(hidden_);
    at::parallel_for(first_tile, last_tile, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<char[]> scratch(new char[weight_.scratch() + 64]), own(new char[pass_.scratch() + 64]);
      std::vector<float> u((kTile + 1) * panel_);
      for (int64_t t = begin; t < end; ++t) {
        const Block all = block(t, 0);
        const Weight::Rows w = weight_.tile(all.first, all.own, scratch.get());
        pass_.open_tile(t, own.get());
        for (int64_t p = 0; p < chunk_.panels; ++p) {
          char* kept = keep ? kept_of(p, t, first_tile) : nullptr;
          float* out = kept && pass_.keeps_values() ? reinterpret_cast<float*>(kept) : u.data();
          multiply_tokens(words_, w, tokens_of(p), depth, all.own, out);
          pass_.look(block(t, p), out, kept, again, own.get());
        }
      }
    });
  }

  const char* tokens_of(int64_t p) const {
    return static_cast<const char*>(by_token_.const_data_ptr()) + p * words_.words(hidden_) * panel_ * 4;
  }

  // Pass B: the gradient in place of what was kept, and d_weight, d_bias.
  void gradients(int64_t first_tile, int64_t last_tile, int64_t origin) {
    const int64_t row_bytes = chunk_.panels * panel_ * words_.element();
    at::parallel_for(first_tile, last_tile, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<char[]> by_row(new char[(kTile + 1) * row_bytes]);
      std::vector<float> product(kTile * panel_);
      for (int64_t t = begin; t < end; ++t) {
        const Block all = block(t, 0);
        if (all.own == 0) {
          continue;
        }
        for (int64_t p = 0; p < chunk_.panels; ++p) {
          char* kept = kept_of(p, t, origin);
          pass_.gradient(block(t, p), kept, by_row.get() + p * panel_ * words_.element(), row_bytes);
          if (all.own % 2) {
            clear_row(kept, all.own);
          }
        }
        clear_lanes(by_row.get(), all.own, row_bytes);
        if (d_bias_.defined()) {
          add_rows(by_row.get(), all.own, row_bytes, d_bias_.mutable_data_ptr<float>() + all.first);
        }
        if (filter_) {
          filter_->take(all, kept_of(0, t, origin), kept_stride_, by_row.get(), row_bytes);
        }
        if (by_coordinate_.defined()) {
          weight_products(all, by_row.get(), row_bytes, product.data());
        }
      }
    });
  }

  // The second half of a last pair, which no id has.
  void clear_row(char* kept, int64_t row) const {
    for (int64_t lane = 0; lane < panel_; ++lane) {
      store_word_element(words_, kept, row, lane, 0.0f);
    }
  }

  // What fills up the last panel: no token's, but an infinite weight makes it NaN.
  void clear_lanes(char* by_row, int64_t rows, int64_t row_bytes) const {
    const int64_t used = chunk_.n * words_.element();
    for (int64_t j = 0; j < rows && used < row_bytes; ++j) {
      std::fill_n(by_row + j * row_bytes + used, row_bytes - used, char{});
    }
  }

  void weight_products(const Block& all, const char* by_row, int64_t row_bytes, float* product) {
    const int64_t depth = depth_of_tokens();
    const bool add = chunk_.begin > 0, narrow = d_weight_.scalar_type() != at::kFloat;
    for (int64_t q = 0; q < divide_up(hidden_, panel_); ++q) {
      const int64_t width = std::min(panel_, hidden_ - q * panel_);
      const char* b = static_cast<const char*>(by_coordinate_.const_data_ptr()) + q * depth * panel_ * 4;
      if (!narrow && width == panel_ && !call_.order.defined()) {
        float* c = d_weight_.mutable_data_ptr<float>() + all.first * hidden_ + q * panel_;
        kernels_.gemm(by_row, row_bytes, 4, b, panel_ * 4, c, hidden_, all.own, depth, add, nullptr);
        continue;
      }
      kernels_.gemm(by_row, row_bytes, 4, b, panel_ * 4, product, panel_, all.own, depth, false, nullptr);
      for (int64_t j = 0; j < all.own; ++j) {
        store_floats(d_weight_, call_.id(all.first + j) * hidden_ + q * panel_, product + j * panel_, width, add);
      }
    }
  }

  void add_rows(const char* by_row, int64_t rows, int64_t row_bytes, float* out) const {
    for (int64_t j = 0; j < rows; ++j) {
      double sum = 0;
      for (int64_t i = 0; i < chunk_.n; ++i) {
        const char* row = by_row + j * row_bytes;
        sum += words_.pairs ? static_cast<float>(reinterpret_cast<const c10::BFloat16*>(row)[i])
                            : reinterpret_cast<const float*>(row)[i];
      }
      out[j] += static_cast<float>(sum);
    }
  }

  // d_input of the chunk, by coordinate: each is summed by one thread in the order of the vocabulary.
  void input_products(int64_t first_tile, int64_t last_tile, int64_t origin) {
    const int64_t threads = at::get_num_threads();
    constexpr int64_t kStep = 48;  // coordinates at least: whole blocks of the product
    const int64_t parts = std::clamp<int64_t>(threads, 1, divide_up(hidden_, kStep));
    const int64_t size = divide_up(divide_up(hidden_, parts), 6) * 6;
    const int64_t groups = std::clamp<int64_t>(divide_up(threads, parts), 1, chunk_.panels);
    at::parallel_for(0, parts * groups, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<char[]> scratch(new char[weight_.scratch() + 64]);
      const int64_t stride = slice_stride(size);
      std::vector<uint32_t> slice(words_.words(kTile) * stride);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t d0 = item % parts * size, d1 = std::min(d0 + size, hidden_), width = d1 - d0;
        const int64_t p0 = item / parts * chunk_.panels / groups, p1 = (item / parts + 1) * chunk_.panels / groups;
        for (int64_t t = first_tile; width > 0 && t < last_tile && block(t, 0).own > 0; ++t) {
          const int64_t rows = block(t, 0).own;
          const Weight::Rows w = weight_.tile(t * kTile, rows, scratch.get());
          kernels_.transposed_words(
              w.data + d0 * words_.element(), w.row, rows, width, slice.data(), stride, w.places);
          for (int64_t p = p0; p < p1; ++p) {
            float* c = d_tokens_.mutable_data_ptr<float>() + (p * hidden_ + d0) * panel_;
            kernels_.gemm(
                slice.data(), 4, stride * 4, kept_of(p, t, origin), words_.kept_row(), c, panel_, width,
                words_.words(rows), t > 0, nullptr);
          }
        }
      }
    });
  }

  void store_input() {
    const at::Tensor part = d_tokens_.permute({0, 2, 1})
                                .reshape({grid_.panels * panel_, hidden_})
                                .slice(0, 0, chunk_.n)
                                .to(d_input_.scalar_type());
    if (chunk_.index.defined()) {
      d_input_.index_copy_(0, chunk_.index, part);
    } else {
      d_input_.slice(0, chunk_.begin, chunk_.begin + chunk_.n).copy_(part);
    }
  }

  const HeadCall& call_;
  RowPass& pass_;
  GradFilter* filter_;
  Workspace workspace_;
  Words words_;
  const TileKernels& kernels_;
  Weight weight_;
  int64_t panel_, count_, hidden_, step_, span_, kept_span_ = -1, kept_stride_ = 0, kept_tile_ = 0;
  Grid grid_;
  std::array<bool, 3> needs_;
  Chunk chunk_;
  at::Tensor d_input_, d_weight_, d_bias_;
  at::Tensor by_token_, by_coordinate_;  // hidden states of a chunk
  at::Tensor kept_, d_tokens_;
};

}  // namespace

at::Tensor Chunk::of(const at::Tensor& x) const {
  return index.defined() ? x.index_select(0, index) : x.slice(0, begin, begin + n);
}

void TileNumbers::allocate(const Grid& grid) {
  tiles_ = divide_up(grid.tiles, 2) * 2;
  width_ = grid.panel;
  data_ = at::empty({grid.panels * tiles_ * width_}, at::TensorOptions(at::kFloat));
}

void TileNumbers::pad(const Grid& grid, float number) {
  for (int64_t p = 0; tiles_ != grid.tiles && p < grid.panels; ++p) {
    std::fill_n(of(p, grid.tiles), width_, number);
  }
}

void TileExponentials::allocate(const Grid& grid) {
  max.allocate(grid);
  sum.allocate(grid);
}

void TileExponentials::open(const Grid& grid) {
  max.pad(grid, -kInfinity);
  sum.pad(grid, 0.0f);
}

void TileExponentials::finish(
    const Words& words, float slope, int64_t panel, float* row_max, double* row_sum) const {
  const TileOptions plain = {false, 0.0f, slope};
  const int64_t width = words.floats->panel;
  std::vector<float> ignored(width);
  float* shift = max.of(panel);
  const float* part = sum.of(panel);
  words.floats->values(shift, max.tiles(), nullptr, plain, row_max);
  words.floats->exponentials(shift, max.tiles(), row_max, plain, shift, ignored.data());
  std::fill_n(row_sum, width, 0.0);
  for (int64_t t = 0; t < max.tiles(); ++t) {
    for (int64_t lane = 0; lane < width; ++lane) {
      row_sum[lane] += static_cast<double>(part[t * width + lane]) * shift[t * width + lane];
    }
  }
}

void TileExponentials::rebase(int64_t panel, int64_t lane, double factor) const {
  float* shift = max.of(panel) + lane;
  for (int64_t t = 0; t < max.tiles(); ++t, shift += max.width()) {
    *shift = static_cast<float>(*shift * factor);
  }
}

void TileSpread::allocate(const Grid& grid) {
  sum_.allocate(grid);
  max_.allocate(grid);
}

void TileSpread::look(
    const Words& words, const Block& block, const float* v, const float* max, const float* class_weight) {
  words.kernels->spread(
      v, block.own, max, class_weight ? class_weight + block.first : nullptr, sum_.of(block.panel, block.tile));
  std::copy_n(max, words.kernels->panel, max_.of(block.panel, block.tile));
}

void TileSpread::finish(const Grid& grid, const float* class_weight, int64_t p, Spread* row) const {
  const int64_t panel = grid.panel, tiles = divide_up(grid.vocab, kTile);
  std::vector<float> row_max(panel, -kInfinity);
  for (int64_t t = 0; t < tiles; ++t) {
    const float* max = max_.of(p, t);
    for (int64_t lane = 0; lane < panel; ++lane) {
      row_max[lane] = std::max(row_max[lane], max[lane]);
    }
  }
  for (int64_t lane = 0; lane < panel; ++lane) {
    row[lane] = {row_max[lane], 0.0, 0.0};
  }
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t rows = std::min(kTile, grid.vocab - t * kTile);
    double weight = static_cast<double>(rows);
    if (class_weight) {
      weight = std::accumulate(class_weight + t * kTile, class_weight + t * kTile + rows, 0.0);
    }
    const float* sum = sum_.of(p, t);
    const float* max = max_.of(p, t);
    for (int64_t lane = 0; lane < panel; ++lane) {
      const double shift = max[lane] == -kInfinity ? 0.0 : max[lane];
      row[lane].weight += weight;
      row[lane].sum += sum[lane] + weight * (static_cast<double>(row_max[lane]) - shift);
    }
  }
}

HeadGradients run_head(const HeadCall& call, RowPass& pass, GradFilter* filter) {
  return Head(call, pass, filter).run();
}

// What Head::allocate and its methods hold, if all gradients are asked for and rows are gathered.
int64_t head_bytes(
    int64_t rows, int64_t columns, int64_t vocab, int64_t hidden, at::ScalarType dtype, bool values, bool cast,
    int64_t more_kept) {
  const Words words = words_of(dtype, values);
  const int64_t panel = words.kernels->panel, threads = counted_threads();
  rows = divide_up(rows, panel) * panel;
  columns = columns < vocab ? columns / kTile * kTile : vocab;
  const int64_t width = divide_up(hidden, panel) * panel;
  const int64_t kept = rows * divide_up(columns, kTile) * kTile * (words.kept_element() + more_kept);
  const int64_t states = rows * (hidden + 1 + width) * words.element() + rows * hidden * (4 + words.element());
  const int64_t d_input = rows * hidden * (4 + 4 + 2);
  const bool packed = cast || (words.pairs ? hidden % 2 != 0 : dtype != at::kFloat);
  const int64_t thread = (kTile + 1) * (panel * 4 * 2 + rows * words.element() + (packed ? (hidden + 1) * 4 : 0));
  const int64_t slices = words.words(kTile) * (hidden + 48 * threads) * 4;
  return kept + states + d_input + threads * thread + slices + (dtype == at::kFloat ? 0 : vocab * 4);
}

std::tuple<int64_t, int64_t> tile_shape(at::ScalarType dtype) {
  return {words_of(dtype, false).kernels->panel, kTile};
}

int64_t product_itemsize(at::ScalarType dtype) {
  return words_of(dtype, false).element();
}

}  // namespace ssd_core::cpu
