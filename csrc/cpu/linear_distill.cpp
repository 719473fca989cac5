#include "linear_distill.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "distill_terms.h"
#include "head_targets.h"
#include "linear_head.h"
#include "ranks.h"
#include "teacher.h"

namespace ssd_core::cpu {

namespace {

// What every distillation is given.
struct Given {
  at::Tensor bias, labels, row_scale;  // labels (N, 1)
  RowOptions options;                  // of the divergence
  RowOptions ce_options;               // of the cross-entropy, at temperature 1
  Measure measure;
  bool with_ce;
  Ranks ranks;

  bool scaled() const { return row_scale.defined(); }
  bool two_slopes() const { return with_ce && measure.temperature != 1; }
};

// What the two kinds of teacher share: the student's values, its cross-entropy at temperature 1, results.
class DistillPass : public RowPass {
 public:
  DistillPass(const Given& given, bool keeps_values, int64_t count)
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

  const Given& given_;
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

class SparseDistillPass : public DistillPass {
 public:
  SparseDistillPass(const Given& given, const at::Tensor& ids, const at::Tensor& probs, Tail tail, int64_t count)
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

class DenseDistillPass : public DistillPass {
 public:
  DenseDistillPass(const Given& given, Teacher& teacher, int64_t count)
      : DistillPass(given, true, count), teacher_(teacher) {}

  int64_t more_kept() const override { return sizeof(float); }
  int64_t extent(int64_t vocab) const override { return std::max(vocab, teacher_.vocab()); }
  bool looks_twice() const override { return given_.measure.kind == Divergence::kJsd; }

  void allocate(const Grid& grid, const Words& words) override {
    DistillPass::allocate(grid, words);
    teacher_.allocate(grid);
    teacher_tiles_.allocate(grid);
    value_.allocate(grid);
    own_.allocate(grid);
  }

  void open(const Chunk& chunk) override {
    DistillPass::open(chunk);
    teacher_.open(chunk);
    teacher_tiles_.open(grid_);
    std::fill(lanes_.begin(), lanes_.end(), 0.0f);
  }

  // The teacher's part of the scratch, and behind it a tile of its values.
  int64_t scratch() const override { return teacher_scratch() + kTile * kMaxPanel * 4; }
  void open_tile(int64_t tile, char* scratch) override { teacher_.open_tile(tile, scratch); }

  void look(const Block& block, float* u, void* kept, bool again, char* scratch) override {
    const int64_t p = block.panel, t = block.tile, panel = grid_.panel, even = divide_up(block.rows, 2) * 2;
    float unused[4 * kMaxPanel];
    float* max = again ? unused : tiles_.max.of(p, t);
    float* sum = again ? unused + panel : tiles_.sum.of(p, t);
    float* teacher_max = again ? unused + 2 * panel : teacher_tiles_.max.of(p, t);
    float* teacher_sum = again ? unused + 3 * panel : teacher_tiles_.sum.of(p, t);
    student_values(block, u, max, again);
    words_.kernels->exponentials(u, even, max, tile_options_, kept, sum);
    float* v = kept ? teacher_part(kept) : reinterpret_cast<float*>(scratch + teacher_scratch());
    teacher_.values(block, v, teacher_max, scratch);
    std::fill(v + block.rows * panel, v + even * panel, -kInfinity);
    if (again) {
      return;
    }
    TileOptions options = tile_options_;
    options.slope = teacher_.slope();
    words_.kernels->exponentials(v, even, teacher_max, options, nullptr, teacher_sum);
    if (!looks_twice()) {
      const TilePair pair = {
          given_.measure.kind, 0, given_.options.slope, teacher_.slope(), max, teacher_max, nullptr, nullptr};
      words_.kernels->pair_sums(u, v, block.rows, pair, value_.of(p, t), own_.of(p, t));
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

  void look_twice(const Block& block, const void* kept) override {
    words_.kernels->pair_sums(
        static_cast<const float*>(kept), teacher_part(kept), block.rows, pair_of(block.panel),
        value_.of(block.panel, block.tile), own_.of(block.panel, block.tile));
  }

  void finish() override {
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

  // The teacher's values follow the student's.
  template <class T>
  static auto teacher_part_of(T* kept, int64_t panel) {
    return kept + kTile * panel;
  }
  float* teacher_part(void* kept) const { return teacher_part_of(static_cast<float*>(kept), grid_.panel); }
  const float* teacher_part(const void* kept) const {
    return teacher_part_of(static_cast<const float*>(kept), grid_.panel);
  }

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
  std::vector<double> totals_;  // (n, 2): the divergence, and the sum of its pulls
};

}  // namespace

int64_t linear_distill_bytes(
    int64_t rows, int64_t columns, int64_t vocab, int64_t hidden, int64_t support, int64_t teacher_hidden,
    at::ScalarType dtype, bool cast) {
  const int64_t tiles = divide_up(vocab, kTile), dense = support == 0;
  const int64_t statistics = (tiles + 1) * 4 * (dense ? 10 : 6) + (9 + 12) * 4;
  const int64_t row = statistics + HeadTargets::row_bytes(support + 1) + static_cast<int64_t>(sizeof(RowTerms)) +
      static_cast<int64_t>(sizeof(SupportTerms)) + 8;
  const int64_t thread = dense ? (3 * kTile + 2 * tiles) * kMaxPanel * 4 : 0;
  return head_bytes(rows, columns, vocab, hidden, dtype, true, cast, dense ? 4 : 0) + rows * row + tiles * 32 +
      vocab / 8 + counted_threads() * thread + teacher_bytes(rows, teacher_hidden);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_distill(
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ids,
    const std::optional<at::Tensor>& probs,
    const std::optional<at::Tensor>& teacher_logits,
    const std::optional<at::Tensor>& teacher_input,
    const std::optional<at::Tensor>& teacher_weight,
    const std::optional<at::Tensor>& teacher_bias,
    const std::optional<at::Tensor>& labels,
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
    double teacher_logit_scale,
    double teacher_softcap,
    const std::string& divergence,
    double beta,
    const std::string& tail,
    bool temperature_squared,
    bool with_ce,
    double ce_weight,
    double label_smoothing,
    double z_loss,
    const Ranks::Gather& gather,
    int64_t vocab_start) {
  const at::Tensor bias_given = value_or_undefined(bias), tokens = contiguous_or_undefined(index);
  const at::Tensor weights = paired_class_weights(class_weight);
  const int64_t vocab = weight.size(0);
  const Ranks ranks(gather, vocab_start, vocab);
  Given given = {
      bias_given.defined() ? bias_given.to(at::kFloat).contiguous() : bias_given,
      labels.has_value() && labels->defined() ? ranks.relative(*labels).unsqueeze(-1) : at::Tensor(),
      contiguous_or_undefined(row_scale),
      ranks.shared(row_options(vocab, at::Tensor(), logit_scale, softcap, temperature, 0, 0)),
      ranks.shared(row_options(vocab, weights, logit_scale, softcap, 1, label_smoothing, z_loss)),
      measure_of(divergence, beta, temperature, temperature_squared, ce_weight),
      with_ce,
      ranks};
  given.ce_options.factor = ce_weight;
  HeadCall call = {
      input, weight, bias_given, tokens, dtype, given.scaled(), needs, keep_float32, rows, columns};
  call.shared = !ranks.alone();
  const auto results = [&](DistillPass& pass) {
    const HeadGradients gradients = run_head(call, pass);
    return std::make_tuple(
        pass.result(0), pass.result(1), pass.result(2), pass.result(3), gradients.input, gradients.weight,
        gradients.bias);
  };
  if (ids.has_value() && ids->defined()) {
    const at::Tensor support = ranks.relative(*ids);
    SparseDistillPass pass(given, support, *probs, tail_of(tail), call.count());
    return results(pass);
  }
  Teacher teacher(
      value_or_undefined(teacher_logits), value_or_undefined(teacher_input), value_or_undefined(teacher_weight),
      value_or_undefined(teacher_bias), teacher_logit_scale, teacher_softcap, temperature);
  DenseDistillPass pass(given, teacher, call.count());
  return results(pass);
}

}  // namespace ssd_core::cpu
