"""The definition of sampling against known answers, formulas and transformers' own filters."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ssd_core.reference.sample import exponential, philox4x32, run, sample

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "support_limit": 64}


def draw(logits, seed=0, position=0, **options):
    return sample(np.asarray(logits, dtype=np.float64), seed, position, **{**PLAIN, **options})


def softmax(z):
    e = np.exp(np.asarray(z, dtype=np.float64) - np.max(z))
    return e / e.sum()


def many(logits, count, **options):
    """``count`` draws with seeds 0, 1, ...: ids (count,)."""
    return np.array([draw(logits, seed=seed, **options).token for seed in range(count)])


def random_logits(vocab, seed=0, scale=3.0):
    """No two equal."""
    return np.random.default_rng(seed).permutation(np.linspace(-scale, scale, vocab) ** 3 / scale)


# -- noise -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "expected"), [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
])
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    assert [int(word) for word in philox4x32(counter, key)] == expected


def test_noise_is_exponential():
    noise = exponential(123, 7, np.arange(200_000))
    assert stats.kstest(noise, "expon").pvalue > 1e-3
    assert noise.min() > 0 and np.isfinite(noise).all()


def test_noise_depends_on_every_bit_of_seed_position_and_id():
    base = exponential(5, 6, np.arange(4))
    for bit in range(64):
        assert (exponential(5 ^ (1 << bit), 6, np.arange(4)) != base).all(), f"seed bit {bit}"
        assert (exponential(5, 6 ^ (1 << bit), np.arange(4)) != base).all(), f"position bit {bit}"
    assert len(np.unique(exponential(5, 6, np.arange(300_000)))) == 300_000
    assert exponential(-1, 6, np.arange(4)).tolist() == exponential(2**64 - 1, 6, np.arange(4)).tolist()


def test_noise_reaches_the_far_tail(monkeypatch):
    """A token of probability 2^-40 wins when its noise is small enough: the noise has no floor at 2^-24 or 2^-33."""
    module = "ssd_core.reference.sample.philox4x32"
    for low, high, expected in ((0, 0, 2.0**-65), (1 << 20, 0, 2.0**-44), (0, 1, 2.0**-32)):
        words = [np.array([word], dtype=np.uint64) for word in (low, high, 0, 0)]
        monkeypatch.setattr(module, lambda counter, key, words=words: words)
        assert exponential(0, 0, np.arange(1))[0] == pytest.approx(expected, rel=1e-6)
    words = [np.array([0xFFFFFFFF], dtype=np.uint64)] * 4
    monkeypatch.setattr(module, lambda counter, key: words)
    assert exponential(0, 0, np.arange(1))[0] == pytest.approx(53 * math.log(2))       # finite


def test_real_noise_gets_below_2_to_the_minus_20_as_often_as_it_should():
    noise = exponential(99, 0, np.arange(8_000_000))
    below = (noise < 2.0**-20).sum()                # 7.6 expected
    assert 1 <= below <= 22
    assert noise.min() < 2.0**-20


def test_consecutive_seeds_and_positions_are_uncorrelated():
    ids = np.arange(100_000)
    base = exponential(1000, 0, ids)
    for seed, position in ((1001, 0), (1002, 0), (1000, 1), (1001, 1), (1000, 2**32), (1000 + 2**32, 0)):
        assert abs(np.corrcoef(base, exponential(seed, position, ids))[0, 1]) < 5 / math.sqrt(len(ids))
    sequence = np.array([exponential(seed, 0, np.arange(1))[0] for seed in range(5000)])
    assert abs(np.corrcoef(sequence[1:], sequence[:-1])[0, 1]) < 5 / math.sqrt(5000)


# -- the distribution of the draws ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"temperature": 1.7}, {"temperature": 0.5, "top_k": 5}, {"top_p": 0.8}, {"min_p": 0.02},
    {"temperature": 1.5, "top_k": 8, "top_p": 0.9, "min_p": 0.05},
])
def test_draws_follow_the_truncated_distribution(options):
    """Chi-square over seeds."""
    z = random_logits(12, seed=3, scale=2)
    full = np.zeros(12)
    reference = draw(z, **options)
    full[reference.ids] = reference.probs       # 12 ids fit into the record
    count = 6000
    seen = np.bincount(many(z, count, **options), minlength=12)
    assert (seen[full == 0] == 0).all()
    assert stats.chisquare(seen[full > 0], full[full > 0] * count).pvalue > 1e-3


def test_draws_over_a_zipf_vocabulary_reach_head_and_tail():
    """Every part of a large vocabulary gets its share, within 8 standard errors: no token is out of reach."""
    vocab, count = 30_000, 1000
    p = 1 / np.arange(1, vocab + 1)
    p /= p.sum()
    rank = np.random.default_rng(0).permutation(vocab)      # of each id
    drawn = rank[many(np.log(p)[rank], count)]
    edges = np.array([0, 1, 10, 100, 1000, 10_000, 20_000, vocab])
    seen, _ = np.histogram(drawn, edges)
    share = np.add.reduceat(p, edges[:-1])
    assert (np.abs(seen - share * count) < 8 * np.sqrt(share * (1 - share) * count) + 1).all()
    assert seen[-1] > 0


def test_a_row_of_one_token_and_a_vocabulary_of_one():
    assert draw([3.0]).token == 0
    only = draw([-np.inf, 2.0, -np.inf])
    assert (only.token, only.logprob, only.sampling_logprob, only.kept_mass, only.entropy) == (1, 0, 0, 1, 0)
    assert only.ids.tolist() == [1] and only.probs.tolist() == [1.0]


# -- truncation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.9])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [
    (0, 1.0, 0.0), (1, 1.0, 0.0), (7, 1.0, 0.0), (200, 1.0, 0.0), (0, 0.3, 0.0), (0, 0.9, 0.0), (0, 0.999, 0.0),
    (0, 1e-6, 0.0), (0, 1.0, 0.01), (0, 1.0, 0.5), (0, 1.0, 1.0), (20, 0.8, 0.0), (20, 0.95, 0.1), (0, 0.9, 0.1),
])
def test_kept_tokens_are_those_of_transformers(temperature, top_k, top_p, min_p):
    for seed in range(20):
        z = random_logits(60, seed=seed)
        scores = torch.tensor(z)[None]
        scores = TemperatureLogitsWarper(temperature)(None, scores)
        scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
        scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
        scores = MinPLogitsWarper(min_p)(None, scores) if min_p else scores
        expected = scores.softmax(-1)[0].numpy()
        found = draw(z, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        full = np.zeros(60)
        full[found.ids] = found.probs
        np.testing.assert_allclose(full, expected, rtol=1e-9, atol=1e-15)
        assert found.sampling_logprob == pytest.approx(math.log(expected[found.token]), abs=1e-9)


def test_ties_keep_exactly_k_the_lowest_ids_first():
    z = [1.0, 2.0, 1.0, 2.0, 1.0, 0.0]
    assert draw(z, top_k=3).ids.tolist() == [1, 3, 0]
    assert draw(z, top_k=4).ids.tolist() == [1, 3, 0, 2]
    assert draw(np.zeros(30), top_k=20).ids.tolist() == list(range(20))
    assert draw([0.0, -0.0, 0.0], top_k=2).ids.tolist() == [0, 1]


def test_top_p_keeps_the_token_that_crosses_and_at_least_one():
    z = np.log([0.5, 0.3, 0.2])
    assert draw(z, top_p=0.6).ids.tolist() == [0, 1]
    assert draw(z, top_p=0.81).ids.tolist() == [0, 1, 2]
    for tiny in (1e-9, 1e-15, 5e-324):
        assert draw(z, top_p=tiny).ids.tolist() == [0]


@pytest.mark.parametrize("count", [2, 3, 7, 10, 20])
def test_top_p_among_tied_tokens_does_not_depend_on_rounding(count):
    """k tied tokens have mass 1/k each; k' of them reach k'/k exactly, so the next is not kept."""
    for kept in range(1, count):
        assert len(draw(np.zeros(count), top_p=kept / count).ids) == kept


def test_top_p_is_taken_of_the_survivors_of_top_k():
    z = np.log([0.3, 0.2, 0.1] + [0.05] * 8)
    # of the whole, 0.3 + 0.2 is below 0.6; of the three survivors it is 0.83
    assert draw(z, top_k=3, top_p=0.6).ids.tolist() == [0, 1]


def test_min_p_comes_after_temperature():
    z = np.log([0.8, 0.2])
    assert draw(z, min_p=0.3).ids.tolist() == [0]
    assert draw(z, min_p=0.3, temperature=4.0).ids.tolist() == [0, 1]


def test_without_truncation_the_lightest_token_is_kept():
    """A cumulative sum that rounds to 1 must not cut the tail when top_p is 1."""
    assert len(draw([0.0, -50.0, -60.0]).ids) == 3
    assert len(draw([0.0, -50.0, -60.0], top_k=3).ids) == 3


def test_temperature_zero_takes_the_lowest_id_of_the_largest():
    z = [0.0, 3.0, 1.0, 3.0]
    found = draw(z, temperature=0, top_k=1, top_p=0.1)
    assert (found.token, found.sampling_logprob, found.kept_mass) == (1, 0.0, 1.0)
    assert found.logprob == pytest.approx(math.log(softmax(z)[1]))
    assert (found.ids.tolist(), found.probs.tolist()) == ([1], [1.0])


def test_a_tiny_temperature_is_greedy_and_a_huge_one_is_flat():
    z = random_logits(50)
    assert {draw(z, seed=seed, temperature=1e-300).token for seed in range(5)} == {int(np.argmax(z))}
    np.testing.assert_allclose(draw(z, temperature=1e12).probs, 1 / 50, rtol=1e-9)


def test_minus_infinity_is_never_drawn():
    z = random_logits(40)
    z[::2] = -np.inf
    assert (many(z, 300) % 2 == 1).all()
    found = draw(z)
    assert (found.ids % 2 == 1).all() and len(found.ids) == 20 and np.isfinite(found.entropy)


@pytest.mark.parametrize("bad", [[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf], [math.nan, -math.inf]])
def test_rows_without_a_distribution_raise(bad):
    with pytest.raises(ValueError, match="logits: expected finite values or -inf"):
        draw(bad)


# -- the record -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 6}, {"temperature": 2.0, "top_p": 0.7}])
def test_statistics_equal_their_formulas(options, offset):
    z = random_logits(30, seed=1)
    found = draw(z + offset, seed=5, **options)
    p = softmax(z)
    tempered = softmax(z / options.get("temperature", 1.0))
    kept = tempered[found.ids].sum()
    assert found.logprob == pytest.approx(math.log(p[found.token]), abs=1e-10)
    assert found.entropy == pytest.approx(-(p * np.log(p)).sum(), abs=1e-10)
    assert found.kept_mass == pytest.approx(kept, abs=1e-10)
    assert found.sampling_logprob == pytest.approx(math.log(tempered[found.token] / kept), abs=1e-10)
    np.testing.assert_allclose(found.probs, tempered[found.ids] / kept, rtol=1e-10)


@pytest.mark.parametrize("options", [
    {"support_limit": 64}, {"support_limit": 4}, {"support_limit": 1}, {"support_limit": 4, "top_k": 9},
    {"support_limit": 4, "top_p": 0.97, "temperature": 1.5},
])
def test_the_mean_record_is_the_sampling_distribution_exactly(options, monkeypatch):
    """Each token in turn is made to win; its record is weighted with the probability that it wins."""
    vocab = 24
    z = random_logits(vocab, seed=2, scale=2)
    whole = draw(z, **{**options, "support_limit": vocab})
    expected = np.zeros(vocab)
    expected[whole.ids] = whole.probs
    mean = np.zeros(vocab)
    for token in whole.ids:
        monkeypatch.setattr("ssd_core.reference.sample.exponential",
                            lambda seed, position, ids, token=token: np.where(ids == token, 1e-300, 1.0))
        found = draw(z, **options)
        assert found.token == token and token in found.ids and len(found.ids) <= options["support_limit"]
        assert found.probs.sum() == pytest.approx(1)
        assert (np.diff(found.probs) <= 0).all()
        mean[found.ids] += expected[token] * found.probs
    np.testing.assert_allclose(mean, expected, rtol=1e-12, atol=1e-15)


def test_the_mean_record_over_draws_is_the_sampling_distribution():
    """300 tokens, nearly flat, so that most of the mass is outside the 64 of a record."""
    vocab, count = 300, 6000
    z = random_logits(vocab, seed=4, scale=1.0)
    p = softmax(z)
    total = np.zeros(vocab)
    squares = np.zeros(vocab)
    alone = 0
    for seed in range(count):
        found = draw(z, seed=seed)
        total[found.ids] += found.probs
        squares[found.ids] += found.probs**2
        alone += len(found.ids) == 1
    assert 0.2 * count < alone < 0.9 * count            # both kinds of record occur
    error = np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0) / count)
    assert (np.abs(total / count - p) < 6 * error + 1e-4).all()


def test_run_stacks_rows_and_reads_float32():
    logits = torch.randn(3, 9, dtype=torch.float64)
    seeds, positions = torch.tensor([1, -2, 3]), torch.tensor([0, 5, 2**40])
    token, logprob, sampling_logprob, kept_mass, entropy, ids, probs = run(logits, seeds, positions, **PLAIN)
    for i in range(3):
        one = draw(logits[i].float().numpy(), int(seeds[i]), int(positions[i]))
        assert one.token == token[i] and one.ids.tolist() == ids[i].tolist()
    for values in (logprob, sampling_logprob, kept_mass, entropy, probs):
        assert values.dtype == torch.float32
    assert token.dtype == torch.int64 and ids.dtype == torch.int32
