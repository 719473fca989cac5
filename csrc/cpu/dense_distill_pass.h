// Distillation from a teacher with a value for every id. The two KL are linear in terms of masses that are not
// normalised, so that one look is enough; a JSD takes two.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "distill_pass.h"
#include "teacher.h"

namespace ssd_core::cpu {

class DenseDistillPass : public DistillPass {
 public:
  DenseDistillPass(const DistillGiven& given, Teacher& teacher, int64_t count)
      : DistillPass(given, true, count), teacher_(teacher) {}

  int64_t more_kept() const override { return sizeof(float); }
  int64_t extent(int64_t vocab) const override { return std::max(vocab, teacher_.vocab()); }
  bool looks_twice() const override { return given_.measure.kind == Divergence::kJsd; }

  void allocate(const Grid& grid, const Words& words) override {
    DistillPass::allocate(grid, words);
    teacher_.allocate(grid);
    teacher_tiles_.allocate(grid);
    value_.allocate(grid);
    if (looks_twice()) {
      own_.allocate(grid);
    }
  }

  void open(const Chunk& chunk) override {
    DistillPass::open(chunk);
    teacher_.open(chunk);
    teacher_tiles_.open(grid_);
    std::fill(lanes_.begin(), lanes_.end(), 0.0f);
    finished_ = false;
  }

  // The teacher's part of the scratch, and behind it a tile of its values.
  int64_t scratch() const override { return teacher_scratch() + kTile * kMaxPanel * 4; }
  void open_tile(int64_t tile, char* scratch) override { teacher_.open_tile(tile, scratch); }

  void look(const Block& block, float* u, void* kept, bool again, char* scratch) override {
    const int64_t p = block.panel, t = block.tile, panel = grid_.panel, even = divide_up(block.rows, 2) * 2;
    float unused[2 * kMaxPanel];
    float* max = again ? unused : tiles_.max.of(p, t);
    float* teacher_max = again ? unused + panel : teacher_tiles_.max.of(p, t);
    student_values(block, u, max, again);
    float* v = kept ? teacher_part(kept) : reinterpret_cast<float*>(scratch + teacher_scratch());
    teacher_.values(block, v, teacher_max, scratch);
    std::fill(v + block.rows * panel, v + even * panel, -kInfinity);
    if (again) {
      if (finished_ && looks_twice()) {  // as the second look leaves it
        words_.kernels->jsd_pulls(u, v, block.rows, pair_of(p), unused, unused + panel);
      }
      return;
    }
    float* sum = tiles_.sum.of(p, t);
    float* teacher_sum = teacher_tiles_.sum.of(p, t);
    if (looks_twice()) {
      TileOptions options = tile_options_;
      words_.kernels->exponentials(u, even, max, options, nullptr, sum);
      options.slope = teacher_.slope();
      words_.kernels->exponentials(v, even, teacher_max, options, nullptr, teacher_sum);
    } else {
      const TilePair pair = {
          given_.measure.kind, 0, given_.options.slope, teacher_.slope(), max, teacher_max, nullptr, nullptr};
      words_.kernels->kl_sums(u, v, block.rows, pair, sum, teacher_sum, value_.of(p, t));
    }
  }

  // Normalisers of both sides, and the two KL, which are linear in the terms of masses that are not normalised.
  void normalise() override {
    rows_.resize(chunk_.panels * grid_.panel);
    totals_.assign(2 * chunk_.panels * grid_.panel, 0.0);
    finish_panels<Found>(
        given_.ranks, chunk_, grid_.panel, {&labels_}, [&](int64_t p, Found* found) { find_both(p, found); },
        [&](int64_t i, const Found& mine, const OfRanks<Found>& all) {
          Found found = whole(i, mine, all);
          found.teacher = merged(all, &Found::teacher, teacher_.slope());
          all.each([&](const Found& of) { add_cross(of.row, of.teacher, of.cross, found); });
          return found;
        },
        [&](int64_t p, const Found* found) {
          for (int64_t lane = 0; lane < grid_.panel; ++lane) {
            normalise_token(p, lane, found[lane]);
          }
        });
  }

  void look_twice(const Block& block, void* kept) override {
    words_.kernels->jsd_pulls(
        static_cast<const float*>(kept), teacher_part(kept), block.rows, pair_of(block.panel),
        value_.of(block.panel, block.tile), own_.of(block.panel, block.tile));
  }

  void finish() override {
    finished_ = true;
    if (looks_twice()) {
      for (int64_t i = 0; i < chunk_.n; ++i) {
        const int64_t p = i / grid_.panel, lane = i % grid_.panel;
        for (int64_t t = 0; t < grid_.tiles; ++t) {
          total(p, lane, 0) += value_.of(p, t)[lane];
          total(p, lane, 1) += own_.of(p, t)[lane];
        }
      }
      given_.ranks.add(totals_.data(), 2 * chunk_.n);
    }
    for (int64_t i = 0; i < chunk_.n; ++i) {
      const int64_t p = i / grid_.panel, lane = i % grid_.panel;
      finish_token(i, total(p, lane, 0), rows_[i], lanes(p, kMax)[lane]);
      lanes(p, kOwn)[lane] = static_cast<float>(total(p, lane, 1));
      lanes(p, kScale)[lane] = given_.scaled() ? static_cast<float>(slope_scale(i)) : 0.0f;
    }
  }

  void gradient(const Block& block, void* kept, char* by_row, int64_t row_bytes) override {
    const int64_t p = block.panel, panel = grid_.panel;
    const std::unique_ptr<float[]> slopes(new float[(block.own + 1) * panel]);
    const auto* student = static_cast<const float*>(kept);
    words_.kernels->pair_slopes(
        student, teacher_part(kept), block.own, pair_of(p), lanes(p, kOwn), lanes(p, kScale), slopes.get());
    std::fill_n(slopes.get() + block.own * panel, panel, 0.0f);
    std::vector<std::pair<int64_t, double>> at_labels;  // places and gradients, before v is overwritten
    if (given_.labels.defined()) {
      labels_.each(block, panel, [&](const TargetEntry& entry, int64_t row, int64_t lane) {
        const double v = entry.value, chain = given_.options.softcap > 0 ? 1 - v * v : 1;
        const int64_t place = row * panel + lane;
        at_labels.emplace_back(
            place, chain * slopes[place] + ce_slope(p * panel + lane, entry.id, entry.value, entry.weight));
      });
    }
    const bool one_slope = given_.with_ce && !given_.two_slopes();
    TileGradient terms = {
        lanes(p, kMax), one_slope ? lanes(p, kFactor) : nullptr, smooth() ? lanes(p, kUniform) : nullptr};
    if (given_.two_slopes()) {
      terms.second = lanes(p, kSecond);
      terms.second_slope = given_.ce_options.slope;
    }
    terms.addend = slopes.get();
    words_.kernels->gradient(
        kept, divide_up(block.own, 2) * 2, class_weight(block), terms, tile_options_, by_row, row_bytes);
    for (const auto& [place, g] : at_labels) {
      store_gradient(
          words_, static_cast<char*>(kept), by_row, row_bytes, place / panel, place % panel, static_cast<float>(g));
    }
  }

 private:
  int64_t teacher_scratch() const { return divide_up(teacher_.scratch(), 64) * 64; }

  // The teacher's values, or a JSD's pulls, follow the student's.
  float* teacher_part(void* kept) const { return static_cast<float*>(kept) + kTile * grid_.panel; }

  double& total(int64_t p, int64_t lane, int k) { return totals_[2 * (p * grid_.panel + lane) + k]; }

  TilePair pair_of(int64_t p) {
    return {given_.measure.kind,     static_cast<float>(given_.measure.beta),
            given_.options.slope,    teacher_.slope(),
            lanes(p, kMax),          lanes(p, kTeacherMax),
            lanes(p, kLogSum),       lanes(p, kTeacherLogSum)};
  }

  void find_both(int64_t p, Found* found) const {
    const int64_t panel = grid_.panel, count = grid_.tiles * panel;
    float teacher_max[kMaxPanel];
    double teacher_sum[kMaxPanel];
    std::vector<float> tile_max(count), teacher_tile_max(count);
    std::copy_n(tiles_.max.of(p), count, tile_max.data());
    std::copy_n(teacher_tiles_.max.of(p), count, teacher_tile_max.data());
    find(p, found);
    teacher_tiles_.finish(words_, teacher_.slope(), p, teacher_max, teacher_sum);
    for (int64_t lane = 0; lane < panel; ++lane) {
      found[lane].teacher = {teacher_max[lane], teacher_sum[lane]};
      for (int64_t t = 0; !looks_twice() && t < grid_.tiles; ++t) {
        const int64_t at = t * panel + lane;
        add_cross(
            {tile_max[at], tiles_.sum.of(p, t)[lane]}, {teacher_tile_max[at], teacher_tiles_.sum.of(p, t)[lane]},
            value_.of(p, t)[lane], found[lane]);
      }
    }
  }

  bool forward() const { return given_.measure.kind == Divergence::kForwardKl; }

  // To sum_j a (log a - log b), a the teacher's exponentials and b the student's or the other way round, relative to
  // the maxima that were found: the same of a part, a tile or a rank, which is `value` relative to its own.
  void add_cross(const Exponentials& student, const Exponentials& teacher, double value, Found& to) const {
    const auto rise = [](double part, double whole, double slope) {
      return part == -kInfinity ? 0.0 : slope * (part - whole);
    };
    const double by_student = rise(student.max, to.row.max, given_.options.slope);
    const double by_teacher = rise(teacher.max, to.teacher.max, teacher_.slope());
    const double part = forward() ? teacher.sum : student.sum;
    const double shift = std::exp(forward() ? by_teacher : by_student);
    if (part != 0 && shift != 0) {  // some mass of a
      to.cross += shift * (value + part * (forward() ? by_teacher - by_student : by_student - by_teacher));
    }
  }

  void normalise_token(int64_t p, int64_t lane, const Found& found) {
    lanes(p, kMax)[lane] = static_cast<float>(found.row.max);
    lanes(p, kLogSum)[lane] = static_cast<float>(std::log(found.row.sum));
    lanes(p, kTeacherMax)[lane] = static_cast<float>(found.teacher.max);
    lanes(p, kTeacherLogSum)[lane] = static_cast<float>(std::log(found.teacher.sum));
    const Exponentials& row = given_.two_slopes() ? found.ce : found.row;
    rows_[p * grid_.panel + lane] = {static_cast<float>(row.max), row.sum, found.spread.sum};
    if (!looks_twice()) {
      const double log_ratio = std::log(found.row.sum) - std::log(found.teacher.sum);  // of the sums
      const double value = found.cross / (forward() ? found.teacher.sum : found.row.sum) +
          (forward() ? log_ratio : -log_ratio);
      total(p, lane, 0) = value;
      total(p, lane, 1) = forward() ? -1 : value;
    }
  }

  Teacher& teacher_;
  TileExponentials teacher_tiles_;
  TileNumbers value_, own_;
  std::vector<RowSums> rows_;   // (n,) of the cross-entropy
  bool finished_ = false;
  std::vector<double> totals_;  // (n, 2): the divergence, and the sum of its pulls
};

}  // namespace ssd_core::cpu
