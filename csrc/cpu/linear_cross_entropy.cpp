#include "linear_cross_entropy.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "cross_entropy_terms.h"
#include "head_operands.h"
#include "tile_kernels.h"

namespace ssd_core::cpu {

namespace {

constexpr int64_t kDepth = 640;          // words that a product sums in one go: a panel of so many stays in cache
constexpr int64_t kStepBytes = 8 << 20;  // of gradient, between its two uses
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// -- targets of a chunk

struct Targets {
  std::vector<TargetEntry> entries;  // by token
  std::vector<int32_t> token;        // of each entry
  std::vector<RowTarget> rows;       // (n,)
  std::vector<int32_t> by_tile;      // places in entries, by tile and then by token
  std::vector<int64_t> tile_first;   // (tiles + 1,)
};

template <class Function>
void each_target(const Targets& targets, int64_t tile, int64_t begin, int64_t end, const Function& function) {
  const auto* places = targets.by_tile.data();
  const auto earlier = [&](int32_t place, int64_t token) { return targets.token[place] < token; };
  const auto* last = places + targets.tile_first[tile + 1];
  for (const auto* at = std::lower_bound(places + targets.tile_first[tile], last, begin, earlier);
       at != last && targets.token[*at] < end; ++at) {
    function(*at, targets.token[*at] - begin);
  }
}

struct Tensors {
  at::Tensor ids, probs, class_weight, row_scale, bias;
};

// -- the call

class Call {
 public:
  Call(
      const at::Tensor& input, const at::Tensor& weight, const Tensors& given, const at::Tensor& index,
      at::ScalarType dtype, std::array<bool, 3> needs, bool keep_float32, int64_t rows, int64_t columns,
      const RowOptions& options, bool bucket)
      : input_(input), given_(given), index_(index), dtype_(dtype), needs_(needs), keep_float32_(keep_float32),
        options_(options), bucket_(bucket), words_(words_of(dtype, options.softcap > 0)),
        kernels_(*words_.kernels), weight_tensor_(weight), weight_(weight, dtype, words_), panel_(kernels_.panel),
        count_(index.defined() ? index.size(0) : input.size(0)), hidden_(input.size(1)), vocab_(weight.size(0)),
        tiles_(divide_up(vocab_, kTile)) {
    chunk_ = std::min(divide_up(std::max<int64_t>(rows, 1), panel_), divide_up(std::max<int64_t>(count_, 1), panel_));
    chunk_ *= panel_;
    span_ = columns >= vocab_ ? tiles_ : std::max<int64_t>(1, columns / kTile);
    tile_options_ = {options.softcap > 0, options.cap_slope, options.slope};
  }

  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> run() {
    const auto floats = input_.options().dtype(at::kFloat);
    loss_ = at::empty({count_}, floats);
    nll_ = at::empty({count_}, floats);
    lse_ = at::empty({count_}, floats);
    const bool scaled = given_.row_scale.defined();
    for (int k = 0; k < 3; ++k) {
      needs_[k] = needs_[k] && scaled;
    }
    allocate(scaled);
    for (int64_t begin = 0; begin < count_; begin += chunk_) {
      run_chunk(begin, std::min(chunk_, count_ - begin));
    }
    if (d_weight_.defined() && !keep_float32_ && d_weight_.scalar_type() != weight_tensor_.scalar_type()) {
      d_weight_ = empty(weight_tensor_.sizes(), weight_tensor_.options()).copy_(d_weight_);
    }
    if (d_bias_.defined() && !keep_float32_) {
      d_bias_ = d_bias_.to(given_.bias.scalar_type());
    }
    return {loss_, nll_, lse_, d_input_, d_weight_, d_bias_};
  }

 private:
  void allocate(bool scaled) {
    const auto floats = input_.options().dtype(at::kFloat);
    const auto bytes = [&](int64_t n) { return empty({std::max<int64_t>(n, 1)}, input_.options().dtype(at::kByte)); };
    bias_ = given_.bias.defined() ? given_.bias.to(at::kFloat).contiguous() : at::Tensor();
    const int64_t panels = chunk_ / panel_, depth = words_.words(hidden_), coordinates = divide_up(hidden_, panel_);
    kept_stride_ = divide_up(std::min(span_ * kTile, vocab_), 2) * 2 * panel_ * words_.kept_element();
    by_token_ = bytes(panels * depth * panel_ * 4);
    stats_ = divide_up(tiles_, 2) * 2 * panel_;
    max_ = empty({panels * stats_}, floats);
    sum_ = empty({panels * stats_}, floats);
    if (options_.label_smoothing > 0) {
      spread_ = empty({2 * panels * stats_}, floats);
    }
    if (scaled) {
      kept_ = bytes(panels * kept_stride_);
      factor_ = empty({3 * chunk_}, floats);
    }
    if (needs_[0]) {
      d_input_ = at::zeros_like(input_);
      d_tokens_ = empty({panels, hidden_, panel_}, floats);
    }
    if (needs_[1]) {
      by_coordinate_ = bytes(coordinates * words_.words(chunk_) * panel_ * 4);
      const bool once = count_ <= chunk_ && !keep_float32_;
      const auto dtype = once ? weight_tensor_.scalar_type() : at::kFloat;
      d_weight_ = count_ > 0 ? empty(weight_tensor_.sizes(), weight_tensor_.options().dtype(dtype))
                             : at::zeros(weight_tensor_.sizes(), weight_tensor_.options().dtype(dtype));
    }
    if (needs_[2]) {
      d_bias_ = at::zeros({vocab_}, floats);
    }
  }

  void run_chunk(int64_t begin, int64_t n) {
    begin_ = begin;
    n_ = n;
    const at::Tensor rows = index_.defined() ? index_.slice(0, begin, begin + n) : at::Tensor();
    const at::ScalarType compute = words_.pairs ? at::kBFloat16 : at::kFloat;
    const at::Tensor part = rows.defined() ? input_.index_select(0, rows) : input_.slice(0, begin, begin + n);
    const at::Tensor x = part.to(dtype_).to(compute).contiguous();
    pack_by_token(
        static_cast<const char*>(x.const_data_ptr()), n, hidden_, words_,
        static_cast<uint32_t*>(by_token_.mutable_data_ptr()));
    if (needs_[1]) {
      pack_by_coordinate(
          static_cast<const char*>(x.const_data_ptr()), n, hidden_, words_,
          static_cast<uint32_t*>(by_coordinate_.mutable_data_ptr()), depth_of_tokens());
    }
    read_targets(rows);
    const bool scaled = given_.row_scale.defined(), whole = span_ == tiles_;
    pad_statistics();
    exponentials(0, tiles_, scaled && whole, true);
    finish_rows();
    if (!scaled) {
      return;
    }
    for (int64_t first = 0; first < tiles_; first += span_) {
      const int64_t last = std::min(first + span_, tiles_);
      if (!whole) {
        exponentials(first, last, true, false);
      }
      // in steps whose gradient is still in cache when d_input's product reads it, and that threads share evenly
      const int64_t steps = divide_up((last - first) * kTile * n_ * words_.element(), kStepBytes);
      const int64_t threads = at::get_num_threads();
      const int64_t step = divide_up(divide_up(last - first, steps), threads) * threads;
      for (int64_t tile = first; tile < last; tile += step) {
        gradients(tile, std::min(tile + step, last), first);
        if (needs_[0]) {
          input_products(tile, std::min(tile + step, last), first);
        }
      }
    }
    if (needs_[0]) {
      const at::Tensor d_part =
          d_tokens_.permute({0, 2, 1}).reshape({chunk_, hidden_}).slice(0, 0, n).to(input_.scalar_type());
      if (rows.defined()) {
        d_input_.index_copy_(0, rows, d_part);
      } else {
        d_input_.slice(0, begin, begin + n).copy_(d_part);
      }
    }
  }

  int64_t panels() const { return divide_up(n_, panel_); }
  int64_t depth_of_tokens() const { return words_.words(panels() * panel_); }
  int64_t tile_rows(int64_t tile) const { return std::min(kTile, vocab_ - tile * kTile); }
  const char* tokens_of(int64_t p) const {
    return static_cast<const char*>(by_token_.const_data_ptr()) + p * words_.words(hidden_) * panel_ * 4;
  }
  // What is kept of a tile, the first of them `origin`.
  char* kept_of(int64_t p, int64_t tile, int64_t origin) const {
    return static_cast<char*>(kept_.mutable_data_ptr()) + p * kept_stride_ +
        (tile - origin) * kTile * panel_ * words_.kept_element();
  }
  float* stats_of(const at::Tensor& stats, int64_t p, int64_t tile) const {
    return stats.mutable_data_ptr<float>() + p * stats_ + tile * panel_;
  }

  void read_targets(const at::Tensor& rows) {
    const at::Tensor ids = rows.defined() ? given_.ids.index_select(0, rows) : given_.ids.slice(0, begin_, begin_ + n_);
    const at::Tensor ids_c = ids.contiguous();
    at::Tensor probs_c;
    if (given_.probs.defined()) {
      probs_c = (rows.defined() ? given_.probs.index_select(0, rows) : given_.probs.slice(0, begin_, begin_ + n_))
                    .contiguous();
    }
    const int64_t width = ids_c.size(1);
    const int64_t* id_data = ids_c.const_data_ptr<int64_t>();
    const float* prob_data = probs_c.defined() ? probs_c.const_data_ptr<float>() : nullptr;
    check_ids(id_data, prob_data, n_, width, vocab_);
    TargetReader reader(width, vocab_);
    Targets& targets = targets_;
    targets.entries.clear();
    targets.token.clear();
    targets.rows.clear();
    targets.entries.reserve(n_ * width);  // rows point into it
    targets.tile_first.assign(tiles_ + 1, 0);
    for (int64_t i = 0; i < n_; ++i) {
      RowTarget target =
          reader.read(id_data + i * width, prob_data ? prob_data + i * width : nullptr, options_, bucket_);
      targets.entries.insert(targets.entries.end(), target.entries, target.entries + target.count);
      target.entries = targets.entries.data() + targets.entries.size() - target.count;
      targets.token.insert(targets.token.end(), target.count, static_cast<int32_t>(i));
      targets.rows.push_back(target);
    }
    for (const TargetEntry& entry : targets.entries) {
      ++targets.tile_first[entry.id / kTile + 1];
    }
    for (int64_t t = 0; t < tiles_; ++t) {
      targets.tile_first[t + 1] += targets.tile_first[t];
    }
    targets.by_tile.resize(targets.entries.size());
    std::vector<int64_t> next(targets.tile_first.begin(), targets.tile_first.end() - 1);
    for (size_t e = 0; e < targets.entries.size(); ++e) {
      targets.by_tile[next[targets.entries[e].id / kTile]++] = static_cast<int32_t>(e);
    }
  }

  void pad_statistics() {
    if (tiles_ % 2) {
      for (int64_t p = 0; p < panels(); ++p) {
        std::fill_n(stats_of(max_, p, tiles_), panel_, -kInfinity);
        std::fill_n(stats_of(sum_, p, tiles_), panel_, 0.0f);
      }
    }
  }

  // Pass A, and again where nothing was kept.
  void exponentials(int64_t first_tile, int64_t last_tile, bool keep, bool note) {
    const int64_t depth = words_.words(hidden_), block = divide_up(depth, divide_up(depth, kDepth));
    at::parallel_for(first_tile, last_tile, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<char[]> scratch(new char[weight_.scratch() + 64]);
      std::vector<float> tile((kTile + 1) * panel_), unused(2 * panel_);
      float* u = tile.data();
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = t * kTile, rows = tile_rows(t), even = divide_up(rows, 2) * 2;
        const Weight::Rows w = weight_.tile(first, rows, scratch.get());
        const float* bias = bias_.defined() ? bias_.const_data_ptr<float>() + first : nullptr;
        for (int64_t p = 0; p < panels(); ++p) {
          for (int64_t k = 0; k < depth; k += block) {
            kernels_.gemm(
                w.data + k * 4, w.row, 4, tokens_of(p) + k * panel_ * 4, panel_ * 4, u, panel_, rows,
                std::min(block, depth - k), k > 0);
          }
          float* max = note ? stats_of(max_, p, t) : unused.data();
          float* sum = note ? stats_of(sum_, p, t) : unused.data() + panel_;
          kernels_.values(u, rows, bias, tile_options_, max);
          if (note && spread_.defined()) {
            const float* weight = options_.class_weight ? options_.class_weight + first : nullptr;
            kernels_.spread(u, rows, max, weight, stats_of(spread_, p, t));
            std::copy_n(max, panel_, stats_of(spread_, panels_of_chunk() + p, t));
          }
          bool removed = false;
          each_target(targets_, t, p * panel_, (p + 1) * panel_, [&](int32_t place, int64_t lane) {
            TargetEntry& entry = targets_.entries[place];
            float& v = u[(entry.id - first) * panel_ + lane];
            entry.value = note ? v : entry.value;
            if (targets_.rows[p * panel_ + lane].tail > 0) {  // the sum is then of what is off the support
              v = -kInfinity;
              removed = true;
            }
          });
          if (removed) {
            kernels_.values(u, rows, nullptr, {false, 0.0f, tile_options_.slope}, max);
          }
          std::fill(u + rows * panel_, u + even * panel_, -kInfinity);
          kernels_.exponentials(u, even, max, tile_options_, keep ? kept_of(p, t, first_tile) : nullptr, sum);
        }
      }
    });
  }

  int64_t panels_of_chunk() const { return chunk_ / panel_; }

  // The row's statistics from its tiles', results, and what the gradient needs.
  void finish_rows() {
    terms_.resize(n_);
    const bool scaled = given_.row_scale.defined();
    at::parallel_for(0, panels(), 1, [&](int64_t begin, int64_t end) {
      std::vector<float> dense_max(panel_), ignored(panel_);
      std::vector<double> dense_sum(panel_), spread(panel_);
      const TileOptions plain = {false, 0.0f, tile_options_.slope};
      for (int64_t p = begin; p < end; ++p) {
        float* max = stats_of(max_, p, 0);
        const float* sum = stats_of(sum_, p, 0);
        const int64_t even = divide_up(tiles_, 2) * 2;
        words_.floats->values(max, even, nullptr, plain, dense_max.data());
        if (spread_.defined()) {
          add_spread(p, spread.data());
        }
        // from here on max holds exp(slope * (tile's max - row's max))
        words_.floats->exponentials(max, even, dense_max.data(), plain, max, ignored.data());
        std::fill(dense_sum.begin(), dense_sum.end(), 0.0);
        for (int64_t t = 0; t < tiles_; ++t) {
          for (int64_t lane = 0; lane < panel_; ++lane) {
            dense_sum[lane] += static_cast<double>(sum[t * panel_ + lane]) * max[t * panel_ + lane];
          }
        }
        float* lanes = scaled ? factor_.mutable_data_ptr<float>() + 3 * p * panel_ : nullptr;
        for (int64_t lane = 0; lane < panel_; ++lane) {
          const int64_t i = p * panel_ + lane;
          if (i >= n_) {
            if (scaled) {
              lanes[lane] = lanes[panel_ + lane] = lanes[2 * panel_ + lane] = 0.0f;
            }
            continue;
          }
          const RowSums found = {dense_max[lane], dense_sum[lane], spread[lane]};
          const float scale = scaled ? given_.row_scale.const_data_ptr<float>()[begin_ + i] : 0.0f;
          terms_[i] = finish_row(options_, found, targets_.rows[i], scale);
          loss_.mutable_data_ptr<float>()[begin_ + i] = terms_[i].loss;
          nll_.mutable_data_ptr<float>()[begin_ + i] = terms_[i].nll;
          lse_.mutable_data_ptr<float>()[begin_ + i] = terms_[i].lse;
          if (scaled) {
            lanes[lane] = terms_[i].gradient.mass;
            lanes[panel_ + lane] = terms_[i].gradient.uniform;
            lanes[2 * panel_ + lane] = terms_[i].gradient.max;
          }
        }
      }
    });
  }

  // sum_j c_j (max - v_j) over all tiles, max that of the whole row.
  void add_spread(int64_t p, double* total) {
    std::vector<float> row_max(panel_, -kInfinity);
    for (int64_t t = 0; t < tiles_; ++t) {
      const float* max = stats_of(spread_, panels_of_chunk() + p, t);
      for (int64_t lane = 0; lane < panel_; ++lane) {
        row_max[lane] = std::max(row_max[lane], max[lane]);
      }
    }
    std::fill_n(total, panel_, 0.0);
    for (int64_t t = 0; t < tiles_; ++t) {
      double weight = static_cast<double>(tile_rows(t));
      if (options_.class_weight) {
        const float* first = options_.class_weight + t * kTile;
        weight = std::accumulate(first, first + tile_rows(t), 0.0);
      }
      const float* spread = stats_of(spread_, p, t);
      const float* max = stats_of(spread_, panels_of_chunk() + p, t);
      for (int64_t lane = 0; lane < panel_; ++lane) {
        const double shift = max[lane] == -kInfinity ? 0.0 : max[lane];
        total[lane] += spread[lane] + weight * (static_cast<double>(row_max[lane]) - shift);
      }
    }
  }

  // Pass B: the gradient in place of what was kept, and d_weight, d_bias.
  void gradients(int64_t first_tile, int64_t last_tile, int64_t origin) {
    const bool smooth = options_.label_smoothing > 0;
    const int64_t coordinates = divide_up(hidden_, panel_), depth = depth_of_tokens();
    const int64_t row_bytes = panels() * panel_ * words_.element();
    const bool add = begin_ > 0;
    const bool narrow = d_weight_.defined() && d_weight_.scalar_type() != at::kFloat;
    at::parallel_for(first_tile, last_tile, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<char[]> by_row(new char[(kTile + 1) * row_bytes]);
      std::vector<float> factor(panel_), product(kTile * panel_);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = t * kTile, rows = tile_rows(t), even = divide_up(rows, 2) * 2;
        const float* class_weight = smooth && options_.class_weight ? options_.class_weight + first : nullptr;
        for (int64_t p = 0; p < panels(); ++p) {
          const float* lanes = factor_.const_data_ptr<float>() + 3 * p * panel_;
          const float* shift = stats_of(max_, p, t);
          for (int64_t lane = 0; lane < panel_; ++lane) {
            factor[lane] = tile_options_.softcap ? lanes[lane] : lanes[lane] * shift[lane];
          }
          char* kept = kept_of(p, t, origin);
          char* rows_at = by_row.get() + p * panel_ * words_.element();
          kernels_.gradient(
              kept, even, class_weight, {lanes + 2 * panel_, factor.data(), smooth ? lanes + panel_ : nullptr},
              tile_options_, rows_at, row_bytes);
          each_target(targets_, t, p * panel_, (p + 1) * panel_, [&](int32_t place, int64_t lane) {
            const int64_t j = targets_.entries[place].id - first;
            const float g = target_gradient(options_, terms_[p * panel_ + lane], targets_.entries[place]);
            store(kept, j, lane, g);
            store_row(rows_at + j * row_bytes, lane, g);
          });
          if (rows != even) {
            for (int64_t lane = 0; lane < panel_; ++lane) {
              store(kept, rows, lane, 0.0f);
            }
          }
        }
        if (d_bias_.defined()) {
          add_rows(by_row.get(), rows, row_bytes, d_bias_.mutable_data_ptr<float>() + first);
        }
        for (int64_t q = 0; d_weight_.defined() && q < coordinates; ++q) {
          const int64_t width = std::min(panel_, hidden_ - q * panel_);
          const char* b = static_cast<const char*>(by_coordinate_.const_data_ptr()) + q * depth * panel_ * 4;
          const int64_t at = first * hidden_ + q * panel_;
          if (!narrow && width == panel_) {
            float* c = d_weight_.mutable_data_ptr<float>() + at;
            kernels_.gemm(by_row.get(), row_bytes, 4, b, panel_ * 4, c, hidden_, rows, depth, add);
            continue;
          }
          kernels_.gemm(by_row.get(), row_bytes, 4, b, panel_ * 4, product.data(), panel_, rows, depth, false);
          for (int64_t j = 0; j < rows; ++j) {
            const float* from = product.data() + j * panel_;
            if (narrow) {
              store_narrow(from, width, at + j * hidden_);
            } else {
              float* to = d_weight_.mutable_data_ptr<float>() + at + j * hidden_;
              for (int64_t lane = 0; lane < width; ++lane) {
                to[lane] = from[lane] + (add ? to[lane] : 0.0f);
              }
            }
          }
        }
      }
    });
  }

  void store_narrow(const float* from, int64_t width, int64_t at) {
    if (d_weight_.scalar_type() == at::kBFloat16) {
      auto* to = reinterpret_cast<uint16_t*>(d_weight_.mutable_data_ptr<c10::BFloat16>() + at);
      for (int64_t lane = 0; lane < width; ++lane) {  // to nearest even; without a branch, in vectors
        uint32_t bits;
        std::memcpy(&bits, from + lane, sizeof bits);
        const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        to[lane] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
      }
    } else {
      std::copy_n(from, width, d_weight_.mutable_data_ptr<c10::Half>() + at);
    }
  }

  void store(char* kept, int64_t j, int64_t lane, float g) const {
    if (!words_.pairs) {
      reinterpret_cast<float*>(kept)[j * panel_ + lane] = g;
    } else {
      const int64_t pair = j / 2 * (words_.wide ? 2 : 1) * panel_ + lane;
      reinterpret_cast<c10::BFloat16*>(kept)[2 * pair + j % 2] = g;
    }
  }

  void store_row(char* row, int64_t lane, float g) const {
    if (words_.pairs) {
      reinterpret_cast<c10::BFloat16*>(row)[lane] = g;
    } else {
      reinterpret_cast<float*>(row)[lane] = g;
    }
  }

  void add_rows(const char* by_row, int64_t rows, int64_t row_bytes, float* out) const {
    for (int64_t j = 0; j < rows; ++j) {
      double sum = 0;
      for (int64_t i = 0; i < n_; ++i) {
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
    const int64_t groups = std::clamp<int64_t>(divide_up(threads, parts), 1, panels());
    at::parallel_for(0, parts * groups, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<char[]> scratch(new char[weight_.scratch() + 64]);
      const int64_t stride = slice_stride(size);
      std::vector<uint32_t> slice(words_.words(kTile) * stride);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t d0 = item % parts * size, d1 = std::min(d0 + size, hidden_), width = d1 - d0;
        const int64_t p0 = item / parts * panels() / groups, p1 = (item / parts + 1) * panels() / groups;
        if (width <= 0) {
          continue;
        }
        for (int64_t t = first_tile; t < last_tile; ++t) {
          const int64_t rows = tile_rows(t);
          const Weight::Rows w = weight_.tile(t * kTile, rows, scratch.get());
          kernels_.transposed_words(w.data + d0 * words_.element(), w.row, rows, width, slice.data(), stride);
          for (int64_t p = p0; p < p1; ++p) {
            float* c = d_tokens_.mutable_data_ptr<float>() + (p * hidden_ + d0) * panel_;
            const int64_t kept_row = panel_ * (words_.pairs && words_.wide ? 8 : 4);
            kernels_.gemm(
                slice.data(), 4, stride * 4, kept_of(p, t, origin), kept_row, c, panel_, width, words_.words(rows),
                t > 0);
          }
        }
      }
    });
  }

  // Words of the columns of a tile, k rows below each other; an odd number of cache lines apart, or the rows of many
  // heads would all meet in a few sets of the cache.
  static int64_t slice_stride(int64_t width) { return (divide_up(width, 16) | 1) * 16; }

  const at::Tensor& input_;
  const Tensors& given_;
  const at::Tensor& index_;
  at::ScalarType dtype_;
  std::array<bool, 3> needs_;
  bool keep_float32_;
  const RowOptions& options_;
  bool bucket_;
  Words words_;
  const TileKernels& kernels_;
  const at::Tensor& weight_tensor_;
  Weight weight_;
  int64_t panel_, count_, hidden_, vocab_, tiles_, chunk_, span_;
  TileOptions tile_options_;

  at::Tensor loss_, nll_, lse_, d_input_, d_weight_, d_bias_, bias_;
  at::Tensor by_token_, by_coordinate_;  // hidden states of a chunk
  at::Tensor max_, sum_, spread_;        // (panels, tiles, panel)
  at::Tensor kept_, factor_, d_tokens_;
  int64_t kept_stride_, stats_;
  int64_t begin_ = 0, n_ = 0;
  Targets targets_;
  std::vector<RowTerms> terms_;
};

}  // namespace

std::tuple<int64_t, int64_t> tile_shape(at::ScalarType dtype) {
  return {words_of(dtype, false).kernels->panel, kTile};
}

// What Call::allocate and its methods hold, if all gradients are asked for and rows are gathered.
int64_t linear_cross_entropy_bytes(
    int64_t rows, int64_t columns, int64_t vocab, int64_t hidden, int64_t support, at::ScalarType dtype, bool softcap,
    bool smoothing, bool cast) {
  const Words words = words_of(dtype, softcap);
  const int64_t panel = words.kernels->panel, tiles = divide_up(vocab, kTile), threads = at::get_num_threads();
  rows = divide_up(rows, panel) * panel;
  columns = columns < vocab ? columns / kTile * kTile : vocab + 1;
  const int64_t width = divide_up(hidden, panel) * panel;
  const int64_t kept = rows * columns * words.kept_element();
  const int64_t states = rows * (hidden + 1 + width) * words.element() + rows * hidden * (4 + words.element());
  const int64_t d_input = rows * hidden * (4 + 4 + 2);
  const int64_t statistics = rows * ((tiles + 1) * 4 * (smoothing ? 4 : 2) + 3 * 4) + (dtype == at::kFloat ? 0 : vocab * 4);
  const int64_t targets =
      rows * (support * 3 * (sizeof(TargetEntry) + 4) + sizeof(RowTerms) + sizeof(RowTarget)) + tiles * 16 + vocab / 8;
  const bool packed = cast || (words.pairs ? hidden % 2 != 0 : dtype != at::kFloat);
  const int64_t thread = (kTile + 1) * (panel * 4 * 2 + rows * words.element() + (packed ? (hidden + 1) * 4 : 0));
  const int64_t slices = words.words(kTile) * (hidden + 48 * threads) * 4;
  return kept + states + d_input + statistics + targets + threads * thread + slices;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy(
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    const at::Tensor& ids,
    const std::optional<at::Tensor>& probs,
    const std::optional<at::Tensor>& class_weight,
    const std::optional<at::Tensor>& index,
    const std::optional<at::Tensor>& row_scale,
    at::ScalarType dtype,
    std::array<bool, 3> needs,
    bool keep_float32,
    int64_t rows,
    int64_t columns,
    double logit_scale,
    double softcap,
    double temperature,
    double label_smoothing,
    double z_loss,
    bool bucket) {
  const auto value = [](const std::optional<at::Tensor>& x) { return x.has_value() ? *x : at::Tensor(); };
  const auto contiguous = [](const std::optional<at::Tensor>& x) {
    return x.has_value() && x->defined() ? x->contiguous() : at::Tensor();
  };
  const Tensors given = {ids, value(probs), contiguous(class_weight), contiguous(row_scale), value(bias)};
  const RowOptions options = row_options(
      weight.size(0), given.class_weight, logit_scale, softcap, temperature, label_smoothing, z_loss);
  const at::Tensor rows_that_count = contiguous(index);
  return Call(
             input, weight, given, rows_that_count, dtype, needs, keep_float32, rows, columns, options, bucket)
      .run();
}

}  // namespace ssd_core::cpu
