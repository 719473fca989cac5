#include "logit_rows.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cross_entropy_terms.h"
#include "isa.h"
#include "logprob_terms.h"
#include "row_access.h"

namespace ssd_core::cpu {

const RowKernels& active_row_kernels() {
  switch (active_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
      return avx512::row_kernels;
    case Isa::kAvx2:
      return avx2::row_kernels;
#endif
    default:
      return baseline::row_kernels;
  }
}

// -- softmax

at::Tensor softmax_rows(const at::Tensor& logits, double temperature, bool log) {
  check_rows("logits", logits, false);
  const RowOptions options = row_options(logits.size(1), {}, 1, 0, temperature, 0, 0);
  const RowKernels& kernels = active_row_kernels();
  const Rows rows(logits, std::nullopt);
  const RowWriter out(logits, rows);
  SumsQuery query = {};
  query.slope = options.slope;
  rows.each([&](int64_t begin, int64_t end) {
    RowReader reader(logits);
    RowRest rest = {};
    for (int64_t i = begin; i < end; ++i) {
      const RowView row = reader(i);
      const RowSums found = kernels.sums(row, query).row;
      out.open(i, rest);
      if (log) {
        kernels.log_softmax(row, options.slope, found.max, static_cast<float>(std::log(found.sum)), rest);
      } else {
        kernels.exponential(row, {query.slope, found.max, static_cast<float>(1 / found.sum)}, rest);
      }
    }
  });
  return out.tensor();
}

at::Tensor softmax_rows_backward(const at::Tensor& grad, const at::Tensor& out, double temperature, bool log) {
  check_rows("out", out, false);
  check_rows("grad", grad, true);
  TORCH_CHECK(grad.sizes() == out.sizes(), "grad: expected shape ", out.sizes(), ", got ", grad.sizes());
  const RowKernels& kernels = active_row_kernels();
  const Rows rows(out, std::nullopt);
  const RowWriter d_logits(out, rows);
  rows.each([&](int64_t begin, int64_t end) {
    RowReader grads(grad), outs(out);
    RowRest rest = {};
    for (int64_t i = begin; i < end; ++i) {
      const RowView g = grads(i), p = outs(i);
      const auto sum = static_cast<float>(kernels.softmax_backward_sum(g, p, log));
      d_logits.open(i, rest);
      kernels.softmax_backward(g, p, log, static_cast<float>(1 / temperature), sum, rest);
    }
  });
  return d_logits.tensor();
}

// -- cross-entropy

std::tuple<at::Tensor, Given> cross_entropy_rows(
    const at::Tensor& logits,
    const at::Tensor& ids,
    const Given& probs,
    const Given& dense,
    const Given& class_weight,
    const Given& index,
    const Given& row_scale,
    double logit_scale,
    double softcap,
    double temperature,
    double label_smoothing,
    double z_loss,
    bool bucket) {
  check_rows("logits", logits, false);
  const int64_t vocab = logits.size(1);
  const at::Tensor class_weight_c = checked("class_weight", class_weight, at::kFloat, {vocab});
  TORCH_CHECK(
      !class_weight_c.defined() || !there(probs),
      "class_weight: expected hard labels or class probabilities, got sparse ones");
  if (there(dense)) {
    check_rows("dense", *dense, true);
    TORCH_CHECK(dense->sizes() == logits.sizes(), "dense: expected shape ", logits.sizes(), ", got ", dense->sizes());
  }
  const RowOptions options =
      row_options(vocab, class_weight_c, logit_scale, softcap, temperature, label_smoothing, z_loss);
  const Rows rows(logits, index);
  std::optional<Supports> supports;
  if (!there(dense)) {
    supports.emplace(ids, probs, rows, logits.size(0), vocab);
  }
  const at::Tensor scale = checked("row_scale", row_scale, at::kFloat, {rows.count()});
  const std::optional<RowWriter> d_logits = writer_if(scale.defined(), logits, rows);
  const at::Tensor results = new_results(3, rows, logits);
  float* result = results.mutable_data_ptr<float>();
  const RowKernels& kernels = active_row_kernels();

  rows.each([&](int64_t begin, int64_t end) {
    RowReader reader(logits, options.cap_slope);
    std::optional<RowReader> dense_reader;
    if (there(dense)) {
      dense_reader.emplace(*dense);
    }
    TargetReader targets(supports ? supports->width() : 0, vocab);
    Supports::Row buffer;
    std::vector<RowPatch> patches;
    for (int64_t k = begin; k < end; ++k) {
      const float row_factor = scale.defined() ? floats(scale)[k] : 0.0f;
      const RowView row = reader(rows[k]);
      RowView dense_row = {};
      RowTarget target = {};
      RowWeights weights = {options.class_weight, nullptr, 0, 0};
      SumsQuery query = {};
      query.slope = options.slope;
      if (dense_reader) {
        dense_row = (*dense_reader)(rows[k]);
        weights.probs = &dense_row;
        weights.sharp = static_cast<float>(1 - label_smoothing);
        weights.even = static_cast<float>(label_smoothing / static_cast<double>(vocab));
      } else {
        target = supports->target(rows[k], buffer, targets, options, bucket);
        query.entries = target.entries;
        query.count = target.count;
        query.off_support = target.tail > 0;
      }
      const bool weighted = dense_reader || label_smoothing > 0;
      query.weights = weighted ? &weights : nullptr;
      const Sums found = kernels.sums(row, query);
      const RowTerms terms = dense_reader ? finish_dense_row(options, found, row_factor)
                                          : finish_row(options, found.row, target, row_factor);
      result[k] = terms.loss;
      result[rows.count() + k] = terms.nll;
      result[2 * rows.count() + k] = terms.lse;
      if (!d_logits) {
        continue;
      }
      patches.clear();
      for (int64_t e = 0; e < target.count; ++e) {
        patches.push_back({target.entries[e].id, target_gradient(options, terms, target.entries[e])});
      }
      RowRest rest = {};
      rest.weights = query.weights;
      rest.weight_factor = terms.gradient.uniform;
      rest.cap = options.cap_slope;
      rest.patches = patches.data();
      rest.patch_count = target.count;
      d_logits->open(k, rest);
      kernels.exponential(row, {query.slope, terms.gradient.max, terms.gradient.mass}, rest);
    }
  });
  return {results, written(d_logits)};
}

// -- log-probability

std::tuple<at::Tensor, Given> logprob_rows(
    const at::Tensor& logits,
    const at::Tensor& ids,
    const Given& index,
    const Given& row_scale,
    double logit_scale,
    double softcap,
    double temperature) {
  check_rows("logits", logits, false);
  const int64_t vocab = logits.size(1);
  TORCH_CHECK(ids.dim() == 1, "ids: expected shape (N,), got ", ids.sizes());
  const at::Tensor column = ids.unsqueeze(1);
  const RowOptions options = row_options(vocab, {}, logit_scale, softcap, temperature, 0, 0);
  const Rows rows(logits, index);
  const Supports supports(column, std::nullopt, rows, logits.size(0), vocab);
  const at::Tensor scale = checked("row_scale", row_scale, at::kFloat, {rows.count(), 2});
  const std::optional<RowWriter> d_logits = writer_if(scale.defined(), logits, rows);
  const at::Tensor results = new_results(4, rows, logits);
  float* result = results.mutable_data_ptr<float>();
  const RowKernels& kernels = active_row_kernels();

  rows.each([&](int64_t begin, int64_t end) {
    RowReader reader(logits, options.cap_slope);
    Supports::Row buffer;
    for (int64_t k = begin; k < end; ++k) {
      const RowView row = reader(rows[k]);
      supports.read(rows[k], buffer);
      TargetEntry entry = {buffer.ids[0], 1.0, 0.0f};
      SumsQuery query = {};
      query.slope = options.slope;
      query.entries = &entry;
      query.count = 1;
      query.entropy = true;
      const Sums found = kernels.sums(row, query);
      const LogprobTerms terms =
          logprob_terms(options.slope, found.row.max, found.row.sum, -found.below, entry.value);
      const double each[] = {terms.logprob, terms.entropy, terms.lse, static_cast<double>(found.argmax)};
      for (int64_t r = 0; r < 4; ++r) {
        result[r * rows.count() + k] = static_cast<float>(each[r]);
      }
      if (!d_logits) {
        continue;
      }
      const double chain = options.logit_scale / options.temperature;
      const double on_logprob = chain * floats(scale)[2 * k], on_entropy = chain * floats(scale)[2 * k + 1];
      const RowPatch patch = {entry.id, logprob_slope(options, terms, entry.value, on_logprob, on_entropy)};
      RowRest rest = {};
      rest.cap = options.cap_slope;
      rest.patches = &patch;
      rest.patch_count = 1;
      d_logits->open(k, rest);
      kernels.logprob_gradient(
          row, {query.slope, found.row.max, static_cast<float>(1 / found.row.sum)},
          {static_cast<float>(on_logprob), static_cast<float>(on_entropy), static_cast<float>(terms.log_sum),
           static_cast<float>(terms.entropy)},
          rest);
    }
  });
  return {results, written(d_logits)};
}

}  // namespace ssd_core::cpu
