#include "linear_cross_entropy.h"

#include <ATen/Parallel.h>
#include <ATen/TensorIndexing.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <vector>

#include "class_probabilities.h"
#include "cross_entropy_terms.h"
#include "grad_filter.h"
#include "head_targets.h"
#include "linear_head.h"
#include "ranks.h"
#include "vocab_order.h"

namespace ssd_core::cpu {

namespace {

struct Tensors {
  at::Tensor ids, probs, class_weight, row_scale, bias;
};

class CrossEntropyPass : public RowPass {
 public:
  CrossEntropyPass(
      const Tensors& given, const RowOptions& options, const Ranks& ranks, bool bucket, int64_t count)
      : given_(given), options_(options), ranks_(ranks), bucket_(bucket), scaled_(given.row_scale.defined()),
        tile_options_{options.softcap > 0, options.cap_slope, options.slope, options.softcap > 0} {
    const auto floats = given.ids.options().dtype(at::kFloat);
    loss = at::empty({count}, floats);
    nll = at::empty({count}, floats);
    lse = at::empty({count}, floats);
  }

  at::Tensor loss, nll, lse;

  bool keeps_values() const override { return tile_options_.keep_values; }

  void allocate(const Grid& grid, const Words& words) override {
    grid_ = grid;
    words_ = words;
    tiles_.allocate(grid);
    if (options_.label_smoothing > 0) {
      spread_.allocate(grid);
    }
    if (scaled_) {
      factor_ = at::empty({3 * grid.panels * grid.panel}, loss.options());
    }
  }

  void open(const Chunk& chunk) override {
    chunk_ = chunk;
    tiles_.open(grid_);
    targets_.read(chunk, grid_, given_.ids, given_.probs, options_, bucket_);
  }

  void look(const Block& block, float* u, void* kept, bool again, char*) override {
    const int64_t p = block.panel, rows = block.rows, even = divide_up(rows, 2) * 2, panel = grid_.panel;
    const float* bias = given_.bias.defined() ? given_.bias.const_data_ptr<float>() + block.first : nullptr;
    float unused[2 * kMaxPanel];
    float* max = again ? unused : tiles_.max.of(p, block.tile);
    float* sum = again ? unused + panel : tiles_.sum.of(p, block.tile);
    words_.kernels->values(u, rows, bias, tile_options_, max);
    if (!again && spread_.defined()) {
      spread_.look(words_, block, u, max, options_.class_weight);
    }
    bool removed = false;
    targets_.each(block, panel, [&](TargetEntry& entry, int64_t row, int64_t lane) {
      float& v = u[row * panel + lane];
      entry.value = again ? entry.value : v;
      if (targets_.rows[p * panel + lane].tail > 0) {  // the sum is then of what is off the support
        v = -kInfinity;
        removed = true;
      }
    });
    if (removed) {
      words_.kernels->values(u, rows, nullptr, {false, 0.0f, options_.slope, false}, max);
    }
    std::fill(u + rows * panel, u + even * panel, -kInfinity);
    words_.kernels->exponentials(u, even, max, tile_options_, kept, sum);
  }

  // The row's statistics from its tiles', results, and what the gradient needs.
  void finish() override {
    terms_.resize(chunk_.n);
    finish_panels<Found>(
        ranks_, chunk_, grid_.panel, {&targets_}, [&](int64_t p, Found* found) { find(p, found); },
        [&](int64_t i, const Found& mine, const OfRanks<Found>& all) {
          const Found whole = {merged(all, &Found::row, options_.slope), merged(all, &Found::spread)};
          tiles_.rebase(
              i / grid_.panel, i % grid_.panel, rebased(options_.slope, mine.row.max, whole.row.max));
          return whole;
        },
        [&](int64_t p, const Found* found) {
          for (int64_t lane = 0; lane < grid_.panel; ++lane) {
            const Found& of = found[lane];
            finish_token(p, lane, {static_cast<float>(of.row.max), of.row.sum, of.spread.sum});
          }
        });
  }

  void gradient(const Block& block, void* kept, char* by_row, int64_t row_bytes) override {
    const int64_t p = block.panel, panel = grid_.panel;
    const bool smooth = options_.label_smoothing > 0;
    const float* lanes = lanes_of(p);
    const float* shift = tiles_.max.of(p, block.tile);
    float factor[kMaxPanel];
    for (int64_t lane = 0; lane < panel; ++lane) {
      factor[lane] = tile_options_.keep_values ? lanes[lane] : lanes[lane] * shift[lane];
    }
    words_.kernels->gradient(
        kept, divide_up(block.rows, 2) * 2, smooth ? class_weight(block) : nullptr,
        {lanes + 2 * panel, factor, smooth ? lanes + panel : nullptr}, tile_options_, by_row, row_bytes);
    targets_.each(block, panel, [&](const TargetEntry& entry, int64_t row, int64_t lane) {
      const float g = target_gradient(options_, terms_[p * panel + lane], entry);
      store_gradient(words_, static_cast<char*>(kept), by_row, row_bytes, row, lane, g);
    });
  }

  // -- for the gradient filter: of a finished chunk

  // Softmax mass of each tile (tiles,) of token i; infinite where it holds a target.
  void masses(int64_t i, float* mass) const {
    const int64_t p = i / grid_.panel, lane = i % grid_.panel;
    const double factor = 1 / terms_[i].sum;
    for (int64_t t = 0; t < grid_.tiles; ++t) {
      mass[t] = static_cast<float>(
          static_cast<double>(tiles_.sum.of(p, t)[lane]) * tiles_.max.of(p, t)[lane] * factor);
    }
    const RowTarget& target = targets_.rows[i];
    for (int64_t k = 0; k < target.count; ++k) {
      if (target.entries[k].id >= 0 && target.entries[k].id < options_.own) {
        mass[target.entries[k].id / kTile] = kInfinity;
      }
    }
  }

  // What the softmax enters the gradient of token i with.
  double weight(int64_t i) const { return terms_[i].common * terms_[i].scale; }

 private:
  struct Found {
    Exponentials row;  // without the support, if that has a tail
    Spread spread;
  };

  void find(int64_t p, Found* found) const {
    float max[kMaxPanel];
    double sum[kMaxPanel];
    Spread spread[kMaxPanel] = {};
    if (spread_.defined()) {
      spread_.finish(grid_, options_.class_weight, p, spread);
    }
    tiles_.finish(words_, options_.slope, p, max, sum);
    for (int64_t lane = 0; lane < grid_.panel; ++lane) {
      found[lane] = {{max[lane], sum[lane]}, spread[lane]};
    }
  }

  const float* class_weight(const Block& block) const {
    return options_.class_weight ? options_.class_weight + block.first : nullptr;
  }

  // (3, panel): mass, uniform, max
  float* lanes_of(int64_t p) const { return factor_.mutable_data_ptr<float>() + 3 * p * grid_.panel; }

  void finish_token(int64_t p, int64_t lane, const RowSums& found) {
    const int64_t i = p * grid_.panel + lane, place = chunk_.begin + i;
    RowGradient gradient = {};
    if (i < chunk_.n) {
      const float scale = scaled_ ? given_.row_scale.const_data_ptr<float>()[place] : 0.0f;
      terms_[i] = finish_row(options_, found, targets_.rows[i], scale);
      loss.mutable_data_ptr<float>()[place] = terms_[i].loss;
      nll.mutable_data_ptr<float>()[place] = terms_[i].nll;
      lse.mutable_data_ptr<float>()[place] = terms_[i].lse;
      gradient = terms_[i].gradient;
    }
    if (scaled_) {
      float* lanes = lanes_of(p);
      lanes[lane] = gradient.mass;
      lanes[grid_.panel + lane] = gradient.uniform;
      lanes[2 * grid_.panel + lane] = gradient.max;
    }
  }

  const Tensors& given_;
  const RowOptions& options_;
  const Ranks& ranks_;
  bool bucket_, scaled_;
  TileOptions tile_options_;
  Grid grid_;
  Words words_;
  Chunk chunk_;
  HeadTargets targets_;
  TileExponentials tiles_;
  TileSpread spread_;
  at::Tensor factor_;
  std::vector<RowTerms> terms_;
};

// Ids become places in the order, and what is given by id is given by place. An id outside the vocabulary stays so.
void put_in_order(const at::Tensor& order, Tensors& given) {
  const int64_t vocab = order.size(0);
  at::Tensor places = at::empty_like(order);
  places.index_copy_(0, order, at::arange(vocab, order.options()));
  const at::Tensor known = given.ids.ge(0).logical_and_(given.ids.lt(vocab));
  given.ids = at::where(known, places.index({given.ids.clamp(0, vocab - 1)}), given.ids);
  given.bias = given.bias.defined() ? given.bias.index_select(0, order) : given.bias;
  if (given.class_weight.defined()) {
    given.class_weight = paired_class_weights(given.class_weight.index_select(0, order));
  }
}

}  // namespace

int64_t linear_cross_entropy_bytes(
    int64_t rows, int64_t columns, int64_t vocab, int64_t hidden, int64_t support, at::ScalarType dtype, bool softcap,
    bool smoothing, bool dense, bool cast) {
  const int64_t tiles = divide_up(vocab, kTile);
  const int64_t statistics = (tiles + 1) * 4 * (2 + (smoothing ? 2 : 0) + (dense ? 5 : 0)) + 4 * 4;
  const int64_t row = statistics + HeadTargets::row_bytes(support) + static_cast<int64_t>(sizeof(RowTerms));
  const int64_t thread = dense ? kTile * kMaxPanel * 4 : 0;
  return head_bytes(rows, columns, vocab, hidden, dtype, softcap || dense, cast, dense ? 4 : 0) + rows * row +
      tiles * 16 + vocab / 8 + counted_threads() * thread;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy(
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    const at::Tensor& ids,
    const std::optional<at::Tensor>& probs,
    const std::optional<at::Tensor>& dense,
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
    bool bucket,
    double grad_filter,
    double grad_filter_weight,
    const std::optional<at::Tensor>& vocab_order,
    int64_t held_bytes,
    const Ranks::Gather& gather,
    int64_t vocab_start) {
  const Ranks ranks(gather, vocab_start, weight.size(0));
  Tensors given = {
      ranks.relative(ids), value_or_undefined(probs), paired_class_weights(class_weight),
      contiguous_or_undefined(row_scale), value_or_undefined(bias)};
  const at::Tensor bias_given = given.bias, tokens = contiguous_or_undefined(index);
  given.bias = bias_given.defined() ? bias_given.to(at::kFloat).contiguous() : bias_given;
  const RowOptions options = ranks.shared(row_options(
      weight.size(0), given.class_weight, logit_scale, softcap, temperature, label_smoothing, z_loss));
  HeadCall call = {
      input, weight, bias_given, tokens, dtype, given.row_scale.defined(), needs, keep_float32, rows, columns};
  call.shared = !ranks.alone();
  if (dense.has_value() && dense->defined()) {
    ClassProbabilityPass pass(*dense, given.bias, given.row_scale, options, ranks, call.count());
    const HeadGradients gradients = run_head(call, pass);
    return {pass.loss, pass.nll, pass.lse, at::Tensor(), gradients.input, gradients.weight, gradients.bias};
  }
  const bool filtered = grad_filter > 0 || grad_filter_weight > 0;
  RowOptions ordered = options;
  if (filtered) {
    call.order = vocab_order.has_value() ? vocab_order->contiguous() : cpu::vocab_order(call, given.bias, options);
    put_in_order(call.order, given);
    ordered.class_weight = given.class_weight.defined() ? given.class_weight.const_data_ptr<float>() : nullptr;
  }
  CrossEntropyPass pass(given, ordered, ranks, bucket, call.count());
  std::optional<GradFilter> filter;
  if (filtered) {
    filter.emplace(
        grad_filter, grad_filter_weight, held_bytes,
        GradFilter::Tokens{
            [&](int64_t i, float* mass) { pass.masses(i, mass); }, [&](int64_t i) { return pass.weight(i); }},
        ranks);
  }
  const HeadGradients gradients = run_head(call, pass, filter ? &*filter : nullptr);
  const at::Tensor certificate = filter ? filter->certificate() : at::Tensor();
  return {pass.loss, pass.nll, pass.lse, certificate, gradients.input, gradients.weight, gradients.bias};
}

}  // namespace ssd_core::cpu
