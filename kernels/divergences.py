"""Terms of divergences between log-probabilities of a teacher and a student, and of their slopes.

With g_b = d value / d q_b up to a constant, the slope of a divergence is ``dvalue/dz_b = q_b g_b - q_b sum_a q_a g_a``:

    forward KL   sum p (log p - log q)                              q g = -p
    reverse KL   sum q (log q - log p)                              q g = q (log q - log p)
    JSD          beta KL(p|m) + (1 - beta) KL(q|m), m = beta p + (1 - beta) q
                                                                    q g = (1 - beta) q (log q - log m)
"""

import triton
import triton.language as tl

FORWARD, REVERSE, JSD = (tl.constexpr(kind) for kind in range(3))
KINDS = {"forward_kl": FORWARD, "reverse_kl": REVERSE, "jsd": JSD}


@triton.jit
def _expected(log_a, log_b, log_c):
    """a (log b - log c) with 0 log 0 = 0."""
    a = tl.exp(log_a)
    return tl.where(a == 0, 0.0, a * (log_b - log_c))


@triton.jit
def divergence_terms(log_p, log_q, beta, KIND: tl.constexpr):
    """``(value, q g)`` of each id."""
    if KIND == FORWARD:
        return _expected(log_p, log_p, log_q), -tl.exp(log_p)
    if KIND == REVERSE:
        value = _expected(log_q, log_q, log_p)
        return value, value
    a, b = tl.log(beta) + log_p, tl.log(1 - beta) + log_q
    most = tl.maximum(a, b)
    log_m = most + tl.log(tl.exp(a - most) + tl.exp(b - most))
    log_m = tl.where(most == -float("inf"), most, log_m)
    own = (1 - beta) * _expected(log_q, log_q, log_m)
    return beta * _expected(log_p, log_p, log_m) + own, own
