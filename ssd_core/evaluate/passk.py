"""pass@k and its uncertainty."""

import math
from statistics import NormalDist

from ssd_core.checks import UsageError


def pass_at_k(n: int, c: int, k: int) -> float:
    """``1 - comb(n - c, k) / comb(n, k)``: the unbiased estimate of pass@k from ``c`` right answers out of ``n``.

    Equation 1 of Chen et al., 2021 (arXiv 2107.03374): the probability that at least one of ``k`` answers, drawn
    without replacement from the ``n`` samples, is right. Raises :class:`UsageError` unless ``0 <= c <= n`` and
    ``1 <= k <= n``.
    """
    if not 0 <= c <= n:
        raise UsageError(f"c: expected a number of right answers from 0 to n={n}, got {c}")
    if not 1 <= k <= n:
        raise UsageError(f"k: expected 1 to n={n} (pass@k needs at least k samples), got {k}")
    # Exact integers, one rounding: no product of n factors, no overflow.
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def wilson_interval(successes: float, total: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, ``(low, high)`` within [0, 1].

    Unlike ``p +- z s``, it keeps a width when all or none succeed. ``total`` may be fractional (an effective sample
    size). Raises :class:`UsageError` unless ``total > 0``, ``0 <= successes <= total`` and ``0 < confidence < 1``.
    """
    if not (total > 0 and math.isfinite(total)):
        raise UsageError(f"total: expected a positive number, got {total}")
    if not 0 <= successes <= total:
        raise UsageError(f"successes: expected 0 to total={total}, got {successes}")
    if not 0 < confidence < 1:
        raise UsageError(f"confidence: expected a number between 0 and 1, got {confidence}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / total
    # Wilson, 1927: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    centre = p + z * z / (2 * total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    low = 0.0 if successes == 0 else max(0.0, (centre - half) / scale)
    high = 1.0 if successes == total else min(1.0, (centre + half) / scale)
    return low, high
