"""``ssd_core.sample``: every backend draws the tokens of the definition, whatever the batch."""

import pytest
import torch
from scipy import stats
from suite import INTERPRETED, backends

import ssd_core
from ssd_core.checks import UsageError
from ssd_core.ops.sample import Sample, sample
from ssd_core.sampling_params import SamplingParams

BACKENDS = backends("sample")
PARAMS = [
    {}, {"temperature": 0}, {"temperature": 0.6}, {"temperature": 1.9}, {"top_k": 1}, {"top_k": 20, "top_p": 0.95},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.8}, {"top_p": 0.9}, {"top_p": 0.5, "min_p": 0.05}, {"min_p": 0.1},
    {"temperature": 1.5, "top_k": 100}, {"top_k": 3, "min_p": 1.0}, {"temperature": 1e-3}, {"temperature": 1e4},
]
COMPILED = [name for name in BACKENDS if not (name == "triton" and INTERPRETED)]     # fast enough for statistics
FIELDS = ("logprob", "sampling_logprob", "kept_mass", "entropy")


def few(rows):
    """Rows where the interpreter's time counts."""
    return max(1, rows // 400) if INTERPRETED else rows


def make(rows, vocab, dtype=torch.float32, seed=0, scale=2.0):
    """Logits of LLM-like spread, and seeds and positions of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator) * scale).to(dtype)
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    positions = torch.randint(0, 5000, (rows,), generator=generator)
    positions[::5] += 2**40
    return logits, seeds, positions


def dense(drawn: Sample, vocab: int) -> torch.Tensor:
    """The recorded support as (B, V) probabilities."""
    full = torch.zeros(len(drawn.token), vocab)
    return full.scatter_add(1, drawn.support.ids.long(), drawn.support.probs)


def same(found: Sample, expected: Sample, vocab: int) -> None:
    assert torch.equal(found.token, expected.token)
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=2e-5, atol=2e-5, msg=name)
    assert torch.equal(dense(found, vocab) > 0, dense(expected, vocab) > 0)
    torch.testing.assert_close(dense(found, vocab), dense(expected, vocab), rtol=1e-5, atol=1e-9)
    assert found.support.ids.dtype == torch.int32 and found.support.probs.dtype == torch.float32
    assert found.support.ids.shape[1] <= 64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_those_of_the_definition(backend, params, dtype):
    """100,000 draws in all. bfloat16 has ties in nearly every row: of the maximum, among the k largest and across the
    k-th. Vocabularies of 64 and 65 are at the limit of a record."""
    params = SamplingParams(**params)
    for vocab, rows in ((1, 3), (7, 800), (64, 800), (65, 800), (300, 1200)):
        logits, seeds, positions = make(few(rows), vocab, dtype, seed=vocab)
        same(sample(logits, params, seeds, positions, backend=backend),
             sample(logits, params, seeds, positions, backend="reference"), vocab)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", [50_257, 128_256, 151_936])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.5, "top_k": 20, "top_p": 0.8}, {"top_p": 0.95}], ids=str)
def test_tokens_are_those_of_the_definition_over_large_vocabularies(backend, vocab, params):
    logits, seeds, positions = make(3, vocab, torch.bfloat16)
    params = SamplingParams(**params)
    same(sample(logits, params, seeds, positions, backend=backend),
         sample(logits, params, seeds, positions, backend="reference"), vocab)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("params", [{}, {"top_k": 5}, {"top_p": 0.9, "temperature": 2.0}], ids=str)
def test_excluded_and_tied_logits(backend, params):
    """Rows that are mostly -inf, flat, flat with fewer than k finite, of signed zeros, and of extreme numbers."""
    inf = torch.inf
    logits = torch.tensor([
        [-inf] * 7 + [0.0], [0.0, -inf] * 4, [0.0] * 8, [0.0, -0.0] * 4, [-inf] * 5 + [1.0] * 3,
        [3e38, -3e38, 3e38, 0.0, -inf, 1.0, 2.0, -1.0], [1e-40, -1e-40, 0.0, 1e-45] * 2,
        [1000.0, 999.0, 998.5, 0.0, -1000.0, 500.0, 999.9, -inf],
    ]).repeat(few(40), 1)
    _, seeds, positions = make(len(logits), 8)
    params = SamplingParams(**params)
    found = sample(logits, params, seeds, positions, backend=backend)
    same(found, sample(logits, params, seeds, positions, backend="reference"), 8)
    assert logits.gather(1, found.token.unsqueeze(1)).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_p_that_tied_tokens_reach_exactly(backend):
    """Rounding must not decide: of n tied tokens exactly k are kept at top_p = k/n, and one at the least top_p."""
    for count in (2, 3, 7, 10, 20):
        logits = torch.full((few(4), 30), -torch.inf)
        logits[:, :count] = 0
        _, seeds, positions = make(few(4), 30)
        for kept in range(count):
            params = SamplingParams(top_p=kept / count or 1e-15)
            found = sample(logits, params, seeds, positions, backend=backend)
            same(found, sample(logits, params, seeds, positions, backend="reference"), 30)
            assert dense(found, 30).gt(0).sum(1).eq(max(kept, 1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("params", [{}, {"top_k": 20}, {"top_k": 200, "top_p": 0.99}, {"top_p": 0.8}], ids=str)
def test_tokens_do_not_depend_on_batch_slot_or_order(backend, params):
    params = SamplingParams(**params)
    rows = 4 if INTERPRETED else 32
    logits, seeds, positions = make(rows, 1000, torch.bfloat16)
    together = sample(logits, params, seeds, positions, backend=backend)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    shuffled = sample(logits[order], params, seeds[order], positions[order], backend=backend)
    same(shuffled, Sample(*(field[order] for field in together)), 1000)
    for row in range(0, rows, 5):
        part = slice(row, row + 1)
        alone = sample(logits[part], params, seeds[part], positions[part], backend=backend)
        same(alone, Sample(*(field[part] for field in together)), 1000)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_logits_and_poisoned_memory(backend, poisoned):
    wide, seeds, positions = make(few(6), 2000)
    for view in (wide[:, ::2], wide[:, 500:1500], wide[:, :1000].t().contiguous().t()):
        for params in (SamplingParams(), SamplingParams(top_k=10), SamplingParams(top_p=0.5)):
            found = sample(view, params, seeds, positions, backend=backend)
            same(found, sample(view.contiguous(), params, seeds, positions, backend="reference"), 1000)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_common_offset_costs_no_precision(backend):
    """logits + 1000 keep their statistics; the logits are multiples of 1/16, so that adding is exact."""
    logits, seeds, positions = make(few(50), 5000)
    logits = (logits * 16).round() / 16
    params = SamplingParams(temperature=0.7, top_k=50)
    found = sample(logits + 1000, params, seeds, positions, backend=backend)
    same(found, sample(logits, params, seeds, positions, backend="reference"), 5000)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tiny_temperature_gives_numbers(backend):
    logits, seeds, positions = make(few(20), 50)
    for temperature in (1e-3, 1e-30, 1e-300):
        found = sample(logits, SamplingParams(temperature=temperature), seeds, positions, backend=backend)
        assert torch.equal(found.token, logits.argmax(-1))
        assert found.kept_mass.eq(1).all() and found.sampling_logprob.eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_and_double_are_read_as_float32(backend):
    for dtype in (torch.float16, torch.float64) if backend == "torch" else (torch.float16,):
        logits, seeds, positions = make(few(20), 100, dtype)
        params = SamplingParams(top_k=10)
        same(sample(logits, params, seeds, positions, backend=backend),
             sample(logits.float(), params, seeds, positions, backend="reference"), 100)


@pytest.mark.parametrize("backend", COMPILED)
def test_draws_follow_the_distribution(backend):
    """Chi-square over consecutive seeds and over consecutive positions; neighbours are independent."""
    count = 40_000
    logits = torch.linspace(-3, 1, 16).expand(count, 16)
    steps, zeros = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    expected = logits[0].double().softmax(-1).numpy() * count
    for seeds, positions in ((steps, zeros), (zeros, steps)):
        token = sample(logits, SamplingParams(), seeds, positions, backend=backend).token
        assert stats.chisquare(torch.bincount(token, minlength=16).numpy(), expected).pvalue > 1e-3
        pairs = torch.bincount(token[1:].clamp_min(12) * 16 + token[:-1].clamp_min(12), minlength=256)
        table = pairs.view(16, 16)[12:, 12:]
        assert stats.chi2_contingency(table.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("backend", COMPILED)
def test_the_mean_record_is_the_sampling_distribution(backend):
    """Most of the mass lies outside the 64 ids of a record."""
    count, vocab = 20_000, 200
    logits = torch.linspace(-1, 1, vocab)
    expected = (logits.double() / 1.5).softmax(-1)
    found = sample(logits.expand(count, vocab), SamplingParams(temperature=1.5), torch.arange(count),
                   torch.zeros(count, dtype=torch.int64), backend=backend)
    records = dense(found, vocab).double()
    assert records.gather(1, found.token.unsqueeze(1)).gt(0).all()      # the drawn token is in its own record
    torch.testing.assert_close(records.sum(1), torch.ones(count, dtype=torch.float64), rtol=0, atol=1e-5)
    error = records.std(0) / count**0.5
    assert ((records.mean(0) - expected).abs() < 6 * error + 1e-5).all()


@pytest.mark.parametrize("backend", ["auto", *BACKENDS, "reference"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_without_a_distribution_raise(backend, bad):
    logits, seeds, positions = make(4, 30)
    logits[2, 7] = bad
    for params in (SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_k=2)):
        with pytest.raises(ValueError, match="logits: expected finite values or -inf"):
            sample(logits, params, seeds, positions, backend=backend)
    with pytest.raises(ValueError, match="logits: expected finite values or -inf"):
        sample(torch.full((1, 5), -torch.inf), SamplingParams(), seeds[:1], positions[:1], backend=backend)


@pytest.mark.skipif("triton" not in BACKENDS, reason="without the interpreter, Triton is for CUDA tensors")
@pytest.mark.parametrize("params", [
    {}, {"temperature": 0}, {"top_k": 20, "top_p": 0.95}, {"top_k": 70, "min_p": 0.01}, {"top_p": 0.9}, {"min_p": 0.1},
    {"top_k": 600, "top_p": 0.8, "temperature": 3.0}], ids=str)
def test_tokens_do_not_depend_on_the_parts_of_a_row(params, monkeypatch):
    """Of one block, of several, of one that is not full; flat rows, where more is tied than can be sorted at once."""
    from ssd_core.kernels import launch

    monkeypatch.setattr(launch, "LARGE", launch.SMALL)
    logits, seeds, positions = make(3, 2000, torch.bfloat16)
    logits[1] = 0
    logits[2, : 1990] = -torch.inf
    params = SamplingParams(**params)
    expected = sample(logits, params, seeds, positions, backend="reference")
    for parts in (1, 3, 8):
        monkeypatch.setattr(launch, "parts_of", lambda *_, parts=parts: (-(-8 // parts) * 256, -(-8 // -(-8 // parts))))
        same(sample(logits, params, seeds, positions, backend="triton"), expected, 2000)


def test_wrong_arguments_are_named():
    logits, seeds, positions = make(4, 30)
    params = SamplingParams()
    with pytest.raises(TypeError, match="logits: expected a tensor, got list"):
        sample([1.0], params, seeds, positions)
    for wrong in (logits[0], logits.long(), logits[:0], logits[:, :0], logits[None]):
        with pytest.raises(ValueError, match=r"logits: expected floating point \(B, V\), got "):
            sample(wrong, params, seeds, positions)
    with pytest.raises(TypeError, match="params: expected SamplingParams, got dict"):
        sample(logits, {"top_k": 3}, seeds, positions)
    with pytest.raises(ValueError, match=r"seeds: expected int64 \(4,\) on cpu, got int32 \(4,\) on cpu"):
        sample(logits, params, seeds.int(), positions)
    with pytest.raises(ValueError, match=r"positions: expected int64 \(4,\) on cpu, got int64 \(3,\)"):
        sample(logits, params, seeds, positions[:3])
    with pytest.raises(UsageError, match=r"backend: expected 'auto' or one of .* got 'none'"):
        sample(logits, params, seeds, positions, backend="none")


def test_top_k_beyond_the_vocabulary_keeps_all():
    logits, seeds, positions = make(10, 30)
    found = sample(logits, SamplingParams(top_k=1000), seeds, positions)
    same(found, sample(logits, SamplingParams(), seeds, positions), 30)


def test_gradients_do_not_flow():
    logits, seeds, positions = make(2, 30)
    found = sample(logits.requires_grad_(), SamplingParams(), seeds, positions)
    assert not found.logprob.requires_grad and not found.support.probs.requires_grad


def test_the_public_name():
    assert ssd_core.sample is sample


@pytest.mark.parametrize(("name", "value", "expected"), [
    ("temperature", -1, "a finite number, at least 0"), ("temperature", torch.nan, "a finite number"),
    ("temperature", torch.inf, "a finite number"), ("top_k", -1, "a whole number, at least 0"),
    ("top_k", 2.5, "a whole number"), ("top_p", 0, r"a number in \(0, 1\]"), ("top_p", 1.1, "a number in"),
    ("top_p", torch.nan, "a number in"), ("min_p", -0.1, "a number in"), ("min_p", torch.nan, "a number in"),
    ("max_new_tokens", 0, "at least 1"), ("max_new_tokens", 1.5, "a whole number"),
    ("min_new_tokens", 513, r"a number in \[0, 512\]"),
    ("num_return_sequences", 0, "at least 1"), ("repetition_penalty", 0, "a finite number above 0"),
    ("stop_strings", ("",), "texts that are not empty"), ("seed", -1, "a whole number in"), ("seed", 2**63, "a whole"),
])
def test_sampling_params_name_what_is_wrong(name, value, expected):
    with pytest.raises(ValueError, match=f"{name}: expected {expected}.*, got "):
        SamplingParams(**{name: value})


def test_one_stop_string_may_be_given_as_it_is():
    assert SamplingParams(stop_strings="end").stop_strings == ("end",)
    assert SamplingParams(stop_strings=["a", "b"]).stop_strings == ("a", "b")
