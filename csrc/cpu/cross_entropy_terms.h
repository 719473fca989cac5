// What the two forms of cross-entropy share, on given logits and fused with its head: targets, and the scalars of a row.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cross_entropy_rows_kernel.h"
#include "tile_kernels.h"

namespace ssd_core::cpu {

RowOptions row_options(
    int64_t vocab, const at::Tensor& class_weight, double logit_scale, double softcap, double temperature,
    double label_smoothing, double z_loss);

// Before any row is overwritten, so that a bad id leaves the logits as they were.
void check_ids(const int64_t* ids, const float* probs, int64_t rows, int64_t width, int64_t vocab);

// One thread's workspace for turning a row of (id, probability) pairs into a RowTarget: distinct ids, weights added up.
class TargetReader {
 public:
  TargetReader(int64_t width, int64_t vocab);
  RowTarget read(const int64_t* ids, const float* probs, int64_t width, bool bucket);

 private:
  int64_t vocab_;
  std::vector<int64_t> ids_;
  std::vector<double> weights_;
  std::vector<float> values_;
  std::vector<uint64_t> seen_;  // one bit per id, all clear between rows
};

// What a pass over a row finds: without the support if there is a tail.
struct RowSums {
  float max;
  double sum;     // sum_j exp(slope * (v_j - max))
  double spread;  // sum_j c_j (max - v_j)
};

struct RowWeights {
  double sum;   // S
  double tail;  // p_tail
  double class_weight;
};

struct RowTerms {
  float loss, nll, lse;
  float max;        // of the row
  double sum;       // sum_j exp(slope * (v_j - max)) of the row
  double sharp;     // factor of nll
  double common;    // dloss/dz_j = common q_j - uniform c_j - sharp w_j
  double scale;     // dz/dv and the row's scale
  double mass;      // scale * factor of exp(slope * (v_j - RowSums::max)) off the support
  double uniform;   // scale * uniform
};

// Scalars are float64: they cost nothing, and a loss is a difference of them. `targets` have .weight and .value.
template <class Target>
RowTerms finish_row(
    const RowOptions& options, const TileOptions& tile, const RowSums& found, const RowWeights& weights,
    const Target* targets, int64_t count, float row_scale) {
  const double slope = tile.slope;
  const bool tail = weights.tail > 0;
  float max = found.max;
  double sum = found.sum, dense_shift = 1;  // exp(slope * (found.max - max))
  if (tail) {
    for (int64_t k = 0; k < count; ++k) {
      max = targets[k].value > max ? targets[k].value : max;
    }
    dense_shift = std::exp(slope * (static_cast<double>(found.max) - max));
    sum *= dense_shift;
    for (int64_t k = 0; k < count; ++k) {
      sum += std::exp(slope * (static_cast<double>(targets[k].value) - max));
    }
  }
  const double log_sum = std::log(sum);
  const double lse = slope * max + log_sum;

  // nll = sum_k w_k (m - z_k) + S log sum_j exp(z_j - m): right under a large common offset.
  double nll = weights.sum * log_sum;
  for (int64_t k = 0; k < count; ++k) {
    nll += targets[k].weight * slope * (static_cast<double>(max) - targets[k].value);
  }
  if (tail) {  // + p_tail (lse - lse_off)
    nll += weights.tail * (slope * (static_cast<double>(max) - found.max) + log_sum - std::log(found.sum));
  }
  const double sharp = weights.class_weight * (1 - options.label_smoothing);
  const double uniform = options.label_smoothing / options.vocab;
  double loss = sharp * nll;
  if (options.label_smoothing > 0) {  // + eps/V sum_j c_j (lse - z_j)
    loss += uniform * (options.class_weight_sum * log_sum + slope * found.spread);
  }
  double z_term = 0;
  if (options.z_loss != 0) {
    loss += options.z_loss * lse * lse;
    z_term = 2 * options.z_loss * lse;
  }
  const double scale = static_cast<double>(row_scale) * options.logit_scale / options.temperature;
  const double common = sharp * (weights.sum + weights.tail) + uniform * options.class_weight_sum + z_term;
  const double mass = common * dense_shift / sum - (tail ? sharp * weights.tail / found.sum : 0);
  return {static_cast<float>(loss), static_cast<float>(nll), static_cast<float>(lse), max, sum, sharp, common, scale,
          scale * mass, scale * uniform};
}

// du at an id of the support.
template <class Target>
float target_gradient(
    const RowOptions& options, const TileOptions& tile, const RowTerms& row, const Target& target, float class_weight) {
  const double x = target.value;
  const double q = std::exp(tile.slope * (x - row.max)) / row.sum;
  const double chain = tile.softcap ? row.scale * (1 - x * x) : row.scale;
  const double uniform = options.label_smoothing / options.vocab * class_weight;
  return static_cast<float>(chain * (row.common * q - uniform - row.sharp * target.weight));
}

}  // namespace ssd_core::cpu
