// Distillation from a sparse teacher: statistics are of what is off its support, whose ids are mended one by one.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "distill_pass.h"

namespace ssd_core::cpu {

class SparseDistillPass : public DistillPass {
 public:
  SparseDistillPass(const DistillGiven& given, const at::Tensor& ids, const at::Tensor& probs, Tail tail, int64_t count)
      : DistillPass(given, false, count), ids_(ids), probs_(probs), tail_(tail) {}

  void open(const Chunk& chunk) override {
    DistillPass::open(chunk);
    support_.read(chunk, grid_, ids_, probs_, given_.options, tail_ == Tail::kBucket);
    support_terms_.resize(chunk.n);
  }

  // Statistics are of what is off the support.
  void look(const Block& block, float* u, void* kept, bool again, char*) override {
    const int64_t p = block.panel, panel = grid_.panel;
    float unused[2 * kMaxPanel];
    float* max = again ? unused : tiles_.max.of(p, block.tile);
    float* sum = again ? unused + panel : tiles_.sum.of(p, block.tile);
    student_values(block, u, max, again);
    bool removed = false;
    support_.each(block, panel, [&](TargetEntry& entry, int64_t row, int64_t lane) {
      float& v = u[row * panel + lane];
      entry.value = again ? entry.value : v;
      v = -kInfinity;
      removed = true;
    });
    if (removed) {
      words_.kernels->values(u, block.own, nullptr, {false, 0.0f, tile_options_.slope, false}, max);
    }
    words_.kernels->exponentials(u, divide_up(block.rows, 2) * 2, max, tile_options_, kept, sum);
  }

  void finish() override {
    std::fill(lanes_.begin(), lanes_.end(), 0.0f);
    finish_panels<Found>(
        given_.ranks, chunk_, grid_.panel, {&labels_, &support_}, [&](int64_t p, Found* found) { find(p, found); },
        [&](int64_t i, const Found& mine, const OfRanks<Found>& all) { return whole(i, mine, all); },
        [&](int64_t p, const Found* found) {
          for (int64_t lane = 0; lane < grid_.panel && p * grid_.panel + lane < chunk_.n; ++lane) {
            finish_row_of(p, lane, found[lane]);
          }
        });
  }

  void gradient(const Block& block, void* kept, char* by_row, int64_t row_bytes) override {
    const int64_t p = block.panel, panel = grid_.panel;
    const float* shift = tiles_.max.of(p, block.tile);
    float factor[kMaxPanel];
    for (int64_t lane = 0; lane < panel; ++lane) {
      factor[lane] = lanes(p, kFactor)[lane] * (tile_options_.keep_values ? 1.0f : shift[lane]);
    }
    TileGradient terms = {lanes(p, kMax), factor, smooth() ? lanes(p, kUniform) : nullptr};
    if (given_.two_slopes()) {
      terms.second = lanes(p, kSecond);
      terms.second_slope = given_.ce_options.slope;
    }
    words_.kernels->gradient(
        kept, divide_up(block.rows, 2) * 2, class_weight(block), terms, tile_options_, by_row, row_bytes);
    const auto store = [&](int64_t row, int64_t lane, double g) {
      store_gradient(words_, static_cast<char*>(kept), by_row, row_bytes, row, lane, static_cast<float>(g));
    };
    if (given_.labels.defined()) {
      labels_.each(block, panel, [&](const TargetEntry& entry, int64_t row, int64_t lane) {
        const int64_t i = p * panel + lane;
        store(row, lane, off_slope(i, entry.value) + ce_slope(i, entry.id, entry.value, entry.weight));
      });
    }
    support_.each(block, panel, [&](const TargetEntry& entry, int64_t row, int64_t lane) {
      const int64_t i = p * panel + lane;
      const bool labelled = given_.labels.defined() && labels_.rows[i].entries->id == entry.id;
      const double slope =
          support_slope(given_.measure, support_terms_[i].terms, given_.options.slope, entry) * slope_scale(i);
      store(row, lane, chain(entry.value) * slope + ce_slope(i, entry.id, entry.value, labelled ? 1 : 0));
    });
  }

 private:
  struct Terms {
    SupportTerms terms;
    double max;  // of v off the support
  };

  void finish_row_of(int64_t p, int64_t lane, const Found& found) {
    const int64_t i = p * grid_.panel + lane;
    const RowTarget& target = support_.rows[i];
    const RowSums off = {static_cast<float>(found.row.max), found.row.sum, 0};
    const SupportTerms terms = support_terms(given_.measure, tail_, given_.options.slope, off, target);
    support_terms_[i] = {terms, off.max};
    if (given_.scaled()) {
      lanes(p, kFactor)[lane] = tail_ == Tail::kSupport ? 0.0f : static_cast<float>(slope_scale(i) * terms.off);
      lanes(p, kMax)[lane] = off.max == -kInfinity ? 0.0f : off.max;
    }
    RowSums whole = {static_cast<float>(found.ce.max), found.ce.sum, found.spread.sum};
    if (given_.with_ce && !given_.two_slopes()) {
      whole = with_support(off, given_.options.slope, target);
      whole.spread = found.spread.sum;
    }
    finish_token(i, terms.value, whole, off.max);
  }

  double chain(double v) const { return given_.options.softcap > 0 ? 1 - v * v : 1; }

  // du of the divergence at an id off the support.
  double off_slope(int64_t i, double v) const {
    const Terms& found = support_terms_[i];
    if (tail_ == Tail::kSupport || found.max == -kInfinity) {
      return 0;
    }
    return chain(v) * slope_scale(i) * found.terms.off * std::exp(given_.options.slope * (v - found.max));
  }

  const at::Tensor& ids_;
  const at::Tensor& probs_;
  Tail tail_;
  HeadTargets support_;
  std::vector<Terms> support_terms_;
};

}  // namespace ssd_core::cpu
