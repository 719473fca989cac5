// What the two forms of cross-entropy share, on given logits and fused with its head: targets, the scalars of a row.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "row_kernels.h"

namespace ssd_core::cpu {

RowOptions row_options(
    int64_t vocab, const at::Tensor& class_weight, double logit_scale, double softcap, double temperature,
    double label_smoothing, double z_loss);

// Before any row is overwritten, so that a bad id leaves the logits as they were. Ids are relative to `first`.
void check_ids(const int64_t* ids, const float* probs, int64_t rows, int64_t width, int64_t vocab, int64_t first = 0);

// One row's target.
struct RowTarget {
  TargetEntry* entries;  // (count,) distinct ids, ascending; over ranks in the order given, which all have in common
  int64_t count;
  double sum;           // S
  double tail;          // p_tail: mass on the ids outside the support, 0 without bucket
  double class_weight;  // c_y; NaN: another rank's
};

// One thread's workspace for turning a row of (id, probability) pairs into a RowTarget: weights of an id are added up.
class TargetReader {
 public:
  TargetReader(int64_t width, int64_t vocab);
  RowTarget read(const int64_t* ids, const float* probs, const RowOptions& options, bool bucket);

 private:
  std::vector<TargetEntry> entries_;
  std::vector<uint64_t> seen_;  // one bit per id, all clear between rows
};

struct RowTerms {
  float loss, nll, lse;
  float max;    // of the row
  double sum;   // sum_j exp(slope * (v_j - max)) of the row
  double sharp, common, scale;
  RowGradient gradient;  // off the support
};

// Scalars are float64: they cost nothing, and a loss is a difference of them.
RowTerms finish_row(const RowOptions& options, const RowSums& found, const RowTarget& target, float row_scale);

// With class probabilities, whose weights w hold class weights and label smoothing: dloss/dz_j = common q_j - w_j, and
// the gradient's `uniform` multiplies w_j.
RowTerms finish_dense_row(const RowOptions& options, const Sums& found, float row_scale);

// du at an id of the support.
float target_gradient(const RowOptions& options, const RowTerms& row, const TargetEntry& target);

}  // namespace ssd_core::cpu
