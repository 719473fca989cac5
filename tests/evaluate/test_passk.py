import itertools
import math

import pytest

from ssd_core.checks import UsageError
from ssd_core.evaluate import pass_at_k, wilson_interval


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_of_many():
    assert pass_at_k(10_000, 3, 1) == pytest.approx(3e-4)
    assert pass_at_k(10_000, 3, 9_998) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4), (0, 0, 1)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(UsageError):
        pass_at_k(n, c, k)


def test_wilson():
    # The bounds p solve |p^ - p| = z sqrt(p (1 - p) / n).
    for successes, total in [(6, 164), (10, 164), (3.5, 12.5), (80, 100)]:
        share = successes / total
        for bound in wilson_interval(successes, total):
            assert abs(share - bound) / math.sqrt(bound * (1 - bound) / total) == pytest.approx(1.959963985)
    assert wilson_interval(0, 10) == (0.0, pytest.approx(0.2775328))
    assert wilson_interval(10, 10) == (pytest.approx(0.7224672), 1.0)
    assert wilson_interval(1, 2, 0.5)[0] > wilson_interval(1, 2, 0.99)[0]


@pytest.mark.parametrize("arguments", [(1, 0), (3, 2), (-1, 2), (1, 2, 1.0), (1, float("inf"))])
def test_wilson_refuses(arguments):
    with pytest.raises(UsageError):
        wilson_interval(*arguments)
