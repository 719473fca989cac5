// One id's, or bucket's, terms of a divergence. F is float in a loop that the compiler vectorises, or Vec, after
// vector_math.inc.h; or double, where the includer defines the few functions that are called here.

#ifndef SSD_CORE_DIVERGENCES
#define SSD_CORE_DIVERGENCES

// p x with 0 x = 0, whatever x is.
template <class F>
SSD_CORE_INLINE F expected(F p, F x) {
  return pick(p == F{}, F{}, p * x);
}

// A mass that underflows still is one: infinite, where the other side has none. What it adds elsewhere is below 1e-37
// of a logit. `exponent` is that of the mass; -700 is where float64 underflows.
template <class F>
SSD_CORE_INLINE F some_mass(F mass, F exponent) {
  return mass + pick(exponent > F{} - 700.0f, F{} + 1.2e-38f, F{});
}

template <class F>
struct DivergenceTerm {
  F value;
  F pull;  // q_j g_j, g_j = d value / d q_j up to a constant: the slope d value / dz_j is pull_j - q_j sum(pull)
};

// d = log p - log q. Of the two KL, p, q and d may belong to masses that are not normalised: the terms are linear in p
// or q and in d. A side without mass adds nothing; mass where the other side has none (d infinite) is infinite in the
// KL, finite in JSD. `beta` and `rest` = 1 - beta are JSD's.
template <Divergence kKind, class F, class S>
SSD_CORE_INLINE DivergenceTerm<F> divergence_term(F p, F q, F d, S beta, S rest) {
  if constexpr (kKind == Divergence::kForwardKl) {
    return {expected(p, d), -p};
  } else if constexpr (kKind == Divergence::kReverseKl) {
    const F value = expected(q, -d);
    return {value, value};
  } else {
    // The larger side's log-ratio to m, from the smaller's share: log(m/q) = log(1 + beta (p/q - 1)) where p <= q, and
    // likewise with the roles swapped. Nothing overflows, and d near 0 keeps its digits.
    const auto swapped = d > F{};
    const F below = pick(swapped, -d, d);
    const F m = log1p_nonpositive(pick(swapped, F{} + rest, F{} + beta) * expm1_nonpositive(below));
    const F larger = -m, smaller = below - m;
    const F own = rest * expected(q, pick(swapped, smaller, larger));
    return {beta * expected(p, pick(swapped, larger, smaller)) + own, own};
  }
}

#endif
