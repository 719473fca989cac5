// Plain data only: included by the AVX units.
#pragma once

namespace ssd_core::cpu {

// Of a teacher p and a student q. JSD(beta) = beta KL(p|m) + (1 - beta) KL(q|m), m = beta p + (1 - beta) q, with
// 0 < beta < 1: its ends are the other two.
enum class Divergence { kForwardKl, kReverseKl, kJsd };

}  // namespace ssd_core::cpu
