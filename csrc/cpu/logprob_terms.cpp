#include "logprob_terms.h"

#include <cmath>

namespace ssd_core::cpu {

LogprobTerms logprob_terms(double slope, double max, double sum, double below, double value) {
  const double log_sum = std::log(sum);
  return {max, log_sum, slope * (value - max) - log_sum, log_sum - below / sum, slope * max + log_sum};
}

float logprob_slope(
    const RowOptions& options, const LogprobTerms& terms, double value, double on_logprob, double on_entropy) {
  const double q = std::exp(terms.logprob);
  const double slope = on_logprob * (1 - q) - (q == 0 ? 0 : on_entropy * q * (terms.logprob + terms.entropy));
  return static_cast<float>(options.softcap > 0 ? slope * (1 - value * value) : slope);
}

}  // namespace ssd_core::cpu
