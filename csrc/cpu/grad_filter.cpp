#include "grad_filter.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>

namespace ssd_core::cpu {

namespace {

constexpr int64_t kBlock = 256;  // tokens of one product of d_weight

// Row `place` of the summed dimension of words (places, width): with pairs, one half of each word.
void put_row(const Words& words, int64_t place, const char* row, int64_t count, uint32_t* out, int64_t width) {
  if (!words.pairs) {
    std::memcpy(out + place * width, row, count * 4);
    return;
  }
  const auto* from = reinterpret_cast<const uint16_t*>(row);
  uint32_t* to = out + place / 2 * width;
  for (int64_t k = 0; k < count; ++k) {
    to[k] = place % 2 ? to[k] | static_cast<uint32_t>(from[k]) << 16 : from[k];
  }
}

// out += factor * a row of elements
void add_row(const Words& words, const char* row, float factor, int64_t count, float* out) {
  for (int64_t k = 0; k < count; ++k) {
    float x;
    if (words.pairs) {
      const uint32_t bits = static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(row)[k]) << 16;
      std::memcpy(&x, &bits, sizeof x);
    } else {
      x = reinterpret_cast<const float*>(row)[k];
    }
    out[k] += factor * x;
  }
}

}  // namespace

GradFilter::GradFilter(
    double delta_input, double delta_weight, int64_t held_bytes, Tokens tokens, const Ranks& ranks)
    : held_limit_(held_bytes), tokens_(std::move(tokens)), ranks_(ranks) {
  const auto share = [&](double delta) {
    for (size_t s = 0; s < shares_.size(); ++s) {
      if (shares_[s].delta == delta) {
        return static_cast<int>(s);
      }
    }
    shares_.emplace_back().delta = delta;
    return static_cast<int>(shares_.size()) - 1;
  };
  input_ = delta_input > 0 ? share(delta_input) : -1;
  weight_ = delta_weight > 0 ? share(delta_weight) : -1;
}

void GradFilter::allocate(
    const HeadCall& call, const Grid& grid, const Words& words, const Weight& weight, const at::Tensor& d_input,
    const at::Tensor& d_weight) {
  call_ = &call;
  grid_ = grid;
  words_ = words;
  head_weight_ = &weight;
  d_input_ = d_input;
  d_weight_ = d_weight;
  hidden_ = call.input.size(1);
  count_ = call.count();
  width_ = divide_up(hidden_, grid.panel) * grid.panel;
  wants_input_ = call.scaled && call.needs[0] && filters_input();
  wants_weight_ = call.scaled && call.needs[1] && filters_weight();
  const auto floats = at::TensorOptions(at::kFloat);
  for (Share& share : shares_) {
    share.skips.resize(grid.tiles * grid.panels * grid.panel);
    if (call.scaled) {
      share.token_mass.assign(grid.tiles * count_, 0.0f);
      share.column_mass.assign(grid.vocab, 0.0f);
      share.held.resize(grid.tiles);
    }
  }
  if (wants_input_) {
    d_input_sum_ = d_input.scalar_type() == at::kFloat ? d_input : at::zeros({count_, hidden_}, floats);
  }
  if (wants_weight_) {
    directions_ = at::zeros({grid.tiles, width_}, floats);
  }
  int64_t most = 0;
  for (const Share& share : shares_) {
    most += holds(share) ? count_ * grid.tiles * held_row() * 4 : 0;
  }
  waiting_ = at::empty({std::min(held_limit_, most)}, at::TensorOptions(at::kByte));
}

// Per token, skip the lightest tiles while their summed mass stays within the bound; of equal ones the first.
void GradFilter::select(Share& share) {
  const int64_t tiles = grid_.tiles, n = chunk_.n, stride = grid_.panels * grid_.panel;
  std::vector<double> skipped(n);
  std::vector<int64_t> stayed(n);
  at::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> mass(tiles);
    std::vector<uint64_t> light;  // bits of the mass, which is not negative, and the tile
    for (int64_t i = begin; i < end; ++i) {
      tokens_.masses(i, mass.data());
      light.clear();
      for (int64_t t = 0; t < tiles; ++t) {
        share.skips[t * stride + i] = 0;
        if (mass[t] <= share.delta) {
          uint32_t bits;
          std::memcpy(&bits, &mass[t], sizeof bits);
          light.push_back(static_cast<uint64_t>(bits) << 32 | static_cast<uint64_t>(t));
        }
      }
      std::sort(light.begin(), light.end());
      double total = 0;
      stayed[i] = tiles;
      for (const uint64_t key : light) {
        const auto t = static_cast<int64_t>(key & 0xffffffff);
        if (total + mass[t] > share.delta) {
          break;
        }
        total += mass[t];
        share.skips[t * stride + i] = 1;
        --stayed[i];
      }
      skipped[i] = total;
    }
  });
  ranks_.add(skipped.data(), n);
  for (int64_t i = 0; i < n; ++i) {
    share.skipped_max = std::max(share.skipped_max, skipped[i]);
    share.skipped_sum += skipped[i];
    share.active_count += static_cast<double>(stayed[i]);
  }
  share.active.clear();
  share.active_first.assign(1, 0);
  for (int64_t t = 0; t < tiles; ++t) {
    for (int64_t i = 0; i < n; ++i) {
      if (!share.skips[t * stride + i]) {
        share.active.push_back(static_cast<int32_t>(i));
      }
    }
    share.active_first.push_back(static_cast<int64_t>(share.active.size()));
  }
}

void GradFilter::open(const Chunk& chunk, const at::Tensor& x) {
  chunk_ = chunk;
  for (Share& share : shares_) {
    select(share);
  }
  if (!call_->scaled) {
    return;
  }
  for (int64_t i = 0; i < chunk.n; ++i) {
    const double weight = tokens_.weight(i);
    positive_ = positive_ || weight > 0;
    negative_ = negative_ || weight < 0;
  }
  TORCH_CHECK_VALUE(
      !(positive_ && negative_),
      "grad_filter: expected token weights and upstream gradients of one sign, got both signs");
  if (wants_weight_) {
    states_.push_back(x);
    state_bytes_ += bytes_of(x);
  }
}

// Of hidden states that are not the caller's.
int64_t GradFilter::bytes_of(const at::Tensor& x) const {
  return x.is_alias_of(call_->input) ? 0 : static_cast<int64_t>(x.nbytes());
}

bool GradFilter::holds(const Share& share) const {
  return (wants_input_ && &share == &shares_[input_]) || (wants_weight_ && &share == &shares_[weight_]);
}

int64_t GradFilter::room() const {
  const auto holding = std::count_if(shares_.begin(), shares_.end(), [&](const Share& share) { return holds(share); });
  const int64_t free = held_limit_ - (wants_weight_ ? bytes_of(states_.back()) : 0);
  return std::max<int64_t>(1, free / std::max<int64_t>(holding, 1));
}

void GradFilter::make_room(int64_t first_tile, int64_t last_tile) {
  int64_t coming = 0;
  for (const Share& share : shares_) {
    if (holds(share)) {
      coming += (share.active_first[last_tile] - share.active_first[first_tile]) * held_row() * 4;
    }
  }
  if (waiting_bytes_ > 0 && state_bytes_ + waiting_bytes_ + coming > held_limit_) {
    flush(false);
  }
  if (coming > static_cast<int64_t>(waiting_.nbytes())) {  // nothing waits
    waiting_.reset();
    waiting_ = at::empty({coming}, at::TensorOptions(at::kByte));
  }
  for (Share& share : shares_) {
    if (holds(share)) {
      share.room = reinterpret_cast<uint32_t*>(waiting_.mutable_data_ptr<uint8_t>() + waiting_bytes_);
      share.room_first = first_tile;
      waiting_bytes_ += (share.active_first[last_tile] - share.active_first[first_tile]) * held_row() * 4;
    }
  }
}

void GradFilter::take(
    const Block& all, const char* kept, int64_t kept_stride, const char* by_row, int64_t row_bytes) {
  const int64_t panel = grid_.panel, t = all.tile, padded = chunk_.panels * panel, words = words_.words(kTile);
  std::vector<float> mask(padded), sums(padded);
  for (Share& share : shares_) {
    const uint8_t* skips = share.skips.data() + t * grid_.panels * panel;
    for (int64_t i = 0; i < padded; ++i) {
      mask[i] = i < chunk_.n && skips[i] ? 1.0f : 0.0f;
    }
    std::fill(sums.begin(), sums.end(), 0.0f);
    words_.kernels->masked_sums(
        by_row, all.own, row_bytes, padded, mask.data(), sums.data(), share.column_mass.data() + all.first);
    float* token_mass = share.token_mass.data() + t * count_ + chunk_.begin;
    for (int64_t i = 0; i < chunk_.n; ++i) {
      token_mass[i] = mask[i] != 0 ? sums[i] : 0.0f;
    }
    if (!holds(share)) {
      continue;
    }
    const int64_t first = share.active_first[t], count = share.active_first[t + 1] - first;
    if (count == 0) {
      continue;
    }
    uint32_t* tokens = share.room + (first - share.active_first[share.room_first]) * held_row();
    std::copy_n(share.active.begin() + first, count, tokens);
    uint32_t* out = tokens + count;
    share.held[t].push_back({static_cast<int64_t>(states_.size()) - 1, chunk_.begin, count, tokens, out});
    for (int64_t k = 0; k < count; ++k, out += words) {
      const int64_t i = tokens[k];
      const char* column = kept + i / panel * kept_stride + i % panel * 4;
      for (int64_t j = 0; j < words_.words(all.own); ++j) {
        std::memcpy(out + j, column + j * words_.kept_row(), 4);
      }
      std::fill(out + words_.words(all.own), out + words, 0);
    }
  }
}

void GradFilter::end_chunk() {
  if (wants_weight_) {
    add_directions();
  }
}

// M^T x, of this chunk.
void GradFilter::add_directions() {
  const at::Tensor& x = states_.back();
  const int64_t n = chunk_.n;
  std::vector<float> wide(n * width_, 0.0f);
  const at::Tensor floats = x.to(at::kFloat);
  for (int64_t i = 0; i < n; ++i) {
    std::copy_n(floats.const_data_ptr<float>() + i * hidden_, hidden_, wide.data() + i * width_);
  }
  const float* mass = shares_[weight_].token_mass.data() + chunk_.begin;
  at::parallel_for(0, grid_.tiles, 6, [&](int64_t begin, int64_t end) {
    for (int64_t q = 0; q < width_; q += grid_.panel) {
      words_.floats->gemm(
          mass + begin * count_, count_ * 4, 4, wide.data() + q, width_ * 4,
          directions_.mutable_data_ptr<float>() + begin * width_ + q, width_, end - begin, n, true, nullptr);
    }
  });
}

// What waits of a tile, times its hidden states: added to product (rows, width).
void GradFilter::weight_products(int64_t tile, float* product) const {
  const int64_t words = words_.words(kTile), panel = grid_.panel;
  const int64_t depth = words_.words(kBlock), element = words_.element();
  std::vector<uint32_t> a(depth * kTile), b(depth * width_);
  int64_t filled = 0;  // tokens of a and b
  const auto multiply = [&] {
    for (int64_t q = 0; q < width_; q += panel) {
      words_.kernels->gemm(
          a.data(), 4, kTile * 4, b.data() + q, width_ * 4, product + q, width_, grid_.rows(tile),
          words_.words(filled), true, nullptr);
    }
    filled = 0;
  };
  for (const Held& rows : shares_[weight_].held[tile]) {
    const auto* x = static_cast<const char*>(states_[rows.chunk].const_data_ptr());
    for (int64_t k = 0; k < rows.count; ++k) {
      const char* state = x + rows.tokens[k] * hidden_ * element;
      put_row(words_, filled, reinterpret_cast<const char*>(rows.words + k * words), kTile, a.data(), kTile);
      put_row(words_, filled, state, hidden_, b.data(), width_);
      if (++filled == kBlock) {
        multiply();
      }
    }
  }
  if (filled > 0) {
    multiply();
  }
}

// The products of all that waits, in steps of tiles: d_weight's by tile, d_input's by coordinate.
void GradFilter::flush(bool last) {
  if (!last && wants_weight_ && !d_weight_sum_.defined()) {
    d_weight_sum_ = d_weight_.scalar_type() == at::kFloat
        ? d_weight_
        : at::empty(d_weight_.sizes(), at::TensorOptions(at::kFloat));
  }
  const int64_t tiles = divide_up(grid_.vocab, kTile), step = 2 * counted_threads();
  const int64_t slice = words_.words(kTile) * slice_stride(width_);
  std::vector<uint32_t> slices(wants_input_ ? step * slice : 0);
  std::vector<float> mean_rows(wants_input_ && last ? tiles * width_ : 0);
  for (int64_t first = 0; first < tiles; first += step) {
    const int64_t stop = std::min(first + step, tiles);
    dynamic_for(first, stop, [&](int64_t t) {
      if (wants_weight_ && (last || !flushed_ || !shares_[weight_].held[t].empty())) {
        flush_weight(t, last);
      }
      if (wants_input_ && (last || !shares_[input_].held[t].empty())) {
        input_slice(t, last ? mean_rows.data() + t * width_ : nullptr, slices.data() + (t - first) * slice);
      }
    });
    if (wants_input_) {
      input_products(first, stop, slices.data());
    }
  }
  if (wants_input_ && last) {
    match_input(mean_rows.data());
  }
  for (Share& share : shares_) {
    for (auto& rows : share.held) {
      rows.clear();
    }
  }
  waiting_bytes_ = 0;
  if (wants_weight_) {  // tiles of this chunk may follow
    states_.erase(states_.begin(), states_.end() - 1);
    state_bytes_ = bytes_of(states_.back());
  }
  flushed_ = true;
}

void GradFilter::flush_weight(int64_t tile, bool last) {
  std::vector<float> product(kTile * width_, 0.0f);
  weight_products(tile, product.data());
  if (last) {
    match_weight(tile, product.data());
  }
  for (int64_t j = 0; j < grid_.rows(tile); ++j) {
    const int64_t at = call_->id(tile * kTile + j) * hidden_;
    float* row = product.data() + j * width_;
    if (flushed_) {
      const float* before = d_weight_sum_.const_data_ptr<float>() + at;
      for (int64_t d = 0; d < hidden_; ++d) {
        row[d] += before[d];
      }
    }
    store_floats(last ? d_weight_ : d_weight_sum_, at, row, hidden_, false);
  }
}

// A tile's words below each other, and its mean row sum_j c_j W_j if that is asked for.
void GradFilter::input_slice(int64_t tile, float* mean_row, uint32_t* slice) const {
  const int64_t rows = grid_.rows(tile);
  const std::unique_ptr<char[]> scratch(new char[head_weight_->scratch() + 64]);
  const Weight::Rows w = head_weight_->tile(tile * kTile, rows, scratch.get());
  words_.kernels->transposed_words(w.data, w.row, rows, hidden_, slice, slice_stride(width_), w.places);
  if (mean_row) {
    const std::vector<float> shape = shape_of(shares_[input_], tile);
    for (int64_t j = 0; j < rows; ++j) {
      add_row(words_, w.at(j), shape[j], hidden_, mean_row);
    }
  }
}

void GradFilter::add_to_input(int64_t i, int64_t q, const float* from) {
  const bool spread = call_->index.defined() && d_input_sum_.is_same(d_input_);
  const int64_t row = spread ? call_->index.const_data_ptr<int64_t>()[i] : i;
  float* out = d_input_sum_.mutable_data_ptr<float>() + row * hidden_ + q * grid_.panel;
  const int64_t width = std::min(grid_.panel, hidden_ - q * grid_.panel);
  for (int64_t lane = 0; lane < width; ++lane) {
    out[lane] += from[lane];
  }
}

// Each coordinate is summed by one thread, in the order of the vocabulary.
void GradFilter::input_products(int64_t first_tile, int64_t last_tile, const uint32_t* slices) {
  const int64_t panel = grid_.panel, words = words_.words(kTile), stride = slice_stride(width_);
  at::parallel_for(0, width_ / panel, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> product;
    for (int64_t t = first_tile; t < last_tile; ++t) {
      const uint32_t* slice = slices + (t - first_tile) * words * stride;
      for (const Held& rows : shares_[input_].held[t]) {
        product.resize(rows.count * panel);
        for (int64_t q = begin; q < end; ++q) {
          words_.kernels->gemm(
              rows.words, words * 4, 4, slice + q * panel, stride * 4, product.data(), panel, rows.count,
              words_.words(grid_.rows(t)), false, nullptr);
          for (int64_t k = 0; k < rows.count; ++k) {
            add_to_input(rows.begin + rows.tokens[k], q, product.data() + k * panel);
          }
        }
      }
    }
  });
}

std::vector<float> GradFilter::shape_of(const Share& share, int64_t tile) const {
  const float* mass = share.column_mass.data() + tile * kTile;
  std::vector<float> shape(mass, mass + grid_.rows(tile));
  const double total = std::accumulate(shape.begin(), shape.end(), 0.0);
  for (float& c : shape) {
    c = total == 0 ? 0.0f : static_cast<float>(c / total);
  }
  return shape;
}

void GradFilter::match_weight(int64_t tile, float* product) const {
  const std::vector<float> shape = shape_of(shares_[weight_], tile);
  const float* direction = directions_.const_data_ptr<float>() + tile * width_;
  for (size_t j = 0; j < shape.size(); ++j) {
    for (int64_t d = 0; d < hidden_; ++d) {
      product[j * width_ + d] += shape[j] * direction[d];
    }
  }
}

// M times the tiles' mean rows.
void GradFilter::match_input(const float* mean_rows) {
  constexpr int64_t kTokens = 48;
  const int64_t panel = grid_.panel;
  at::parallel_for(0, divide_up(count_, kTokens), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> product(kTokens * panel);
    for (int64_t first = begin * kTokens; first < std::min(end * kTokens, count_); first += kTokens) {
      const int64_t n = std::min(kTokens, count_ - first);
      for (int64_t q = 0; q < width_ / panel; ++q) {
        words_.floats->gemm(
            shares_[input_].token_mass.data() + first, 4, count_ * 4, mean_rows + q * panel, width_ * 4, product.data(),
            panel, n, divide_up(grid_.vocab, kTile), false, nullptr);
        for (int64_t i = 0; i < n; ++i) {
          add_to_input(first + i, q, product.data() + i * panel);
        }
      }
    }
  });
}

void GradFilter::close() {
  if (count_ > 0 && (wants_input_ || wants_weight_)) {
    flush(true);
  }
  if (wants_input_ && !d_input_sum_.is_same(d_input_)) {
    const at::Tensor found = d_input_sum_.to(d_input_.scalar_type());
    if (call_->index.defined()) {
      d_input_.index_copy_(0, call_->index, found);
    } else {
      d_input_.copy_(found);
    }
  }
}

at::Tensor GradFilter::certificate() const {
  at::Tensor found = at::zeros({3}, at::TensorOptions(at::kFloat));
  float* out = found.mutable_data_ptr<float>();
  const auto each = static_cast<double>(shares_.size());
  for (const Share& share : shares_) {
    const auto tokens = static_cast<double>(std::max<int64_t>(1, count_));
    out[0] = std::max(out[0], static_cast<float>(share.skipped_max));
    out[1] = std::max(out[1], static_cast<float>(share.skipped_sum / tokens));
    const double active = ranks_.sum(share.active_count / (tokens * static_cast<double>(grid_.tiles)));
    out[2] += static_cast<float>(active / static_cast<double>(ranks_.count()) / each);
  }
  return found;
}

int64_t grad_filter_bytes(
    int64_t tokens, int64_t rows, int64_t vocab, int64_t hidden, at::ScalarType dtype, int64_t bounds, bool wide_input) {
  const Words words = words_of(dtype, false);
  const int64_t panel = words.kernels->panel, threads = counted_threads(), tiles = divide_up(vocab, kTile);
  const int64_t width = divide_up(hidden, panel) * panel;
  const int64_t shares = bounds * (rows * tiles * 6 + tokens * tiles * 4 + vocab * 4);
  const int64_t matched = (2 * tiles + rows) * width * 4 + (wide_input ? tokens * hidden * 4 : 0);
  const int64_t order = vocab * 24;
  const int64_t step = 2 * threads * words.words(kTile) * slice_stride(width) * 4;
  const int64_t thread =
      words.words(kBlock) * (kTile + width) * 4 + kTile * width * 4 + kTile * (hidden + 1) * 4 + rows * (panel + 2) * 4;
  return shares + matched + order + step + threads * thread;
}

}  // namespace ssd_core::cpu
