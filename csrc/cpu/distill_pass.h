// What distillation from a sparse and from a dense teacher share: the student's values, its cross-entropy at temperature
// 1, results.
#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "distill_terms.h"
#include "head_targets.h"
#include "linear_head.h"
#include "ranks.h"

namespace ssd_core::cpu {

// What every distillation is given.
struct DistillGiven {
  at::Tensor bias, labels, row_scale;  // labels (N, 1)
  RowOptions options;                  // of the divergence
  RowOptions ce_options;               // of the cross-entropy, at temperature 1
  Measure measure;
  bool with_ce;
  Ranks ranks;

  bool scaled() const { return row_scale.defined(); }
  bool two_slopes() const { return with_ce && measure.temperature != 1; }
};

class DistillPass : public RowPass {
 public:
  DistillPass(const DistillGiven& given, bool keeps_values, int64_t count)
      : given_(given),
        tile_options_{
            given.options.softcap > 0, given.options.cap_slope, given.options.slope,
            keeps_values || given.options.softcap > 0 || given.two_slopes()},
        results_(at::empty({4, count}, at::TensorOptions(at::kFloat))) {}

  // loss, divergence, nll, lse
  at::Tensor result(int64_t k) const { return results_.select(0, k); }

  bool keeps_values() const override { return tile_options_.keep_values; }

  void allocate(const Grid& grid, const Words& words) override {
    grid_ = grid;
    words_ = words;
    tiles_.allocate(grid);
    if (given_.two_slopes()) {
      ce_tiles_.allocate(grid);
    }
    if (given_.ce_options.label_smoothing > 0 && given_.with_ce) {
      spread_.allocate(grid);
    }
    lanes_.assign(grid.panels * kLanes * grid.panel, 0.0f);
  }

  void open(const Chunk& chunk) override {
    chunk_ = chunk;
    tiles_.open(grid_);
    if (given_.two_slopes()) {
      ce_tiles_.open(grid_);
    }
    if (given_.labels.defined()) {
      labels_.read(chunk, grid_, given_.labels, at::Tensor(), given_.ce_options, false);
    }
    terms_.resize(chunk.n);
  }

 protected:
  // Lanes of a panel, by what they hold.
  enum Lane { kFactor, kUniform, kMax, kSecond, kOwn, kScale, kLogSum, kTeacherMax, kTeacherLogSum, kLanes };

  float* lanes(int64_t panel, Lane lane) { return lanes_.data() + (panel * kLanes + lane) * grid_.panel; }

  // Raw outputs to v (rows, panel) and its max; the cross-entropy's part of pass A.
  void student_values(const Block& block, float* u, float* max, bool again) {
    const int64_t p = block.panel, panel = grid_.panel, even = divide_up(block.rows, 2) * 2;
    const float* bias = given_.bias.defined() ? given_.bias.const_data_ptr<float>() + block.first : nullptr;
    words_.kernels->values(u, block.own, bias, tile_options_, max);
    std::fill(u + block.own * panel, u + even * panel, -kInfinity);
    if (again || !given_.with_ce) {
      return;
    }
    if (spread_.defined()) {
      spread_.look(words_, block, u, max, given_.ce_options.class_weight);
    }
    if (given_.labels.defined()) {
      labels_.each(block, panel, [&](TargetEntry& entry, int64_t row, int64_t lane) {
        entry.value = u[row * panel + lane];
      });
    }
    if (given_.two_slopes()) {
      TileOptions options = tile_options_;
      options.slope = given_.ce_options.slope;
      std::copy_n(max, panel, ce_tiles_.max.of(p, block.tile));
      words_.kernels->exponentials(u, even, max, options, nullptr, ce_tiles_.sum.of(p, block.tile));
    }
  }

  // Of a token before it is finished.
  struct Found {
    Exponentials row, ce;  // the student's, without a sparse teacher's ids; of the whole row at temperature 1
    Spread spread;
    Exponentials teacher;
    double cross;  // see add_cross
  };

  void find(int64_t p, Found* found) const {
    const auto each = [&](const TileExponentials& tiles, float slope, Exponentials Found::*part) {
      float max[kMaxPanel];
      double sum[kMaxPanel];
      tiles.finish(words_, slope, p, max, sum);
      for (int64_t lane = 0; lane < grid_.panel; ++lane) {
        found[lane].*part = {max[lane], sum[lane]};
      }
    };
    each(tiles_, given_.options.slope, &Found::row);
    if (given_.two_slopes()) {
      each(ce_tiles_, given_.ce_options.slope, &Found::ce);
    }
    if (spread_.defined()) {
      Spread spread[kMaxPanel];
      spread_.finish(grid_, given_.ce_options.class_weight, p, spread);
      for (int64_t lane = 0; lane < grid_.panel; ++lane) {
        found[lane].spread = spread[lane];
      }
    }
  }

  // Of all ranks, but for the teacher; what is kept of the student's tiles becomes relative to it.
  Found whole(int64_t i, const Found& mine, const OfRanks<Found>& all) const {
    const double slope = given_.options.slope;
    Found found = {};
    found.row = merged(all, &Found::row, slope);
    found.ce = merged(all, &Found::ce, given_.ce_options.slope);
    found.spread = merged(all, &Found::spread);
    tiles_.rebase(i / grid_.panel, i % grid_.panel, rebased(slope, mine.row.max, found.row.max));
    return found;
  }

  // Results of a token from its divergence and, with cross-entropy, from what was found of the whole row at temperature
  // 1; and the cross-entropy's lanes, exponents relative to `base`.
  void finish_token(int64_t i, double value, const RowSums& found, double base) {
    const int64_t p = i / grid_.panel, lane = i % grid_.panel, place = chunk_.begin + i;
    const Measure& measure = given_.measure;
    float out[] = {
        static_cast<float>(measure.factor * value), static_cast<float>(measure.reported * value), 0.0f, 0.0f};
    if (given_.with_ce) {
      const RowTarget nothing = {nullptr, 0, 0, 0, 1};
      const RowTarget& target = given_.labels.defined() ? labels_.rows[i] : nothing;
      const float scale = given_.scaled() ? row_scale(i) : 0.0f;
      const RowTerms& terms = terms_[i] = finish_row(given_.ce_options, found, target, scale);
      out[0] += terms.loss;
      out[2] = terms.nll;
      out[3] = terms.lse;
      const double mass = terms.scale * terms.common / terms.sum;
      const double rebased =
          base == -kInfinity ? 0 : mass * std::exp(given_.ce_options.slope * (base - static_cast<double>(terms.max)));
      lanes(p, given_.two_slopes() ? kSecond : kFactor)[lane] += static_cast<float>(rebased);
      lanes(p, kUniform)[lane] = terms.gradient.uniform;
    }
    for (int k = 0; k < 4; ++k) {
      results_.mutable_data_ptr<float>()[k * results_.size(1) + place] = out[k];
    }
  }

  float row_scale(int64_t i) const { return given_.row_scale.const_data_ptr<float>()[chunk_.begin + i]; }

  // What dvalue/dz is multiplied by for du, but for the softcap.
  double slope_scale(int64_t i) const {
    return row_scale(i) * given_.measure.factor * given_.options.logit_scale / given_.options.temperature;
  }

  // du of the cross-entropy at an id; weight: the target's.
  double ce_slope(int64_t i, int64_t id, float v, double weight) const {
    return given_.with_ce ? target_gradient(given_.ce_options, terms_[i], {id, weight, v}) : 0;
  }

  bool smooth() const { return spread_.defined(); }
  const float* class_weight(const Block& block) const {
    const float* weight = given_.ce_options.class_weight;
    return smooth() && weight ? weight + block.first : nullptr;
  }

  const DistillGiven& given_;
  TileOptions tile_options_;
  at::Tensor results_;  // (4, M)
  Grid grid_;
  Words words_;
  Chunk chunk_;
  TileExponentials tiles_, ce_tiles_;
  TileSpread spread_;
  HeadTargets labels_;
  std::vector<RowTerms> terms_;
  std::vector<float> lanes_;
};

}  // namespace ssd_core::cpu
