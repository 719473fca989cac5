"""``softmax`` and ``log_softmax`` beyond test_every_op.py."""

import pytest
import torch
import torch.nn.functional as F
from suite import DTYPES, OPS, cases, check_op, gradients, pool
from tolerances import error

from ssd_core import log_softmax, softmax

pytestmark = pytest.mark.usefixtures("poisoned")

FUNCTIONS = {"softmax": (softmax, torch.softmax), "log_softmax": (log_softmax, torch.log_softmax)}
each_name = pytest.mark.parametrize("name", FUNCTIONS)
each_case = pytest.mark.parametrize(("name", "backend", "dtype"), [
    (name, *case) for name in FUNCTIONS for case in cases(name)])


def logits(n=33, v=1001, dtype=torch.float32, scale=3.0, seed=0):
    return (torch.randn(n, v, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@each_case
@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_at_temperatures_that_16_bits_divide_by_exactly(name, backend, dtype, temperature):
    """So that the unfused op has no error of its own before it begins."""
    upstream = torch.linspace(-2, 3, 601, dtype=torch.float64)
    check_op(OPS[name], backend, dtype, temperature=temperature, upstream=upstream, seeds=pool(dtype))


@each_case
def test_it_rounds_once(name, backend, dtype):
    """The unfused op of float32 logits, rounded; dividing 16-bit logits by the temperature would round twice."""
    function, unfused = FUNCTIONS[name]
    z = logits(dtype=dtype)
    wide = z if dtype == torch.float64 else z.float()
    found, true = function(z, 1.7, backend=backend), unfused(wide / 1.7, -1)
    assert found.dtype == dtype and found.is_contiguous()
    once = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0
    smallest = torch.finfo(dtype).tiny if dtype.itemsize == 2 else 0
    exponents = 1e-12 if dtype.itemsize == 8 else 2e-6         # both round them, to 1e-6 where they are -20
    torch.testing.assert_close(found.to(wide.dtype), true, rtol=once * 1.001 + exponents,
                               atol=smallest * torch.finfo(dtype).eps)


@pytest.mark.parametrize("vocab", [151936, 262144])
@pytest.mark.parametrize("top", [0.0, 12.0])
def test_sums_over_a_large_vocabulary_keep_their_digits(vocab, top):
    """One running sum of float32 is off by 1e-6 and more; in a logarithm that matters less."""
    z = logits(3, vocab)
    z[:, 0] = top + z.amax(-1)
    assert error(softmax(z), z.double().softmax(-1)) < 2e-7
    assert error(log_softmax(z), z.double().log_softmax(-1)) < 1e-6


@each_name
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_no_distribution(name, dtype):
    """-inf is probability 0 and stays -inf as a logarithm; a row of it alone, or with a NaN or +inf, is NaN."""
    function, _ = FUNCTIONS[name]
    z = logits(5, 8, dtype)
    z[0, 3] = -torch.inf
    z[1], z[2, 5], z[3, 0] = -torch.inf, torch.nan, torch.inf
    z.requires_grad_()
    found = function(z)
    assert found[0, 3] == (0 if name == "softmax" else -torch.inf)
    assert found[1:4].isnan().all() and found[4].isfinite().all() and found[0].isnan().sum() == 0
    (grad,) = gradients((found.masked_fill(found.isinf(), 0) * torch.arange(8)).sum(), [z])
    assert grad[0].isfinite().all() and grad[4].isfinite().all() and grad[0, 3] == 0


@each_name
def test_extreme_temperatures(name):
    """A tiny one is greedy, a huge one flat; nothing overflows."""
    function, _ = FUNCTIONS[name]
    z = logits()
    for temperature in (1e-4, 1e-30):
        p = function(z, temperature)
        p = p if name == "softmax" else p.exp()
        assert torch.equal(p.argmax(-1), z.argmax(-1)) and (p.amax(-1) > 0.99).all() and not p.isnan().any()
    flat = function(z, 1e30)
    torch.testing.assert_close(flat, torch.full_like(z, 1 / 1001 if name == "softmax" else -torch.tensor(1001.0).log()))


@each_name
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_changes_nothing(name, offset):
    """Multiples of 1/16, exact in float32 with the offset added."""
    function, _ = FUNCTIONS[name]
    z = (logits() * 16).round() / 16
    assert torch.equal(function(z + offset, 0.5), function(z, 0.5))


@each_name
@pytest.mark.parametrize("dtype", DTYPES)
def test_upstream_gradients_with_any_strides(name, dtype):
    """Expanded, transposed, sliced: not to be read as if contiguous."""
    function, _ = FUNCTIONS[name]
    z = logits(6, 40, dtype).requires_grad_()
    wide = torch.randn(40, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    for upstream in (wide.T[::2], wide[0, :6].unsqueeze(1).expand(6, 40), wide[:, :6].T):
        assert not upstream.is_contiguous()
        out = function(z)
        (found,) = torch.autograd.grad(out, z, upstream, retain_graph=True)
        (true,) = torch.autograd.grad(out, z, upstream.contiguous())
        torch.testing.assert_close(found, true)


def test_they_belong_together():
    z = logits()
    torch.testing.assert_close(log_softmax(z, 0.7).exp(), softmax(z, 0.7))
    torch.testing.assert_close(softmax(z).sum(-1), torch.ones(33))
    torch.testing.assert_close(softmax(z), F.softmax(z, -1))


@each_name
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_wrong_temperature_is_named(name, temperature):
    with pytest.raises(ValueError, match=f"temperature: expected a finite number above 0, got {temperature}"):
        FUNCTIONS[name][0](logits(), temperature)
