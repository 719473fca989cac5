"""Sampling of backend "cpu" against the definition: a million draws, the edges of its blocks, instruction sets,
threads. What all backends share is tested in tests/ops/test_sample.py."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from test_native import isas, saved_by_each  # noqa: F401  a fixture

from ssd_core import native
from ssd_core.ops.sample import sample
from ssd_core.reference import sample as definition
from ssd_core.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

FIELDS = ("logprob", "sampling_logprob", "kept_mass", "entropy")


def draw(logits, seeds, positions, backend="cpu", **params):
    return sample(logits, SamplingParams(**params), seeds, positions, backend=backend)


def numbers(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator),
            torch.randint(0, 2**40, (count,), generator=generator))


def tensors(drawn):
    return [*drawn[:5], drawn.support.ids, drawn.support.probs]


def check(logits, seed=0, **params):
    """Token, statistics and record, likeliest first, are those of the definition."""
    seeds, positions = numbers(len(logits), seed)
    found = draw(logits, seeds, positions, **params)
    expected = draw(logits, seeds, positions, backend="reference", **params)
    assert torch.equal(found.token, expected.token), params
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=2e-6, atol=4e-6, msg=name)
    for row in range(len(logits)):
        count = int((expected.support.probs[row] > 0).sum())
        assert torch.equal(found.support.ids[row, :count], expected.support.ids[row, :count]), params
        torch.testing.assert_close(found.support.probs[row, :count], expected.support.probs[row, :count], rtol=2e-6,
                                   atol=1e-9)
        assert not found.support.probs[row, count:].any(), params


# -- a million draws ---------------------------------------------------------------------------------------------------


def whole_vocabulary(kind, vocab):
    """(V,) float32 logits, the same each time."""
    generator = np.random.default_rng(vocab)
    noise = generator.standard_normal(vocab)
    if kind == "peaked":            # a language model's: few likely tokens, a broad rest
        noise *= 2.2
        noise[generator.integers(vocab, size=40)] += 14 * generator.random(40)
    elif kind == "zipf":
        noise = -1.1 * np.log(1 + generator.permutation(vocab))
    elif kind == "flat tail":       # half of the mass is in the tail, where every token has the same
        noise = np.zeros(vocab)
        noise[generator.integers(vocab, size=10)] = math.log(vocab / 10)
    elif kind == "ties":            # as bfloat16 logits have them, at the maximum and everywhere
        noise = torch.tensor(noise * 2).clamp(max=5).bfloat16().double().numpy()
    elif kind == "excluded":
        noise[generator.random(vocab) < 0.99] = -np.inf
    return torch.tensor(noise, dtype=torch.float32)


def expected_tokens(logits, seeds, positions, **params):
    """The definition's tokens for one row of logits and many seeds: what is kept is found once."""
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "support_limit": len(logits)}
    options = defaults | params
    z = logits.numpy().astype(np.float64)
    kept = np.sort(definition.sample(z, 0, 0, **options).ids)
    score = (z[kept] - z.max()) / options["temperature"]
    tokens = []
    step = max(1, 4_000_000 // len(kept))
    for start in range(0, len(seeds), step):
        seed, position = (x[start:start + step, None].numpy().astype(np.uint64) for x in (seeds, positions))
        word, shift = definition.WORD, definition.SHIFT
        low, high, *_ = definition.philox4x32(
            [position & word, position >> shift, kept.astype(np.uint64), 0], [seed & word, seed >> shift])
        v = high.astype(np.float64) * 2.0**-32 + (low.astype(np.float64) + 0.5) * 2.0**-64
        noise = -np.log1p(-np.minimum(v, 1 - 2.0**-53))
        tokens.append(kept[np.argmax(score - np.log(noise), axis=1)])
    for i in range(2):      # and that is the definition
        assert definition.sample(z, int(seeds[i]), int(positions[i]), **options).token == tokens[0][i]
    return torch.from_numpy(np.concatenate(tokens))


RECIPE = {"temperature": 0.7, "top_k": 20, "top_p": 0.95}
MILLION = [
    ("normal", 151_936, RECIPE, 150_000), ("peaked", 151_936, RECIPE, 150_000), ("ties", 151_936, RECIPE, 150_000),
    ("flat", 151_936, RECIPE, 10_000), ("excluded", 151_936, RECIPE, 100_000), ("zipf", 151_936, RECIPE, 100_000),
    ("peaked", 128_256, {"top_k": 50}, 150_000), ("ties", 128_256, {"top_k": 64, "min_p": 0.01}, 50_000),
    ("normal", 128_256, {"temperature": 1.5, "top_k": 100, "top_p": 0.5}, 50_000),
    ("peaked", 50_257, {"temperature": 0.5, "top_p": 0.9}, 50_000), ("zipf", 50_257, {"min_p": 0.02}, 50_000),
    ("ties", 50_257, {"top_p": 0.02}, 5_000), ("ties", 262_144, {"min_p": 0.9, "temperature": 0.9}, 20_000),
    # what is kept is large, and its noise is what takes the time
    ("peaked", 151_936, {"top_p": 0.95}, 1_000), ("normal", 151_936, {"min_p": 0.01}, 1_000),
    ("zipf", 262_144, {"top_p": 0.7, "temperature": 1.1}, 500), ("flat", 151_936, {"top_p": 0.1}, 300),
    ("flat tail", 151_936, {}, 600), ("zipf", 151_936, {"temperature": 1.3}, 400), ("normal", 50_257, {}, 1_000),
    ("ties", 128_256, {"temperature": 0.7}, 400), ("flat", 262_144, {}, 200), ("excluded", 262_144, {}, 5_000),
]


@pytest.mark.all
@pytest.mark.parametrize(("kind", "vocab", "params", "count"), MILLION, ids=str)
def test_a_million_draws(kind, vocab, params, count):
    logits = whole_vocabulary(kind, vocab)
    seeds, positions = numbers(count)
    expected = expected_tokens(logits, seeds, positions, **params)
    for part in torch.arange(count).split(10_000):
        found = draw(logits.expand(len(part), vocab), seeds[part], positions[part], **params)
        assert torch.equal(found.token, expected[part])
    if kind == "flat tail":
        assert (logits[expected] == 0).sum() > count // 3


def test_a_million_draws_are_a_million():
    assert sum(count for *_, count in MILLION) > 1_000_000


@pytest.mark.all
def test_a_winner_of_the_far_tail_is_the_definitions():
    """One draw in 3,000 goes to some token of a tail in which each has 2e-9."""
    vocab, count = 151_936, 30_000
    logits = torch.zeros(vocab)
    logits[777] = math.log(3000 * vocab)
    seeds, positions = numbers(count)
    tokens = torch.cat([draw(logits.expand(len(part), vocab), seeds[part], positions[part]).token
                        for part in torch.arange(count).split(1000)])
    far = (tokens != 777).nonzero().squeeze(1)
    assert 1 <= len(far) <= 30
    for row in [*far.tolist(), *range(20)]:
        options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "support_limit": 64}
        expected = definition.sample(logits.numpy(), int(seeds[row]), int(positions[row]), **options)
        assert expected.token == tokens[row]


# -- the distribution --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [
    {}, {"temperature": 1.4}, {"top_k": 30}, {"top_p": 0.8}, {"min_p": 0.02},
    {"top_k": 200, "top_p": 0.9, "min_p": 0.01}], ids=str)
def test_draws_follow_the_distribution_and_stay_in_the_support(params):
    """Chi-square over 700 tokens, in cells of about 20 draws or more. Means of records are tested for all backends."""
    vocab, count = 700, 60_000
    logits = whole_vocabulary("zipf", vocab)
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "support_limit": vocab} | params
    reference = definition.sample(logits.numpy(), 0, 0, **options)
    p = np.zeros(vocab)
    p[reference.ids] = reference.probs
    seeds = torch.arange(count)
    token = draw(logits.expand(count, vocab), seeds, torch.zeros_like(seeds), **params).token
    seen = np.bincount(token.numpy(), minlength=vocab)
    assert not seen[p == 0].any()
    order = np.argsort(-p)
    _, cells = np.unique((np.cumsum(p[order]) * (1 - 1e-9) * count // 20).astype(int), return_inverse=True)
    observed, expected = (np.bincount(cells, weights=x[order]) for x in (seen, p * count))
    assert len(expected) > 4 and expected.min() > 5
    assert stats.chisquare(observed, expected).pvalue > 1e-4


# -- edges -------------------------------------------------------------------------------------------------------------

EVERY = [
    {}, {"temperature": 0}, RECIPE, {"top_k": 1}, {"top_k": 9, "min_p": 0.3}, {"top_k": 700}, {"top_p": 0.3},
    {"top_p": 0.999, "temperature": 0.4}, {"top_p": 0.9, "min_p": 0.01}, {"min_p": 1e-3}, {"min_p": 1.0},
    {"temperature": 3.0, "top_k": 300, "top_p": 0.7},
]


@pytest.mark.parametrize("params", EVERY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_edges_of_vectors_blocks_and_spans(params, dtype):
    for vocab in (2, 15, 16, 17, 127, 129, 255, 256, 257, 2047, 2048, 2049, 4097, 5000):
        check((2 * torch.randn(12, vocab, generator=torch.Generator().manual_seed(vocab))).to(dtype), vocab, **params)


@pytest.mark.parametrize("params", EVERY, ids=str)
def test_logits_in_every_order(params):
    """Sorted rows put all of the largest into one block, or raise the threshold all the time; ties fill every block."""
    ramp = torch.linspace(-9, 4, 9000)
    heavy = torch.full((9000,), -torch.inf)
    heavy[4000:4700] = torch.linspace(0, 1, 700)
    rows = [ramp, ramp.flip(0), torch.zeros(9000), (ramp * 0.3).round(), (ramp * 0.3).round().flip(0), heavy,
            torch.arange(9000) % 3 * 1.0, torch.where(torch.arange(9000) % 2 > 0, -0.0, 0.0), ramp * 40,
            -torch.arange(9000) % 700 * 1e-3]
    check(torch.stack(rows), **params)
    check(torch.stack(rows)[:, :5500] + 1e4, **params)


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-3, 0.05, 30.0, 1e5, 1e30])
def test_temperatures_of_all_sizes(temperature):
    logits = 3 * torch.randn(20, 3000, generator=torch.Generator().manual_seed(1))
    logits[::3] = logits[::3].bfloat16().float()
    for params in ({}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.2}, {"top_k": 500, "top_p": 0.5}):
        check(logits, temperature=temperature, **params)


def test_top_p_of_all_tied():
    """By bins, as without top_k: k/n of n ties is exactly k of them, the lowest ids."""
    for count, kept in ((2, 1), (7, 3), (300, 30), (1000, 999), (5000, 2500), (5000, 1)):
        logits = torch.full((2, 7000), -torch.inf)
        logits[:, 1000:1000 + count] = 5.0
        check(logits, top_p=kept / count)
        check(logits, top_p=min(kept / count * 1.0000001, 1.0))


@pytest.mark.parametrize("vocab", [50_257, 151_936])
def test_what_is_kept_of_large_vocabularies(vocab):
    for kind in ("peaked", "ties", "flat tail", "zipf"):
        logits = torch.stack([whole_vocabulary(kind, vocab), whole_vocabulary(kind, vocab).flip(0)])
        for params in ({}, RECIPE, {"top_k": 2000, "top_p": 0.9}, {"top_p": 0.5}, {"top_p": 0.99, "min_p": 1e-4}):
            check(logits, **params)


def test_kept_mass_is_right_where_little_is_kept():
    """One token of 2^20, far above nothing: the sum over the vocabulary has no float32 accumulator of that length."""
    check(torch.zeros(1, 1 << 20), top_k=1)
    logits = torch.full((1, 1 << 20), -16.0)
    logits[0, 12_345] = 0
    check(logits, top_k=1)
    check(logits, top_p=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rest", [-torch.inf, 0.0])
def test_bad_rows_raise_wherever_the_number_stands(dtype, rest):
    seeds, positions = numbers(3)
    for vocab in (1, 16, 300, 5000):
        for place in {0, vocab // 2, vocab - 1}:
            for bad in (torch.nan, -torch.nan, torch.inf):
                logits = torch.full((3, vocab), rest, dtype=dtype)
                logits[:2] = 0
                logits[2, place] = bad
                for params in ({}, {"temperature": 0}, {"temperature": 0.5, "top_k": 1}, {"top_p": 0.5}):
                    with pytest.raises(ValueError, match="logits: expected finite values or -inf, with a finite max"):
                        draw(logits, seeds, positions, **params)


def test_float16_of_every_bit_pattern():
    """Subnormal numbers, zeros of both signs and infinity keep their values: the largest of each pair is drawn."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
    every = every[~every.isnan() & (every != torch.inf)]
    pairs = torch.stack([every, every.roll(1)], 1)
    pairs = pairs[pairs.isfinite().any(1)]
    seeds, positions = numbers(len(pairs))
    assert torch.equal(draw(pairs, seeds, positions, temperature=0).token, pairs.float().argmax(1))


def test_wrong_arguments_of_the_extension():
    logits, (seeds, positions) = torch.zeros(2, 9), numbers(2)
    call = {"support_limit": 64}
    for message, arguments in {
        "logits: expected Float, BFloat16 or Half, got Double": (logits.double(), seeds, positions),
        r"logits: expected shape \(N, V\) with at least one column, got \[9\]": (logits[0], seeds, positions),
        r"seeds: expected a CPU tensor of Long, shape \[2\], got": (logits, seeds[:1], positions),
        "positions: expected a CPU tensor of Long": (logits, seeds, positions.int()),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            native.sample(*arguments, **call)
    with pytest.raises(RuntimeError, match="top_k: expected 0 to V = 9, got 10"):
        native.sample(logits, seeds, positions, top_k=10, **call)


# -- instruction sets, threads -----------------------------------------------------------------------------------------


def test_instruction_sets_give_the_same_tokens(isas, tmp_path):  # noqa: F811
    kinds = ("normal", "peaked", "ties", "flat tail", "excluded")
    logits = torch.stack([whole_vocabulary(kind, 20_011) for kind in kinds])
    torch.save((logits.repeat(8, 1), *numbers(40), EVERY), tmp_path / "given.pt")
    code = """
from ssd_core.ops.sample import sample
from ssd_core.sampling_params import SamplingParams
logits, seeds, positions, every = torch.load("given.pt")
results = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for params in every:
        draw = sample(logits.to(dtype), SamplingParams(**params), seeds, positions, backend="cpu")
        results.append([*draw[:5], draw.support.ids, draw.support.probs])
torch.save(results, native.cpu_isa() + ".pt")
"""
    first, *others = saved_by_each(isas, code, tmp_path)
    for level in others:
        for got, ref in zip(level, first, strict=True):
            assert torch.equal(got[0], ref[0]) and torch.equal(got[5], ref[5])
            for a, b in zip(got, ref, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-6, atol=4e-6)


def test_results_do_not_depend_on_threads():
    threads = torch.get_num_threads()
    logits, (seeds, positions) = 2 * torch.randn(37, 30_000, generator=torch.Generator().manual_seed(3)), numbers(37)
    try:
        for params in EVERY:
            results = []
            for count in (1, 2, 4):
                torch.set_num_threads(count)
                found = draw(logits, seeds, positions, **params)
                results.append(tensors(found))
            assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))
    finally:
        torch.set_num_threads(threads)
