// Distillation's scalars of a row, whatever the row is stored as: given logits, or a head's outputs that are not kept.
#pragma once

#include <string>

#include "cross_entropy_terms.h"
#include "divergences.h"

namespace ssd_core::cpu {

// What a divergence from a sparse teacher makes of the mass outside its support, on both sides.
enum class Tail {
  kBucket,       // one more bucket; the teacher's share of it is what its probabilities lack to 1
  kRenormalise,  // the same, without mass of the teacher, whose probabilities are divided by their sum
  kSupport,      // none: both sides are renormalised on the support
};

Tail tail_of(const std::string& name);

// Which divergence, and its share of the loss.
struct Measure {
  Divergence kind;
  double beta;
  double temperature;
  double reported;  // what the divergence is multiplied by where it is a result: temperature^2 if so asked
  double factor;    // what it is multiplied by in the loss: (1 - ce_weight) * reported
};

Measure measure_of(
    const std::string& divergence, double beta, double temperature, bool temperature_squared, double ce_weight);

// Max and sum of the whole row, from those off the support and the student's values on it, at one slope.
RowSums with_support(const RowSums& off, double slope, const RowTarget& target);

// A row's divergence from a sparse teacher on K + 1 buckets.
struct SupportTerms {
  double value;
  // d value / dz_j off the support = off * exp(slope * (v_j - max)), max that of the row off the support
  double off;
  // of the buckets, for support_slope
  double teacher;  // log of what the weights are divided by
  double max;      // of the student
  double log_sum;  // log sum_j exp(slope * (v_j - max)), of the student
  double own;      // sum of the pulls
};

// `found`: the row without the support, at the divergence's slope; not looked at with Tail::kSupport. `target` holds
// the student's v of each id. A target without weights has value and slope 0.
SupportTerms support_terms(
    const Measure& measure, Tail tail, double slope, const RowSums& found, const RowTarget& target);

// d value / dz at an id of the support.
double support_slope(const Measure& measure, const SupportTerms& terms, double slope, const TargetEntry& entry);

}  // namespace ssd_core::cpu
