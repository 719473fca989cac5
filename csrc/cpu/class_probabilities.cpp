#include "class_probabilities.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace ssd_core::cpu {

ClassProbabilityPass::ClassProbabilityPass(
    const at::Tensor& probabilities, const at::Tensor& bias, const at::Tensor& row_scale, const RowOptions& options,
    const Ranks& ranks, int64_t count)
    : targets_(probabilities, at::Tensor(), at::Tensor(), at::Tensor(), 1, 0, 1), bias_(bias), row_scale_(row_scale),
      options_(options), ranks_(ranks), tile_options_{options.softcap > 0, options.cap_slope, options.slope, true} {
  const auto floats = at::TensorOptions(at::kFloat);
  loss = at::empty({count}, floats);
  nll = at::empty({count}, floats);
  lse = at::empty({count}, floats);
}

void ClassProbabilityPass::allocate(const Grid& grid, const Words& words) {
  grid_ = grid;
  words_ = words;
  targets_.allocate(grid);
  tiles_.allocate(grid);
  for (TileNumbers* numbers : {&max_, &below_, &mass_, &plain_below_, &plain_mass_}) {
    numbers->allocate(grid);
  }
  if (options_.label_smoothing > 0) {
    spread_.allocate(grid);
  }
  lanes_.resize(grid.panels * kLanes * grid.panel);
}

void ClassProbabilityPass::open(const Chunk& chunk) {
  chunk_ = chunk;
  targets_.open(chunk);
  tiles_.open(grid_);
  std::fill(lanes_.begin(), lanes_.end(), 0.0f);
}

void ClassProbabilityPass::look(const Block& block, float* u, void* kept, bool again, char* scratch) {
  const int64_t p = block.panel, t = block.tile, panel = grid_.panel, even = divide_up(block.rows, 2) * 2;
  const float* bias = bias_.defined() ? bias_.const_data_ptr<float>() + block.first : nullptr;
  float unused[3 * kMaxPanel];
  float* max = again ? unused : tiles_.max.of(p, t);
  float* sum = again ? unused + panel : tiles_.sum.of(p, t);
  words_.kernels->values(u, block.rows, bias, tile_options_, max);
  std::fill(u + block.rows * panel, u + even * panel, -kInfinity);
  words_.kernels->exponentials(u, even, max, tile_options_, kept, sum);
  float* w = kept ? static_cast<float*>(kept) + kTile * panel : reinterpret_cast<float*>(scratch);
  targets_.values(block, w, unused + 2 * panel, nullptr);
  if (again) {
    return;
  }
  if (spread_.defined()) {
    spread_.look(words_, block, u, max, options_.class_weight);
  }
  std::copy_n(max, panel, max_.of(p, t));
  float *below = below_.of(p, t), *mass = mass_.of(p, t), *plain = plain_below_.of(p, t), *all = plain_mass_.of(p, t);
  for (float* sums : {below, mass, plain, all}) {
    std::fill_n(sums, panel, 0.0f);
  }
  const float* c = class_weight(block);
  for (int64_t j = 0; j < block.rows; ++j) {
    const float weight = c ? c[j] : 1.0f;
    for (int64_t lane = 0; lane < panel; ++lane) {
      const float x = w[j * panel + lane];
      const float term = x == 0 ? 0 : x * (max[lane] - u[j * panel + lane]);  // an id of no mass may have no logit
      below[lane] += weight * term;
      mass[lane] += weight * x;
      plain[lane] += term;
      all[lane] += x;
    }
  }
}

void ClassProbabilityPass::finish() {
  finish_panels<Found>(
      ranks_, chunk_, grid_.panel, {}, [&](int64_t p, Found* found) { find(p, found); },
      [&](int64_t, const Found&, const OfRanks<Found>& all) -> Found {
        return {
            merged(all, &Found::row, options_.slope), merged(all, &Found::spread), merged(all, &Found::target),
            merged(all, &Found::plain)};
      },
      [&](int64_t p, const Found* found) {
        for (int64_t lane = 0; lane < grid_.panel && p * grid_.panel + lane < chunk_.n; ++lane) {
          finish_token(p, lane, found[lane]);
        }
      });
}

void ClassProbabilityPass::find(int64_t p, Found* found) const {
  float max[kMaxPanel];
  double sum[kMaxPanel];
  Spread spread[kMaxPanel] = {};
  tiles_.finish(words_, options_.slope, p, max, sum);
  if (spread_.defined()) {
    spread_.finish(grid_, options_.class_weight, p, spread);
  }
  for (int64_t lane = 0; lane < grid_.panel && p * grid_.panel + lane < chunk_.n; ++lane) {
    Spread target = {max[lane], 0, 0}, plain = target;
    for (int64_t t = 0; t < grid_.tiles; ++t) {
      const float tile_max = max_.of(p, t)[lane];
      const double rise = tile_max == -kInfinity ? 0 : static_cast<double>(max[lane]) - tile_max;
      target.sum += below_.of(p, t)[lane] + rise * mass_.of(p, t)[lane];
      plain.sum += plain_below_.of(p, t)[lane] + rise * plain_mass_.of(p, t)[lane];
      target.weight += mass_.of(p, t)[lane];
      plain.weight += plain_mass_.of(p, t)[lane];
    }
    found[lane] = {{max[lane], sum[lane]}, spread[lane], target, plain};
  }
}

void ClassProbabilityPass::finish_token(int64_t p, int64_t lane, const Found& found) {
  const int64_t place = chunk_.begin + p * grid_.panel + lane;
  const double sharp = 1 - options_.label_smoothing, uniform = options_.label_smoothing / options_.vocab;
  Sums sums = {};  // with w_j = c_j (sharp y_j + uniform)
  const double spread = sharp * found.target.sum + uniform * found.spread.sum;
  sums.row = {static_cast<float>(found.row.max), found.row.sum, spread};
  sums.weight = sharp * found.target.weight + uniform * options_.class_weight_sum;
  sums.plain_spread = found.plain.sum;
  sums.plain_weight = found.plain.weight;
  const float scale = row_scale_.defined() ? row_scale_.const_data_ptr<float>()[place] : 0.0f;
  const RowTerms terms = finish_dense_row(options_, sums, scale);
  loss.mutable_data_ptr<float>()[place] = terms.loss;
  nll.mutable_data_ptr<float>()[place] = terms.nll;
  lse.mutable_data_ptr<float>()[place] = terms.lse;
  lanes(p, kMax)[lane] = terms.gradient.max;
  lanes(p, kFactor)[lane] = terms.gradient.mass;
  lanes(p, kUniform)[lane] = static_cast<float>(terms.gradient.uniform * uniform);
  lanes(p, kScale)[lane] = static_cast<float>(-terms.gradient.uniform * sharp);
}

void ClassProbabilityPass::gradient(const Block& block, void* kept, char* by_row, int64_t row_bytes) {
  const int64_t p = block.panel, panel = grid_.panel;
  const bool smooth = options_.label_smoothing > 0;
  float* w = static_cast<float*>(kept) + kTile * panel;
  const float* c = class_weight(block);
  const float* scale = lanes(p, kScale);
  for (int64_t j = 0; j < block.rows; ++j) {
    const float weight = c ? c[j] : 1.0f;
    for (int64_t lane = 0; lane < panel; ++lane) {
      w[j * panel + lane] *= scale[lane] * weight;
    }
  }
  std::fill_n(w + block.rows * panel, block.rows % 2 * panel, 0.0f);
  TileGradient terms = {lanes(p, kMax), lanes(p, kFactor), smooth ? lanes(p, kUniform) : nullptr};
  terms.addend = w;
  words_.kernels->gradient(
      kept, divide_up(block.rows, 2) * 2, smooth ? c : nullptr, terms, tile_options_, by_row, row_bytes);
}

}  // namespace ssd_core::cpu
