"""The ops of backend "cpu" on given logits against their float64 definitions: every edge of a row's blocks, what rows
that are no distribution become, instruction sets, threads, memory. Cross-entropy is in test_native.py; what all
backends share is tested in tests/ops."""

import itertools
import subprocess
import sys

import pytest
import torch
from test_native import isas, saved_by_each  # noqa: F401  a fixture

from ssd_core import native
from ssd_core.reference.cross_entropy import cross_entropy as define_cross_entropy
from ssd_core.reference.distill import distill as define_distill
from ssd_core.reference.logprob import logprob as define_logprob

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

DTYPES = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}      # of some float32 roundings, of one
VOCABULARIES = (1, 7, 1023, 1024, 1025, 2047, 2048, 2049, 50257)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
MEASURES = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.999)]
OPTIONS = [{}, {"temperature": 1.7}, {"softcap": 4.0, "logit_scale": 1.3, "temperature": 0.7}]


def logits(n, v, dtype, seed=0, offset=0.0):
    g = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(n, v, generator=g) + offset).to(dtype)


def sparse(n, v, k=6, mass=0.8, seed=0):
    """One id comes twice, one has probability 0 and lies outside."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(v, (n, k), generator=g)
    probs = torch.rand(n, k, generator=g) + 0.1
    if k > 2:
        ids[:, 1] = ids[:, 0]
        ids[:, 2], probs[:, 2] = 10**9, 0
    return ids, mass * probs / probs.sum(1, keepdim=True)


def error(got, ref, least=1e-30):
    return ((got.double() - ref).norm() / ref.norm().clamp_min(least)).item()


def differentiated(define, z, scale):
    """Results in float64, and the gradient of the first times scale."""
    z = z.double().requires_grad_()
    results = define(z)
    total = sum((r * s).sum() for r, s in zip(results, scale.double().reshape(len(z), -1).unbind(1), strict=False))
    return [r.detach() for r in results], torch.autograd.grad(total, z)[0]


def check(found, expected, dtype, least=1.0):
    results, gradient = found
    true_results, true_gradient = expected
    for got, ref in zip(results, true_results, strict=False):
        assert error(got, ref, least) <= 3e-6
    # a gradient loses digits where student and target nearly agree: there the error is absolute
    assert gradient.dtype == dtype and error(gradient, true_gradient, 0.05) <= DTYPES[dtype]


# -- each op ----------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_softmax(dtype, temperature):
    for v, log in itertools.product(VOCABULARIES, (False, True)):
        z, g = logits(3, v, dtype), logits(3, v, dtype, seed=1)
        leaf = z.double().requires_grad_()
        true = (leaf / temperature).log_softmax(-1) if log else (leaf / temperature).softmax(-1)
        found = native.softmax_rows(z, temperature, log)
        assert found.dtype == dtype and error(found, true.detach(), 1e-2) <= DTYPES[dtype]
        exact = true.detach().to(dtype)                # what the gradient is computed from
        gd, p = g.double(), exact.double()
        ref = (gd - p.exp() * gd.sum(-1, keepdim=True) if log else p * (gd - (gd * p).sum(-1, keepdim=True)))
        assert error(native.softmax_rows_backward(g, exact, temperature, log), ref / temperature, 0.05) <= DTYPES[dtype]


@each_dtype
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logprob(dtype, options):
    scale = torch.stack((torch.linspace(-1, 2, 3), torch.linspace(1, -0.5, 3)), 1)
    for v in VOCABULARIES:
        z, y = logits(3, v, dtype), torch.arange(3) * 12345 % v
        expected = differentiated(lambda z, y=y: define_logprob(z, y, **options)[:3], z, scale)
        found = native.logprob_rows(z, y, None, scale, **options)
        check(found, expected, dtype)
        assert torch.equal(found[0][3].long(), z.float().argmax(-1)) or "softcap" in options


@each_dtype
@pytest.mark.parametrize("class_weight", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_probabilities(dtype, class_weight, smoothing):
    scale = torch.linspace(-1, 2, 3)
    options = {"label_smoothing": smoothing, "z_loss": 0.01, "temperature": 1.3}
    for v, kind in itertools.product(VOCABULARIES, (dtype, torch.float64)):
        z, y = logits(3, v, dtype), logits(3, v, torch.float64, seed=1).softmax(-1).to(kind)
        weight = torch.rand(v) + 0.1 if class_weight else None
        ids = torch.zeros(3, 1, dtype=torch.int64)
        expected = differentiated(lambda z, y=y, w=weight: define_cross_entropy(
            z, dense=y.double(), class_weight=w, **options), z, scale)
        check(native.cross_entropy_rows(z, ids, None, y, weight, None, scale, **options), expected, dtype)


@each_dtype
@pytest.mark.parametrize("tail", ["bucket", "renormalise", "support"])
@pytest.mark.parametrize(("divergence", "beta"), MEASURES)
def test_sparse_teachers(dtype, divergence, beta, tail):
    if (divergence, tail) == ("reverse_kl", "renormalise"):
        return                                          # infinite, and refused
    scale, labels = torch.linspace(-1, 2, 3), torch.tensor([0, 5, 3])
    for v, options, with_ce in itertools.product(VOCABULARIES, OPTIONS, (False, True)):
        z, (ids, probs) = logits(3, v, dtype), sparse(3, v)
        y = labels % v
        ids[1, 3] = y[1]                                # one label on the support
        extra = {"ce_weight": 0.3, "label_smoothing": 0.1, "z_loss": 0.01} if with_ce else {}
        expected = differentiated(lambda z, ids=ids, probs=probs, y=y, options=options, extra=extra, w=with_ce: (
            define_distill(z, ids=ids.where(probs > 0, 0), probs=probs.double(), divergence=divergence, beta=beta,
                           tail=tail, labels=y if w else None, temperature_squared=True,
                           **{"temperature": 1.0} | options | extra)), z, scale)
        found = native.distill_rows(
            z, ids, probs, None, y if with_ce else None, None, None, scale, divergence=divergence, beta=beta, tail=tail,
            temperature_squared=True, with_ce=with_ce, **options, **extra)
        check(found, (expected[0] if with_ce else expected[0][:2], expected[1]), dtype)


@each_dtype
@pytest.mark.parametrize("more", [0, 30, -30])
@pytest.mark.parametrize(("divergence", "beta"), MEASURES)
def test_dense_teachers(dtype, divergence, beta, more):
    scale, labels = torch.linspace(-1, 2, 3), torch.tensor([0, 5, 3])
    if (divergence, more) in (("forward_kl", 30), ("reverse_kl", -30)):
        return                                          # infinite
    for v, options, with_ce in itertools.product(VOCABULARIES, OPTIONS, (False, True)):
        if v + more <= 0:
            continue
        z, t, y = logits(3, v, dtype), logits(3, v + more, torch.float64, seed=1), labels % v
        t = t.to(dtype if with_ce else torch.float64)
        extra = {"ce_weight": 0.3, "label_smoothing": 0.1, "z_loss": 0.01} if with_ce else {}
        expected = differentiated(lambda z, t=t, y=y, options=options, extra=extra, w=with_ce: (
            define_distill(z, teacher_u=t, divergence=divergence, beta=beta, tail="bucket", labels=y if w else None,
                           temperature_squared=True, **{"temperature": 1.0} | options | extra)), z, scale)
        found = native.distill_rows(
            z, None, None, t, y if with_ce else None, None, None, scale, divergence=divergence, beta=beta,
            temperature_squared=True, with_ce=with_ce, **options, **extra)
        check(found, (expected[0] if with_ce else expected[0][:2], expected[1]), dtype)


@pytest.mark.parametrize("temperature", [1.0, 1.7, 0.3, 3.0])
def test_exponentials(temperature):
    """Their relative error grows with the exponent, as the rounding of logits does. One row of 2^20, over its first."""
    d = -torch.linspace(0, 60 * temperature, 1 << 20)
    p, x = native.softmax_rows(d.unsqueeze(0), temperature, False)[0].double(), d.double() / temperature
    share = (1.5e-8 if temperature == 1 else 1.4e-7) + (6e-8 if native.cpu_isa() == "baseline" else 0)
    assert ((p / p[0] / x.exp() - 1).abs() <= 2.4e-7 - share * x).all()


# -- edges ------------------------------------------------------------------------------------------------------------


def every_op(z, t, index=None):
    """Results and gradients of every op, by name."""
    n = len(z) if index is None else len(index)
    scale, y = torch.linspace(-1, 2.3, n), torch.arange(len(z)) * 37 % z.shape[1]
    ids, probs = sparse(len(z), z.shape[1])
    found = {"cross_entropy": native.cross_entropy_rows(z, y.unsqueeze(1), None, None, None, index, scale),
             "dense": native.cross_entropy_rows(z, y.unsqueeze(1), None, t.softmax(-1), None, index, scale),
             "logprob": native.logprob_rows(z, y, index, torch.stack((scale, -scale), 1))}
    for kind, beta in MEASURES:
        found[f"{kind}-{beta}"] = native.distill_rows(
            z, None, None, t, y, None, index, scale, divergence=kind, beta=beta, with_ce=True, ce_weight=0.2)
        found[f"sparse-{kind}-{beta}"] = native.distill_rows(
            z, ids, probs, None, y, None, index, scale, divergence=kind, beta=beta, with_ce=True, ce_weight=0.2)
    if index is None:
        for log in (False, True):
            found[f"softmax-{log}"] = (
                native.softmax_rows(z, 1.3, log), native.softmax_rows_backward(t, native.softmax_rows(z, 1.3, log), 1.3,
                                                                              log))
    return found


def equal(found, expected):
    for name, results in expected.items():
        for a, e in zip(found[name], results, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True, msg=name)


@each_dtype
def test_strides_and_rows(dtype):
    """Rows of wider, transposed and repeated tensors, and some of them: the bits of contiguous ones."""
    z, t = logits(9, 1500, dtype), logits(9, 1500, dtype, seed=1)
    expected = every_op(z, t)
    wide = torch.cat((z, t), 1)
    equal(every_op(wide[:, :1500], wide[:, 1500:]), expected)
    equal(every_op(z.T.contiguous().T, t.T.contiguous().T), expected)
    index = torch.tensor([0, 3, 4, 7])
    some = every_op(z, t, index)
    again = every_op(z.T.contiguous().T, t, index)
    equal(again, some)
    for name, (results, gradient) in some.items():
        assert results.shape[1] == 4 and torch.equal(results[1], expected[name][0][1, index]), name
        others = torch.ones(9, dtype=torch.bool).index_fill(0, index, False)
        assert not gradient[others].any() and gradient[index].ne(0).any(1).all(), name


@each_dtype
def test_no_rows(dtype):
    z = logits(0, 7, dtype)
    for name, (results, gradient) in every_op(z, z).items():
        assert results.shape[-1] in (0, 7) and gradient.shape == (0, 7), name
    z = logits(4, 7, dtype)
    for name, (results, gradient) in every_op(z, z, torch.zeros(0, dtype=torch.int64)).items():
        assert results.shape[1] == 0 and gradient.shape == (4, 7) and not gradient.any(), name


@each_dtype
def test_numbers_that_are_none(dtype):
    """A NaN or +inf makes its row NaN, loss and gradient, and no other; a row of -inf alone too."""
    t = logits(4, 3000, dtype, seed=1)
    for place, bad in itertools.product((0, 1024, 2999), (torch.nan, torch.inf)):
        z = logits(4, 3000, dtype)
        z[2, place] = bad
        z[3] = -torch.inf
        for name, (results, gradient) in every_op(z, t).items():
            rows = results if name.startswith("softmax") else results[:1].T
            assert rows[2:].isnan().all(), (name, place, bad)
            assert gradient[2:].isnan().all() and rows[:2].isfinite().all() and gradient[:2].isfinite().all(), name


@each_dtype
def test_excluded_logits(dtype):
    """-inf has probability 0 and gradient 0, in whole blocks and in those where the maximum lies; nothing is NaN."""
    z, t = logits(4, 5000, dtype), logits(4, 5000, dtype, seed=1)
    out = torch.zeros(5000, dtype=torch.bool)
    out[:2048] = out[3000:3500] = out[4999] = True
    z[:, out] = t[:, out] = -torch.inf
    z[:, :1], t[:, :1] = 0, 0
    found, kept = every_op(z, t), ~out
    kept[0] = True
    small = every_op(z[:, kept].contiguous(), t[:, kept].contiguous())
    for name in ("logprob", "forward_kl-0.5", "reverse_kl-0.5", "jsd-0.5"):
        results, gradient = found[name]
        gradient[torch.arange(4), torch.arange(4) * 37] = 0     # of labels, one of them excluded
        assert not gradient.isnan().any() and not gradient[:, out & ~kept].any(), name
        row = 1                                         # entropy or divergence, whatever the labels
        torch.testing.assert_close(results[row].sum(), small[name][0][row].sum(), rtol=1e-5, atol=1e-5, msg=name)


def test_a_common_offset_changes_no_bit():
    z = (logits(4, 3000, torch.float32) * 16).round() / 16
    t = (logits(4, 3000, torch.float32, seed=1) * 16).round() / 16
    plain, moved = every_op(z, t), every_op(z + 4096, t - 1024)
    for name in plain:
        if name == "logprob" or "kl" in name or "jsd" in name:
            assert torch.equal(plain[name][0][1], moved[name][0][1]), name
            assert torch.equal(plain[name][1], moved[name][1]), name


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_student_that_is_its_teacher(divergence):
    z = logits(4, 3000, torch.float32)
    (_, value, _, _), gradient = native.distill_rows(z, None, None, z, row_scale=torch.ones(4), divergence=divergence)
    assert not value.any() and gradient.abs().max() <= 1e-7


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "support"])
def test_no_support(tail):
    """All probabilities 0: value and gradient are 0."""
    z, ids = logits(2, 1100, torch.float32), torch.zeros(2, 3, dtype=torch.int32)
    for probs in (torch.zeros(2, 3), torch.zeros(2, 0)):
        results, gradient = native.distill_rows(
            z, ids[:, : probs.shape[1]], probs, row_scale=torch.ones(2), tail=tail)
        assert not results.any() and not gradient.any()


def test_a_tail_far_below():
    """The student's mass off the support is e^-60: a sum of its own, not 1 minus the rest."""
    z = logits(3, 2000, torch.float32)
    ids, probs = torch.tensor([[5, 1500]] * 3), torch.tensor([[0.5, 0.3]] * 3)
    z.scatter_(1, ids, 60.0)
    for divergence, beta in MEASURES:
        expected = differentiated(lambda z, d=divergence, b=beta: define_distill(
            z, ids=ids, probs=probs.double(), divergence=d, beta=b, temperature=1.0, temperature_squared=False,
            tail="bucket"), z, torch.ones(3))
        found = native.distill_rows(z, ids, probs, row_scale=torch.ones(3), divergence=divergence, beta=beta)
        assert error(found[0][1], expected[0][1]) <= 3e-6 and error(found[1], expected[1]) <= 3e-6


# -- the machine ------------------------------------------------------------------------------------------------------


@each_dtype
def test_bits_do_not_depend_on_threads(dtype):
    z, t, threads = logits(33, 5000, dtype), logits(33, 5000, dtype, seed=1), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = every_op(z, t)
        for count in (2, 4):
            torch.set_num_threads(count)
            equal(every_op(z, t), expected)
    finally:
        torch.set_num_threads(threads)


def test_instruction_sets_agree(isas, tmp_path):  # noqa: F811
    cases = [(logits(5, v, dtype), logits(5, v, dtype, seed=1)) for v in (7, 1025, 5000) for dtype in DTYPES]
    torch.save(cases, tmp_path / "cases.pt")
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("rows", {__file__!r})
import sys
sys.path.insert(0, {str(__file__).rpartition("/")[0]!r})
rows = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rows)
torch.save([rows.every_op(*case) for case in torch.load("cases.pt")], native.cpu_isa() + ".pt")
"""
    levels = saved_by_each(isas, code, tmp_path)
    for level in levels[1:]:
        for found, expected in zip(level, levels[0], strict=True):
            for name, (results, gradient) in expected.items():
                assert error(found[name][0], results.double(), 1.0) <= DTYPES[results.dtype], name
                assert error(found[name][1], gradient.double(), 0.05) <= DTYPES[gradient.dtype], name


def test_memory_beyond_results():
    """Strided logits of 400 MB are copied a few rows at a time."""
    code = """
import resource, torch
from ssd_core import native
torch.set_num_threads(2)
z = torch.randn(262144, 400).T
t, y = z.to(torch.bfloat16), torch.zeros(400, dtype=torch.int64)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
native.logprob_rows(z[:2], y[:2])
before = peak()
native.logprob_rows(z, y)
native.distill_rows(z, None, None, t)
native.cross_entropy_rows(z, y.unsqueeze(1), None, t)
print((peak() - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64
