#include "cross_entropy_terms.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace ssd_core::cpu {

RowOptions row_options(
    int64_t vocab, const at::Tensor& class_weight, double logit_scale, double softcap, double temperature,
    double label_smoothing, double z_loss) {
  const auto check_option = [](const char* name, double value, bool ok, const char* expected) {
    TORCH_CHECK(ok && std::isfinite(value), name, ": expected ", expected, ", got ", value);
  };
  check_option("logit_scale", logit_scale, logit_scale > 0, "a positive number");
  check_option("softcap", softcap, softcap >= 0, "a positive number, or 0 for none");
  check_option("temperature", temperature, temperature > 0, "a positive number");
  check_option("label_smoothing", label_smoothing, label_smoothing >= 0 && label_smoothing <= 1, "0 to 1");
  check_option("z_loss", z_loss, true, "a finite number");

  RowOptions options = {};
  options.vocab = options.own = vocab;
  options.class_weight = class_weight.defined() ? class_weight.const_data_ptr<float>() : nullptr;
  options.class_weight_sum = static_cast<double>(vocab);
  if (options.class_weight) {
    options.class_weight_sum = 0;
    for (int64_t j = 0; j < vocab; ++j) {
      options.class_weight_sum += options.class_weight[j];
    }
  }
  options.logit_scale = logit_scale;
  options.softcap = softcap;
  options.temperature = temperature;
  options.label_smoothing = label_smoothing;
  options.z_loss = z_loss;
  options.factor = 1;
  options.cap_slope = static_cast<float>(softcap > 0 ? logit_scale / softcap : 0.0);
  options.slope = static_cast<float>((softcap > 0 ? softcap : logit_scale) / temperature);
  return options;
}

void check_ids(
    const int64_t* ids, const float* probs, int64_t rows, int64_t width, int64_t vocab, int64_t first) {
  for (int64_t i = 0; i < rows * width; ++i) {
    const bool used = !probs || probs[i] != 0;
    const int64_t id = ids[i] + first;
    TORCH_CHECK_INDEX(
        !used || (id >= 0 && id < vocab),
        "ids: expected 0 <= id < V = ", vocab, ", got ", id, " in row ", i / width, ", column ", i % width);
  }
}

TargetReader::TargetReader(int64_t width, int64_t vocab)
    : entries_(width), seen_(width > 1 ? (vocab + 63) / 64 : 0) {}

namespace {

// c of the label; NaN: another rank's. Without class weights there may be no id.
double class_weight_of(const RowOptions& options, const int64_t* label) {
  if (!options.class_weight) {
    return 1;
  }
  const bool own = *label >= 0 && *label < options.own;
  return own ? options.class_weight[*label] : std::numeric_limits<double>::quiet_NaN();
}

}  // namespace

RowTarget TargetReader::read(const int64_t* ids, const float* probs, const RowOptions& options, bool bucket) {
  const auto width = static_cast<int64_t>(entries_.size());
  TargetEntry* entries = entries_.data();
  int64_t count = 0;
  double sum = 0;
  for (int64_t k = 0; k < width; ++k) {
    const double weight = probs ? probs[k] : 1.0f;
    if (weight == 0) {
      continue;
    }
    sum += weight;
    if (width > 1) {
      const int64_t place = ids[k] + options.first;
      uint64_t& word = seen_[place / 64];
      const uint64_t bit = uint64_t{1} << (place % 64);
      if (word & bit) {
        std::find_if(entries, entries + count, [&](const auto& entry) { return entry.id == ids[k]; })->weight += weight;
        continue;
      }
      word |= bit;
    }
    entries[count++] = {ids[k], weight, 0.0f};
  }
  if (width > 1) {
    for (int64_t k = 0; k < count; ++k) {
      seen_[(entries[k].id + options.first) / 64] = 0;
    }
  }
  if (options.own == options.vocab) {
    std::sort(entries, entries + count, [](const auto& a, const auto& b) { return a.id < b.id; });
  }
  const double tail = bucket && count < options.vocab && sum < 1 ? 1 - sum : 0;
  return {entries, count, sum, tail, class_weight_of(options, ids)};
}

RowTerms finish_row(const RowOptions& options, const RowSums& found, const RowTarget& target, float row_scale) {
  const double slope = options.slope;
  const bool tail = target.tail > 0;
  const TargetEntry* end = target.entries + target.count;
  float max = found.max;
  double sum = found.sum, dense_shift = 1;  // exp(slope * (found.max - max))
  if (tail) {
    for (const TargetEntry* entry = target.entries; entry != end; ++entry) {
      max = entry->value > max ? entry->value : max;
    }
    dense_shift = std::exp(slope * (static_cast<double>(found.max) - max));
    sum *= dense_shift;
    for (const TargetEntry* entry = target.entries; entry != end; ++entry) {
      sum += std::exp(slope * (static_cast<double>(entry->value) - max));
    }
  }
  const double log_sum = std::log(sum);
  const double lse = slope * max + log_sum;

  // nll = sum_k w_k (m - z_k) + S log sum_j exp(z_j - m): right under a large common offset.
  double nll = target.sum * log_sum;
  for (const TargetEntry* entry = target.entries; entry != end; ++entry) {
    nll += entry->weight * slope * (static_cast<double>(max) - entry->value);
  }
  if (tail) {  // + p_tail (lse - lse_off)
    nll += target.tail * (slope * (static_cast<double>(max) - found.max) + log_sum - std::log(found.sum));
  }
  const double sharp = options.factor * target.class_weight * (1 - options.label_smoothing);
  const double uniform = options.factor * options.label_smoothing / options.vocab;
  double loss = sharp * nll;
  if (options.label_smoothing > 0) {  // + eps/V sum_j c_j (lse - z_j)
    loss += uniform * (options.class_weight_sum * log_sum + slope * found.spread);
  }
  double z_term = 0;
  if (options.z_loss != 0) {
    loss += options.z_loss * lse * lse;
    z_term = 2 * options.z_loss * lse;
  }
  // dloss/dz_j = common q_j - uniform c_j - (on the support: sharp w_j; off it: sharp p_tail exp(z_j - lse_off))
  const double scale = static_cast<double>(row_scale) * options.logit_scale / options.temperature;
  const double common = sharp * (target.sum + target.tail) + uniform * options.class_weight_sum + z_term;
  const double mass = common * dense_shift / sum - (tail ? sharp * target.tail / found.sum : 0);
  return {
      static_cast<float>(loss), static_cast<float>(nll), static_cast<float>(lse), max, sum, sharp, common, scale,
      {found.max, static_cast<float>(scale * mass), static_cast<float>(scale * uniform)}};
}

RowTerms finish_dense_row(const RowOptions& options, const Sums& found, float row_scale) {
  const double slope = options.slope;
  const double log_sum = std::log(found.row.sum);
  const double lse = slope * found.row.max + log_sum;
  const double nll = slope * found.plain_spread + found.plain_weight * log_sum;
  const double loss = slope * found.row.spread + found.weight * log_sum + options.z_loss * lse * lse;
  const double common = found.weight + 2 * options.z_loss * lse;
  const double scale = static_cast<double>(row_scale) * options.logit_scale / options.temperature;
  RowTerms terms = {};
  terms.loss = static_cast<float>(loss);
  terms.nll = static_cast<float>(nll);
  terms.lse = static_cast<float>(lse);
  terms.gradient = {found.row.max, static_cast<float>(scale * common / found.row.sum), static_cast<float>(scale)};
  return terms;
}

float target_gradient(const RowOptions& options, const RowTerms& row, const TargetEntry& target) {
  const double x = target.value;
  const double q = std::exp(options.slope * (x - row.max)) / row.sum;
  const double chain = options.softcap > 0 ? row.scale * (1 - x * x) : row.scale;
  const double weight = options.class_weight ? options.class_weight[target.id] : 1.0;
  const double uniform = options.factor * options.label_smoothing / options.vocab * weight;
  return static_cast<float>(chain * (row.common * q - uniform - row.sharp * target.weight));
}

}  // namespace ssd_core::cpu
