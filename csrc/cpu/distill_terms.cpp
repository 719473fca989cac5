#include "distill_terms.h"

#include <c10/util/Exception.h>

#include <cmath>
#include <limits>

namespace ssd_core::cpu {

namespace {

double pick(bool mask, double x, double y) {
  return mask ? x : y;
}

double expm1_nonpositive(double x) {
  return std::expm1(x);
}

double log1p_nonpositive(double x) {
  return std::log1p(x);
}

#define SSD_CORE_INLINE inline
#include "divergences.inc.h"
#undef SSD_CORE_INLINE

DivergenceTerm<double> bucket_term(const Measure& measure, double log_p, double log_q) {
  const double p = std::exp(log_p), q = std::exp(log_q), d = log_p - log_q, rest = 1 - measure.beta;
  switch (measure.kind) {
    case Divergence::kForwardKl:
      return divergence_term<Divergence::kForwardKl>(p, q, d, measure.beta, rest);
    case Divergence::kReverseKl:
      return divergence_term<Divergence::kReverseKl>(p, q, d, measure.beta, rest);
    default:
      return divergence_term<Divergence::kJsd>(p, q, d, measure.beta, rest);
  }
}

double log_p_of(const SupportTerms& terms, const TargetEntry& entry) {
  return std::log(entry.weight) - terms.teacher;
}

double log_q_of(const SupportTerms& terms, double slope, const TargetEntry& entry) {
  return slope * (entry.value - terms.max) - terms.log_sum;
}

}  // namespace

Tail tail_of(const std::string& name) {
  TORCH_CHECK(
      name == "bucket" || name == "renormalise" || name == "support",
      "tail: expected 'bucket', 'renormalise' or 'support', got '", name, "'");
  return name == "bucket" ? Tail::kBucket : name == "renormalise" ? Tail::kRenormalise : Tail::kSupport;
}

Measure measure_of(
    const std::string& divergence, double beta, double temperature, bool temperature_squared, double ce_weight) {
  const bool jsd = divergence == "jsd";
  TORCH_CHECK(
      jsd || divergence == "forward_kl" || divergence == "reverse_kl",
      "divergence: expected 'forward_kl', 'reverse_kl' or 'jsd', got '", divergence, "'");
  TORCH_CHECK(!jsd || (beta >= 0 && beta <= 1), "beta: expected a number in [0, 1], got ", beta);
  TORCH_CHECK(temperature > 0 && std::isfinite(temperature), "temperature: expected a positive number, got ",
              temperature);
  const double reported = temperature_squared ? temperature * temperature : 1;
  const Divergence kind = jsd && beta > 0 && beta < 1 ? Divergence::kJsd
      : divergence == "reverse_kl" || (jsd && beta == 1) ? Divergence::kReverseKl
                                                         : Divergence::kForwardKl;
  return {kind, beta, temperature, reported, (1 - ce_weight) * reported};
}

RowSums with_support(const RowSums& off, double slope, const RowTarget& target) {
  RowSums whole = off;
  const TargetEntry* end = target.entries + target.count;
  for (const TargetEntry* entry = target.entries; entry != end; ++entry) {
    whole.max = entry->value > whole.max ? entry->value : whole.max;
  }
  const auto mass = [&](float v) {
    return v == -std::numeric_limits<float>::infinity() ? 0 : std::exp(slope * (static_cast<double>(v) - whole.max));
  };
  whole.sum = off.sum == 0 ? 0 : off.sum * mass(off.max);
  for (const TargetEntry* entry = target.entries; entry != end; ++entry) {
    whole.sum += mass(entry->value);
  }
  return whole;
}

SupportTerms support_terms(
    const Measure& measure, Tail tail, double slope, const RowSums& found, const RowTarget& target) {
  if (target.count == 0) {
    return {};
  }
  const bool buckets = tail != Tail::kSupport;
  const TargetEntry* end = target.entries + target.count;
  double max = buckets ? found.max : -std::numeric_limits<double>::infinity();
  for (const TargetEntry* entry = target.entries; entry != end; ++entry) {
    max = entry->value > max ? entry->value : max;
  }
  const auto mass = [=](double value) { return std::exp(slope * (value - max)); };
  const double off_share = buckets ? mass(found.max) : 0;  // exp(slope * (found.max - max))
  const double off_sum = buckets && found.sum != 0 ? found.sum * off_share : 0;
  double sum = off_sum;
  for (const TargetEntry* entry = target.entries; entry != end; ++entry) {
    sum += mass(entry->value);
  }

  SupportTerms terms = {};
  terms.teacher = tail == Tail::kBucket ? 0 : std::log(target.sum);
  terms.max = max;
  terms.log_sum = std::log(sum);
  for (const TargetEntry* entry = target.entries; entry != end; ++entry) {
    const auto term = bucket_term(measure, log_p_of(terms, *entry), log_q_of(terms, slope, *entry));
    terms.value += term.value;
    terms.own += term.pull;
  }
  if (buckets) {
    const double log_p = tail == Tail::kBucket ? std::log(target.tail) : -std::numeric_limits<double>::infinity();
    const double log_q = found.sum != 0 ? slope * (found.max - max) + std::log(found.sum) - terms.log_sum
                                        : -std::numeric_limits<double>::infinity();
    const auto term = bucket_term(measure, log_p, log_q);
    terms.value += term.value;
    terms.own += term.pull;
    // q_j (pull / q_tail - own), in terms of exp(slope * (v_j - found.max)); without mass there, no slope
    terms.off = found.sum != 0 ? term.pull / found.sum - terms.own * off_share / sum : 0;
  }
  return terms;
}

double support_slope(const Measure& measure, const SupportTerms& terms, double slope, const TargetEntry& entry) {
  const double log_q = log_q_of(terms, slope, entry);
  return bucket_term(measure, log_p_of(terms, entry), log_q).pull - std::exp(log_q) * terms.own;
}

}  // namespace ssd_core::cpu
