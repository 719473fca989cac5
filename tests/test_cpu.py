"""The fused head of backend "cpu" against the float64 definition: every edge of its panels and tiles, instruction sets,
threads. What all backends share is tested in tests/ops."""

import concurrent.futures
import itertools

import pytest
import torch
from test_native import isas, saved_by_each  # noqa: F401  a fixture

from ssd_core import backends, native
from ssd_core.plan import Demand, plan_chunks
from ssd_core.reference.cross_entropy import cross_entropy as of_logits
from ssd_core.reference.grad_filter import default_order
from ssd_core.reference.grad_filter import grad_filter as definition
from ssd_core.reference.linear_cross_entropy import linear_cross_entropy as define

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}    # of one rounding of each gradient
WHOLE = 1 << 40


def problem(n, d, v, dtype, k=0, bias=True, class_weight=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    w = (2 * torch.randn(v, d, generator=g, dtype=torch.float64) / d**0.5).to(dtype)
    b = torch.randn(v, generator=g, dtype=torch.float64).to(dtype) if bias else None
    ids = torch.randint(v, (n, k or 1), generator=g)
    probs = torch.rand(n, k, generator=g) * 1.6 / k if k else None
    c = torch.rand(v, generator=g) + 0.5 if class_weight else None
    return x, w, b, ids, probs, c, torch.randn(n, generator=g)


def call(x, w, b, ids, probs, c, scale, *, index=None, dtype=None, rows=128, columns=WHOLE, **options):
    *results, certificate, d_input, d_weight, d_bias = native.linear_cross_entropy(
        x, w, b, ids, probs, None, c, index, scale, dtype or x.dtype, [True, True, b is not None], False, rows,
        columns, **options)
    assert certificate is None
    return *results, d_input, d_weight, d_bias


def error(got, ref, least=0.0):
    return ((got.double() - ref).norm() / ref.norm().clamp_min(least)).item()


def check(x, w, b, ids, probs, c, scale, *, index=None, softcap=0.0, **options):
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, w, b)]
    some = slice(None) if index is None else index
    defaults = {"bucket": False, "label_smoothing": 0.0, "z_loss": 0.0, "temperature": 1.0, "logit_scale": 1.0}
    loss, nll, lse = define(
        leaves[0][some], leaves[1], ids[some], None if probs is None else probs[some], linear_bias=leaves[2],
        class_weight=None if c is None else c.double(), softcap=softcap or None, **(defaults | options))
    grads = torch.autograd.grad((loss * scale[some].double()).sum(), [t for t in leaves if t is not None])
    for rows, columns in itertools.product((1, 64, 1000), (WHOLE, 256, 512)):
        results = call(x, w, b, ids, probs, c, scale[some], index=index, rows=rows, columns=columns, softcap=softcap,
                       **options)
        least = lse.norm().item()       # a loss is a difference of terms of this size
        found = [error(got, ref.detach(), least) for got, ref in zip(results[:3], (loss, nll, lse), strict=True)]
        assert max(found) <= 2e-6, (rows, columns, found)
        least = 0.1 * scale[some].norm().item()     # q - w loses digits where the student is nearly sure
        given = [t for t in results[3:] if t is not None]
        found = [error(got, ref, least) for got, ref in zip(given, grads, strict=True)]
        assert max(found) <= TOLERANCE[x.dtype], (rows, columns, found)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("n", "d", "v"), [
    (1, 1, 2), (1, 8, 7), (63, 5, 255), (64, 6, 256), (65, 47, 257), (131, 48, 513), (70, 33, 2050), (200, 65, 1009)])
def test_edges(n, d, v, dtype):
    check(*problem(n, d, v, dtype))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("given", "options"), [
    ({"bias": False}, {}),
    ({}, {"softcap": 3.0, "logit_scale": 1.5, "temperature": 0.7}),
    ({"class_weight": True}, {"label_smoothing": 0.1, "z_loss": 0.01}),
    ({}, {"softcap": 2.0, "label_smoothing": 0.2}),
    ({"k": 5}, {}),
    ({"k": 5}, {"bucket": True, "temperature": 0.5}),
    ({"k": 5}, {"bucket": True, "softcap": 4.0}),
    ({"k": 5}, {"bucket": True, "label_smoothing": 0.1})])
def test_options(given, options, dtype):
    check(*problem(101, 40, 701, dtype, **given), **options)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_some_rows(dtype):
    check(*problem(150, 24, 600, dtype), index=torch.arange(1, 150, 3))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_weight_of_other_strides_and_dtype(dtype):
    x, w, *rest = problem(90, 30, 300, dtype)
    expected = call(x, w, *rest)
    strided = call(x, w.t().contiguous().t(), *rest)
    cast = call(x.float(), w.float(), *rest, dtype=dtype)
    assert all(torch.equal(a, e) for a, e in zip(strided, expected, strict=True))
    assert cast[3].dtype == cast[4].dtype == torch.float32
    assert all(error(a, e.double()) <= TOLERANCE[dtype] for a, e in zip(cast, expected, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_bits_depend_on_neither_chunks_nor_threads(dtype):
    """Every token's sums have one order; those of the weight's gradient have one for each chunk of tokens."""
    given, threads = problem(300, 40, 1500, dtype), torch.get_num_threads()
    expected = call(*given, rows=300)
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            again, chunked = call(*given, rows=300), call(*given, rows=64)
            assert all(torch.equal(a, e) for a, e in zip(again, expected, strict=True))
            assert all(torch.equal(a, e) for a, e in zip(chunked[:4], expected[:4], strict=True))
            for columns in (256, 1024, 1280):       # of which so many are kept, and the rest computed again
                part = call(*given, rows=300, columns=columns)
                assert all(torch.equal(a, e) for a, e in zip(part, expected, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("columns", [WHOLE, 256])
def test_nan_and_infinity(dtype, softcap, columns):
    x, w, b, *rest = problem(70, 16, 503, dtype)
    b[::2] = -torch.inf                                     # tokens whose label that is have an infinite loss
    rest[0][:] |= 1
    rest[0].clamp_(max=501)
    x[3] = torch.nan
    loss, _, lse, d_input, d_weight, d_bias = call(x, w, b, *rest, softcap=softcap, columns=columns)
    fine = torch.arange(70) != 3
    assert loss[3].isnan() and d_input[3].isnan().all() and d_weight.isnan().all()
    assert loss[fine].isfinite().all() and lse[fine].isfinite().all() and d_input[fine].isfinite().all()
    if not softcap:
        x[3] = 0
        d_weight, d_bias = call(x, w, b, *rest, columns=columns)[4:]
        assert (d_weight[::2] == 0).all() and (d_bias[::2] == 0).all() and (d_bias[1::2] != 0).all()


def test_all_logits_of_a_tile_are_minus_infinity():
    x, w, b, ids, *rest = problem(5, 8, 800, torch.float32)
    b[:512] = -torch.inf
    check(x, w, b, ids.clamp(min=512), *rest)


def test_smoothing_over_a_tile_of_minus_infinity():
    x, w, b, ids, *rest = problem(5, 8, 800, torch.float32)
    b[:512] = -torch.inf
    loss, nll, *_ = call(x, w, b, ids.clamp(min=512), *rest, label_smoothing=0.1)
    assert (loss == torch.inf).all() and nll.isfinite().all()


def test_no_rows():
    x, w, b, ids, probs, c, scale = problem(0, 8, 20, torch.float32)
    loss, _, _, d_input, d_weight, d_bias = call(x, w, b, ids, probs, c, scale)
    assert loss.shape == (0,) and d_input.shape == (0, 8) and not d_weight.any() and not d_bias.any()


def test_bad_id_is_named():
    x, w, b, ids, *rest = problem(70, 8, 20, torch.float32)
    ids[66] = 20
    with pytest.raises(IndexError, match=r"ids: expected 0 <= id < V = 20, got 20"):
        call(x, w, b, ids, *rest)


def test_instruction_sets_agree(isas, tmp_path):  # noqa: F811
    cases = [problem(70, 33, 601, dtype, k=k) for dtype in TOLERANCE for k in (0, 5)]
    torch.save(cases, tmp_path / "cases.pt")
    code = """
results = []
for x, w, b, ids, probs, c, scale in torch.load("cases.pt"):
    for softcap in (0.0, 3.0):
        found = native.linear_cross_entropy(
            x, w, b, ids, probs, None, c, None, scale, x.dtype, [True] * 3, False, 64, 1 << 40, softcap=softcap,
            bucket=probs is not None)
        results.append(found[:3] + found[4:])
torch.save(results, native.cpu_isa() + ".pt")
"""
    levels = saved_by_each(isas, code, tmp_path)
    for level in levels[1:]:
        for got, expected in zip(level, levels[0], strict=True):
            assert max(error(a, e.double()) for a, e in zip(got[:3], expected[:3], strict=True)) <= 2e-6
            assert max(error(a, e.double()) for a, e in zip(got, expected, strict=True)) <= TOLERANCE[expected[3].dtype]
    # Every sum has one order, whatever the width of the vectors: what has the same instructions has the same bits.
    flat = [torch.cat([results[4].flatten().float() for results in level]) for level in levels]
    flat = dict(zip(isas, flat, strict=True))
    if "avx512" in isas:
        assert torch.equal(flat["avx2"], flat["avx512"]) and not torch.equal(flat["baseline"], flat["avx2"])
    if "avx512bf16" in isas:
        assert not torch.equal(flat["avx512"], flat["avx512bf16"])


def peaked(n, d, v, dtype, k=None, seed=0, spread=4.0):
    """As language models are: most of the mass on a few ids."""
    x, w, b, ids, probs, _, scale = problem(n, d, v, dtype, k=k or 0, seed=seed)
    return x, (spread / 2 * w.double()).to(dtype), b, ids, probs, None, scale.abs()


def defined(x, w, b, ids, probs, c, scale, order, delta_input, delta_weight, **options):
    """Gradients and what was skipped by the definition, in float64."""
    u = torch.nn.functional.linear(x.double(), w.double(), b.double()).requires_grad_()
    loss, *_ = of_logits(u, ids, probs, **options)
    (grad,) = torch.autograd.grad((loss * scale.double()).sum(), u)
    z = options.get("logit_scale", 1.0) * u.detach()
    if options.get("softcap"):
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    q = (z / options.get("temperature", 1.0)).softmax(-1)
    used = torch.ones_like(ids) if probs is None else (probs > 0).long()
    protected = torch.zeros(u.shape, dtype=torch.int64).scatter_add_(1, ids, used) > 0
    order = default_order(q) if order is None else order
    found = [definition(grad, q, protected, delta=delta, tile=256, order=order) if delta else (grad, None, None)
             for delta in (delta_input, delta_weight)]
    shares = [part[1:] for part in found if part[1] is not None]
    return found[0][0] @ w.double(), found[1][0].T @ x.double(), grad.sum(0), shares


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("columns", [WHOLE, 512])
@pytest.mark.parametrize(("deltas", "given", "options"), [
    ((0.1, 0.1), {}, {}),
    ((0.02, 0.3), {}, {}),
    ((0.0, 0.1), {}, {"temperature": 1.7}),
    ((0.1, 0.0), {"k": 5}, {}),
    ((0.2, 0.2), {"k": 5}, {"logit_scale": 0.6}),
    ((0.1, 0.1), {}, {"softcap": 6.0, "temperature": 0.8})])
def test_gradient_filter_is_the_definition(deltas, given, options, columns, dtype):
    for n, d, v, order in ((150, 40, 2100, "shuffled"), (70, 33, 300, None), (300, 64, 5000, None)):
        given_problem = peaked(n, d, v, dtype, **given)
        x, w, b, ids, probs, c, scale = given_problem
        shuffled = torch.randperm(v, generator=torch.Generator().manual_seed(1)) if order else None
        d_input, d_weight, d_bias, shares = defined(*given_problem, shuffled, *deltas, **options)
        for rows, held in ((64, 0), (64, 1 << 40), (1000, 1 << 40)):
            *_, certificate, got_input, got_weight, got_bias = native.linear_cross_entropy(
                x, w, b, ids, probs, None, c, None, scale, dtype, [True] * 3, False, rows, columns,
                grad_filter=deltas[0], grad_filter_weight=deltas[1], vocab_order=shuffled, held_bytes=held, **options)
            true = torch.stack([torch.stack((s.max(), s.mean(), a.double().mean())) for s, a in shares])
            true = torch.stack((true[:, 0].max(), true[:, 1].max(), true[:, 2].mean()))
            torch.testing.assert_close(certificate.double(), true, rtol=0.03, atol=0.003)
            assert true[2] < 0.9
            # a token whose mass meets the bound but for rounding may choose otherwise
            for got, ref in ((got_input, d_input), (got_weight, d_weight), (got_bias, d_bias)):
                assert error(got, ref) <= {torch.float32: 3e-4, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_bits_of_the_gradient_filter_do_not_depend_on_threads(dtype):
    """Nor when it multiplies, where there is little room for what waits."""
    x, w, b, ids, probs, c, scale = peaked(150, 40, 2100, dtype)
    threads = torch.get_num_threads()

    def results(count, held):
        torch.set_num_threads(count)
        found = native.linear_cross_entropy(
            x, w, b, ids, probs, None, c, None, scale, dtype, [True] * 3, False, 64, WHOLE, grad_filter=0.1,
            grad_filter_weight=0.02, held_bytes=held)
        return torch.cat([part.flatten().double() for part in found])

    try:
        for held in (0, 100_000, 1 << 40):
            expected = results(1, held)
            assert all(torch.equal(results(count, held), expected) for count in (2, 3, 4))
    finally:
        torch.set_num_threads(threads)


def test_memory_is_kept_for_the_next_call_and_given_back():
    given = problem(300, 40, 5000, torch.float32)
    native.release_workspace()
    assert native.kept_workspace_bytes() == 0
    expected, kept = call(*given, rows=300), native.kept_workspace_bytes()
    assert kept >= 300 * 5000 * 4                           # the logits' places
    again = call(*given, rows=300)
    assert native.kept_workspace_bytes() == kept and all(map(torch.equal, again, expected))
    with torch.inference_mode():
        call(*given, rows=128)
    less = native.kept_workspace_bytes()
    assert less < kept / 2                                  # a call with less keeps less
    assert all(map(torch.equal, call(*given, rows=300), expected))
    native.release_workspace()
    assert native.kept_workspace_bytes() == 0


def test_calls_side_by_side_share_no_memory():
    given = [problem(200, 40, 5000, torch.float32, seed=seed) for seed in range(4)]
    expected = [call(*one, rows=200) for one in given]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            found = pool.map(lambda one: call(*one, rows=200), given)
            assert all(all(map(torch.equal, a, e)) for a, e in zip(found, expected, strict=True))


def test_gradient_filter_wants_one_sign():
    x, w, b, ids, probs, c, scale = peaked(70, 16, 600, torch.float32)
    scale[5] *= -1
    with pytest.raises(ValueError, match="grad_filter: expected token weights and upstream gradients of one sign"):
        native.linear_cross_entropy(
            x, w, b, ids, probs, None, c, None, scale, x.dtype, [True] * 3, False, 64, WHOLE, grad_filter=0.1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("vocab", "hidden"), [(7, 3), (49152, 576), (128256, 4096), (1 << 20, 576)])
def test_plans_keep_to_the_budget_and_name_the_least(vocab, hidden, dtype):
    demand = Demand(3000, hidden, vocab, 1, dtype, torch.device("cpu"))
    demand = backends.choose("linear_cross_entropy", demand.device, dtype, "cpu").counted(demand)
    with pytest.raises(ValueError, match=r"workspace_bytes: expected at least \d+ for \d+ logits, got 1000") as refused:
        plan_chunks(demand, 1000)
    least = int(str(refused.value).split("at least ")[1].split()[0])
    with pytest.raises(ValueError, match="workspace_bytes"):
        plan_chunks(demand, least - 1)
    for budget in (least, 2 * least, 64 << 20, 1 << 30):
        if budget >= least:
            plan = plan_chunks(demand, budget)
            assert plan.rows % native.tile_shape(dtype)[0] == 0 and (plan.tile == vocab or plan.tile % 256 == 0)
            held = demand.held(plan.rows, plan.tile)
            assert held <= budget
    assert plan_chunks(demand, 1 << 40).tile == vocab and plan_chunks(demand, 1 << 40).rows >= 3000
