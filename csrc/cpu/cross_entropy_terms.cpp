#include "cross_entropy_terms.h"

#include <c10/util/Exception.h>

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
  options.vocab = vocab;
  options.class_weight = class_weight.defined() ? class_weight.const_data_ptr<float>() : nullptr;
  options.class_weight_sum = static_cast<double>(vocab);
  if (options.class_weight) {
    options.class_weight_sum = 0;
    for (int64_t j = 0; j < vocab; ++j) {
      options.class_weight_sum += options.class_weight[j];
    }
  }
  options.logit_scale = static_cast<float>(logit_scale);
  options.softcap = static_cast<float>(softcap);
  options.temperature = static_cast<float>(temperature);
  options.label_smoothing = label_smoothing;
  options.z_loss = z_loss;
  return options;
}

void check_ids(const int64_t* ids, const float* probs, int64_t rows, int64_t width, int64_t vocab) {
  for (int64_t i = 0; i < rows * width; ++i) {
    const bool used = !probs || probs[i] != 0;
    TORCH_CHECK_INDEX(
        !used || (ids[i] >= 0 && ids[i] < vocab),
        "ids: expected 0 <= id < V = ", vocab, ", got ", ids[i], " in row ", i / width, ", column ", i % width);
  }
}

TargetReader::TargetReader(int64_t width, int64_t vocab)
    : vocab_(vocab), ids_(width), weights_(width), values_(width), seen_(width > 1 ? (vocab + 63) / 64 : 0) {}

RowTarget TargetReader::read(const int64_t* ids, const float* probs, int64_t width, bool bucket) {
  int64_t count = 0;
  double sum = 0;
  for (int64_t k = 0; k < width; ++k) {
    const double weight = probs ? probs[k] : 1.0f;
    if (weight == 0) {
      continue;
    }
    sum += weight;
    if (width > 1) {
      uint64_t& word = seen_[ids[k] / 64];
      const uint64_t bit = uint64_t{1} << (ids[k] % 64);
      if (word & bit) {
        weights_[std::find(ids_.begin(), ids_.begin() + count, ids[k]) - ids_.begin()] += weight;
        continue;
      }
      word |= bit;
    }
    ids_[count] = ids[k];
    weights_[count++] = weight;
  }
  if (width > 1) {
    for (int64_t k = 0; k < count; ++k) {
      seen_[ids_[k] / 64] = 0;
    }
  }
  const double tail = bucket && count < vocab_ && sum < 1 ? 1 - sum : 0;
  return {ids_.data(), weights_.data(), values_.data(), count, sum, tail, 1.0};
}

}  // namespace ssd_core::cpu
