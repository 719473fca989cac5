#include "linear_logprob.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <vector>

#include "head_targets.h"
#include "linear_head.h"
#include "logprob_terms.h"
#include "ranks.h"

namespace ssd_core::cpu {

namespace {

class LogprobPass : public RowPass {
 public:
  // ids (N, 1); row_scale (M, 2) or undefined.
  LogprobPass(
      const at::Tensor& ids, const at::Tensor& bias, const at::Tensor& row_scale, const RowOptions& options,
      const Ranks& ranks, int64_t count)
      : ids_(ids), bias_(bias), row_scale_(row_scale), options_(options), ranks_(ranks), scaled_(row_scale.defined()),
        slopes_(scaled_ && row_scale.select(1, 1).count_nonzero().item<int64_t>() > 0),
        tile_options_{options.softcap > 0, options.cap_slope, options.slope, slopes_ || options.softcap > 0},
        results_(at::empty({4, count}, ids.options().dtype(at::kFloat))) {}

  // logprob, entropy, lse, argmax
  at::Tensor result(int64_t k) const { return results_.select(0, k); }

  bool keeps_values() const override { return tile_options_.keep_values; }

  void allocate(const Grid& grid, const Words& words) override {
    grid_ = grid;
    words_ = words;
    tiles_.allocate(grid);
    below_.allocate(grid);
    first_.allocate(grid);
    if (scaled_) {
      lanes_.resize(3 * grid.panels * grid.panel);
    }
  }

  void open(const Chunk& chunk) override {
    chunk_ = chunk;
    tiles_.open(grid_);
    targets_.read(chunk, grid_, ids_, at::Tensor(), options_, false);
  }

  void look(const Block& block, float* u, void* kept, bool again, char*) override {
    const int64_t p = block.panel, t = block.tile, panel = grid_.panel, even = divide_up(block.rows, 2) * 2;
    const float* bias = bias_.defined() ? bias_.const_data_ptr<float>() + block.first : nullptr;
    float unused[2 * kMaxPanel];
    float* max = again ? unused : tiles_.max.of(p, t);
    float* sum = again ? unused + panel : tiles_.sum.of(p, t);
    words_.kernels->values(u, block.rows, bias, tile_options_, max);
    if (!again) {
      auto* first = reinterpret_cast<int32_t*>(first_.of(p, t));
      words_.kernels->moments(u, block.rows, max, options_.slope, below_.of(p, t), first);
      targets_.each(block, panel, [&](TargetEntry& entry, int64_t row, int64_t lane) {
        entry.value = u[row * panel + lane];
      });
    }
    std::fill(u + block.rows * panel, u + even * panel, -kInfinity);
    words_.kernels->exponentials(u, even, max, tile_options_, kept, sum);
  }

  void finish() override {
    terms_.resize(chunk_.n);
    finish_panels<Found>(
        ranks_, chunk_, grid_.panel, {&targets_}, [&](int64_t p, Found* found) { find(p, found); },
        [&](int64_t i, const Found& mine, const OfRanks<Found>& all) { return whole(i, mine, all); },
        [&](int64_t p, const Found* found) {
          for (int64_t lane = 0; lane < grid_.panel; ++lane) {
            finish_token(p, lane, found[lane]);
          }
        });
  }

  void gradient(const Block& block, void* kept, char* by_row, int64_t row_bytes) override {
    const int64_t p = block.panel, panel = grid_.panel;
    const float* lanes = lanes_.data() + 3 * p * panel;
    const float* shift = tiles_.max.of(p, block.tile);
    float factor[kMaxPanel];
    for (int64_t lane = 0; lane < panel; ++lane) {
      factor[lane] = tile_options_.keep_values ? lanes[lane] : lanes[lane] * shift[lane];
    }
    TileGradient terms = {lanes + 2 * panel, factor};
    terms.slope_term = slopes_ ? lanes + panel : nullptr;
    words_.kernels->gradient(kept, divide_up(block.rows, 2) * 2, nullptr, terms, tile_options_, by_row, row_bytes);
    targets_.each(block, panel, [&](const TargetEntry& entry, int64_t row, int64_t lane) {
      const Terms& terms = terms_[p * panel + lane];
      const float g = logprob_slope(options_, terms.row, entry.value, terms.on_logprob, terms.on_entropy);
      store_gradient(words_, static_cast<char*>(kept), by_row, row_bytes, row, lane, g);
    });
  }

 private:
  struct Terms {
    LogprobTerms row;
    double on_logprob, on_entropy;  // with dz/du, but for the softcap
  };

  struct Found {
    Exponentials row;
    double below;   // sum_j e^x x, x relative to the row's max
    double argmax;  // of all ranks' ids
  };

  void find(int64_t p, Found* found) const {
    const int64_t panel = grid_.panel;
    float max[kMaxPanel];
    double sum[kMaxPanel];
    std::vector<float> tile_max(grid_.tiles * panel);
    std::copy_n(tiles_.max.of(p), tile_max.size(), tile_max.data());
    tiles_.finish(words_, options_.slope, p, max, sum);
    for (int64_t lane = 0; lane < panel && p * panel + lane < chunk_.n; ++lane) {
      double below = 0;
      int64_t argmax = -1;
      for (int64_t t = 0; t < grid_.tiles; ++t) {
        const float shift = tiles_.max.of(p, t)[lane], part = tiles_.sum.of(p, t)[lane];
        if (argmax < 0 && tile_max[t * panel + lane] == max[lane]) {
          argmax = t * kTile + reinterpret_cast<const int32_t*>(first_.of(p, t))[lane];
        }
        if (shift > 0 || std::isnan(part)) {
          const double rise = options_.slope * (static_cast<double>(tile_max[t * panel + lane]) - max[lane]);
          below += shift * (below_.of(p, t)[lane] + rise * part);
        }
      }
      argmax = options_.first + std::max<int64_t>(argmax, 0);
      found[lane] = {{max[lane], sum[lane]}, below, static_cast<double>(argmax)};
    }
  }

  Found whole(int64_t i, const Found& mine, const OfRanks<Found>& all) const {
    const double slope = options_.slope;
    Found found = {merged(all, &Found::row, slope), 0, kInfinity};
    all.each([&](const Found& of) {
      const double shift = rebased(slope, of.row.max, found.row.max);
      if (shift > 0 || std::isnan(of.row.sum)) {
        found.below += shift * (of.below + slope * (of.row.max - found.row.max) * of.row.sum);
      }
      if (of.row.max == found.row.max) {
        found.argmax = std::min(found.argmax, of.argmax);
      }
    });
    tiles_.rebase(i / grid_.panel, i % grid_.panel, rebased(slope, mine.row.max, found.row.max));
    return found;
  }

  void finish_token(int64_t p, int64_t lane, const Found& found) {
    const int64_t i = p * grid_.panel + lane, place = chunk_.begin + i, panel = grid_.panel;
    Terms terms = {};
    if (i < chunk_.n) {
      terms.row = logprob_terms(
          options_.slope, found.row.max, found.row.sum, found.below, targets_.rows[i].entries->value);
      const double results[] = {terms.row.logprob, terms.row.entropy, terms.row.lse, found.argmax};
      for (int k = 0; k < 4; ++k) {
        results_.mutable_data_ptr<float>()[k * results_.size(1) + place] = static_cast<float>(results[k]);
      }
      if (scaled_) {
        const double scale = options_.logit_scale / options_.temperature;
        terms.on_logprob = scale * row_scale_.const_data_ptr<float>()[2 * place];
        terms.on_entropy = scale * row_scale_.const_data_ptr<float>()[2 * place + 1];
      }
      terms_[i] = terms;
    }
    if (scaled_) {  // -q_j (on_logprob + on_entropy (log q_j + H))
      float* lanes = lanes_.data() + 3 * p * panel;
      const double mass = i < chunk_.n ? 1 / found.row.sum : 0;
      lanes[lane] =
          static_cast<float>(-mass * (terms.on_logprob + terms.on_entropy * (terms.row.entropy - terms.row.log_sum)));
      lanes[panel + lane] = static_cast<float>(-mass * terms.on_entropy);
      lanes[2 * panel + lane] = static_cast<float>(terms.row.max);
    }
  }

  const at::Tensor& ids_;
  const at::Tensor& bias_;
  const at::Tensor& row_scale_;
  const RowOptions& options_;
  const Ranks& ranks_;
  bool scaled_, slopes_;  // slopes: the entropy's gradient is wanted, too
  TileOptions tile_options_;
  at::Tensor results_;  // (4, M)
  Grid grid_;
  Words words_;
  Chunk chunk_;
  HeadTargets targets_;
  TileExponentials tiles_;
  TileNumbers below_, first_;
  std::vector<float> lanes_;  // (panels, 3, panel): factor, slope term, max
  std::vector<Terms> terms_;
};

}  // namespace

int64_t linear_logprob_bytes(
    int64_t rows, int64_t columns, int64_t vocab, int64_t hidden, at::ScalarType dtype, bool cast) {
  const int64_t tiles = divide_up(vocab, kTile), row = (tiles + 1) * 4 * 4 + 3 * 4 + 5 * 8 + HeadTargets::row_bytes(1);
  return head_bytes(rows, columns, vocab, hidden, dtype, true, cast) + rows * row + tiles * 16 +
      counted_threads() * tiles * kMaxPanel * 4;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_logprob(
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    const at::Tensor& ids,
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
    const Ranks::Gather& gather,
    int64_t vocab_start) {
  const Ranks ranks(gather, vocab_start, weight.size(0));
  const at::Tensor bias_given = value_or_undefined(bias), tokens = contiguous_or_undefined(index);
  const at::Tensor bias_floats = bias_given.defined() ? bias_given.to(at::kFloat).contiguous() : bias_given;
  const at::Tensor labels = ranks.relative(ids).unsqueeze(-1), scale = contiguous_or_undefined(row_scale);
  const RowOptions options =
      ranks.shared(row_options(weight.size(0), at::Tensor(), logit_scale, softcap, temperature, 0, 0));
  HeadCall call = {
      input, weight, bias_given, tokens, dtype, scale.defined(), needs, keep_float32, rows, columns};
  call.shared = !ranks.alone();
  LogprobPass pass(labels, bias_floats, scale, options, ranks, call.count());
  const HeadGradients gradients = run_head(call, pass);
  return {pass.result(0), pass.result(1),  pass.result(2),  pass.result(3),
          gradients.input, gradients.weight, gradients.bias};
}

}  // namespace ssd_core::cpu
