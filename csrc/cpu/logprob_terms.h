// Log-probability's scalars of a row, whatever the row is stored as: given logits, or a head's outputs.
#pragma once

#include "cross_entropy_terms.h"

namespace ssd_core::cpu {

struct LogprobTerms {
  double max, log_sum;  // of v; of exp(slope * (v - max))
  double logprob, entropy, lse;
};

// `below`: sum_j e^x x with x = slope * (v_j - max), `sum` that of e^x; `value`: v of the id.
LogprobTerms logprob_terms(double slope, double max, double sum, double below, double value);

// du at that id of on_logprob logprob + on_entropy entropy, which hold dz/du but for the softcap.
float logprob_slope(
    const RowOptions& options, const LogprobTerms& terms, double value, double on_logprob, double on_entropy);

}  // namespace ssd_core::cpu
