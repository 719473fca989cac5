"""Every backend of the op against the float64 definition. A backend joins by its record in ssd_core.backends."""

import numpy as np
import pytest
import suite
import torch
import torch.nn.functional as F
from suite import OPS, TOKENS, flops, hard, planned, problem, soft, sparse
from tolerances import error

from ssd_core import LinearCrossEntropyLoss, SparseTarget, backends, linear_cross_entropy, native
from ssd_core.checks import UsageError

pytestmark = pytest.mark.usefixtures("poisoned")

OP = OPS["linear_cross_entropy-hard"]
each_backend, each_case = suite.each_backend(OP.name), suite.each_case(OP.name)


def expected(x, w, b, target, **options):
    return suite.expected(OP.define, (x, w, b), target, **options)


def check(backend, dtype, draw, **options):
    suite.check_op(OP, backend, dtype, draw, **options)


def test_the_extension_is_built():
    """Where there is a compiler, a missing backend "cpu" must not pass as tests that did not run."""
    assert native.missing() is None


# -- options ----------------------------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_hard_labels(backend, dtype, reduction):
    upstream = torch.linspace(-2, 3, TOKENS, dtype=torch.float64) if reduction == "none" else -2.0
    check(backend, dtype, hard(dtype=dtype), reduction=reduction, upstream=upstream)


@each_case
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_upstream_gradients_that_are_no_power_of_two(backend, dtype, reduction):
    """The gradients of a reduced loss are there before its upstream gradient is known: scaling them by -1.5 rounds
    16-bit ones once more, by a third of the half-ulp squared, and nothing else."""
    once = torch.finfo(dtype).eps / 2 / 3**0.5 if dtype.itemsize == 2 else 0.0
    check(backend, dtype, hard(dtype=dtype), reduction=reduction, upstream=-1.5, extra=once)


@each_case
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("tail", "total"), [
    ("none", 1.0), ("none", 0.6), ("renormalise", 0.6), ("bucket", 0.6), ("bucket", 1.0)])
def test_sparse_targets(backend, dtype, reduction, tail, total):
    check(backend, dtype, sparse(dtype=dtype, total=total), reduction=reduction, tail=tail)


@each_case
@pytest.mark.parametrize("options", [
    {"label_smoothing": 0.1}, {"temperature": 1.7}, {"logit_scale": 0.4}, {"softcap": 2.0}, {"z_loss": 0.01},
    {"softcap": 3.0, "logit_scale": 1.5, "temperature": 0.7, "z_loss": 1e-3, "label_smoothing": 0.2},
], ids=lambda options: "-".join(options))
@pytest.mark.parametrize("kind", ["hard", "sparse"])
def test_options(backend, dtype, options, kind):
    check(backend, dtype, hard(dtype=dtype) if kind == "hard" else sparse(dtype=dtype), **options)


@each_case
@pytest.mark.parametrize(("smoothing", "reduction"), [(0.0, "mean"), (0.2, "mean"), (0.2, "none")])
def test_class_weights_and_token_weights(backend, dtype, smoothing, reduction):
    weight, token_weight = torch.rand(601) + 0.1, torch.rand(TOKENS) * 2
    check(backend, dtype, hard(dtype=dtype), weight=weight, token_weight=token_weight, label_smoothing=smoothing,
          reduction=reduction)


@each_backend
def test_default_options_equal_pytorch(backend):
    x, w, b, y = problem(n=24)
    x3, y3 = x.view(2, 12, -1), y.view(2, 12)
    loss = linear_cross_entropy(x3, w, y3, linear_bias=b, backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(x, w, b), y))
    options = torch.nn.LinearCrossEntropyOptions() if hasattr(torch.nn, "LinearCrossEntropyOptions") else None
    if options:
        torch.testing.assert_close(loss, F.linear_cross_entropy(x, w, y, linear_bias=b, options=options))


@each_case
def test_without_bias(backend, dtype):
    check(backend, dtype, hard(dtype=dtype, bias=False))


# -- shapes -----------------------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("v", [1, 7, 50257, 128256, 151936, 262144])
@pytest.mark.parametrize("n", [1, 5])
def test_vocabulary_sizes(backend, v, n):
    check(backend, torch.float32, hard(n=n, d=8, v=v, ignored=0), seeds=2)


@each_backend
def test_vocabulary_sizes_sparse(backend):
    for v in (1, 7, 262144):
        check(backend, torch.float32, sparse(n=3, d=8, v=v, total=0.9), tail="bucket", seeds=2)


@each_backend
def test_sums_over_a_large_vocabulary_keep_their_digits(backend):
    """Megatron #2206: numerics that fail only past V = 250k. d_input in blocks of the vocabulary is at least ten times
    nearer the truth than one running sum, which few rows meet in some libraries' products."""
    x, w, b, y = problem(n=3, d=8, v=262144, ignored=0)
    _, (true, *_) = expected(x, w, b, y)
    (ours,) = torch.autograd.grad(linear_cross_entropy(x, w, y, linear_bias=b, backend=backend), (x,))
    with torch.no_grad():
        slopes = (F.linear(x, w, b).softmax(-1) - F.one_hot(y, len(w))) / len(y)
        running = torch.from_numpy(np.stack([
            np.cumsum((row.unsqueeze(1) * w).numpy(), axis=0, dtype=np.float32)[-1] for row in slopes]))
    assert error(ours, true) < error(running, true) / 10


# -- what counts ------------------------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["hard", "sparse"])
def test_all_ignored_is_zero_not_nan(backend, dtype, reduction, kind):
    """cut-cross-entropy divides by zero without valid labels; a masked micro-batch must not end a run."""
    x, w, b, y = problem(dtype=dtype)
    target = torch.full_like(y, -100)
    if kind == "sparse":
        target = SparseTarget(torch.zeros(len(y), 3, dtype=torch.int32), torch.zeros(len(y), 3))
    loss = linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, backend=backend)
    assert (loss == 0).all()
    for grad in torch.autograd.grad(loss.sum(), (x, w, b)):
        assert (grad == 0).all()


@each_backend
def test_ignored_rows_meet_no_product(backend):
    """NaN hidden states at ignored positions (padding) reach neither loss nor gradients."""
    x, w, b, y = problem()
    reference = linear_cross_entropy(x, w, y, linear_bias=b, backend=backend)
    true = torch.autograd.grad(reference, (w, b))
    dirty = x.detach().clone()
    dirty[y == -100] = torch.nan
    dirty.requires_grad_()
    loss = linear_cross_entropy(dirty, w, y, linear_bias=b, backend=backend)
    dx, dw, db = torch.autograd.grad(loss, (dirty, w, b))
    assert torch.equal(loss, reference) and torch.equal(dw, true[0]) and torch.equal(db, true[1])
    assert (dx[y == -100] == 0).all() and dx.isfinite().all()


@each_backend
def test_any_ignore_index(backend):
    x, w, b, y = problem(ignored=0)
    loss = linear_cross_entropy(x, w, y, linear_bias=b, ignore_index=int(y[3]), backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(x, w, b), y, ignore_index=int(y[3])))


@each_backend
@pytest.mark.parametrize("kind", ["hard", "sparse"])
def test_shift_predicts_the_next_token(backend, kind):
    x, w, b, y = problem(n=24)
    x3, token_weight = x.view(2, 12, -1), torch.rand(2, 12)
    target = y.view(2, 12)
    if kind == "sparse":
        flat = soft(24, w.shape[0])
        target = SparseTarget(flat.ids.view(2, 12, -1), flat.probs.view(2, 12, -1))
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(x3, w, target, linear_bias=b, shift=True, reduction=reduction,
                                    token_weight=token_weight, backend=backend)
        by_hand = linear_cross_entropy(x3[:, :-1], w, target[:, 1:], linear_bias=b, reduction=reduction,
                                       token_weight=token_weight[:, 1:], backend=backend)
        assert loss.shape == by_hand.shape
        torch.testing.assert_close(loss, by_hand)
        ours, theirs = (torch.autograd.grad(t.sum(), (x, w)) for t in (loss, by_hand))
        for a, e in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, e)


@each_backend
def test_one_hot_sparse_is_hard(backend):
    x, w, b, y = problem()
    one_hot = SparseTarget(y.clamp_min(0).unsqueeze(-1).int(), (y != -100).float().unsqueeze(-1))
    hard = linear_cross_entropy(x, w, y, linear_bias=b, backend=backend)
    loss = linear_cross_entropy(x, w, one_hot, linear_bias=b, backend=backend)
    assert torch.equal(loss, hard)


@each_backend
def test_importance_weights_may_repeat_ids_and_not_sum_to_one(backend):
    """Random-sampling distillation: m draws of weight 1 / m are the sum of m hard losses."""
    x, w, b, _ = problem(ignored=0)
    ids = torch.randint(w.shape[0], (len(x), 4), dtype=torch.int32)
    ids[:, 1] = ids[:, 0]
    loss = linear_cross_entropy(x, w, SparseTarget(ids, torch.full(ids.shape, 0.25)), linear_bias=b, backend=backend)
    each = [linear_cross_entropy(x, w, ids[:, k].long(), linear_bias=b, backend=backend) for k in range(4)]
    torch.testing.assert_close(loss, sum(each) / 4)


# -- numbers ----------------------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("offset", [1e3, -1e3])
def test_common_logit_offset_costs_no_digits(backend, offset):
    """(m - z_y) + log sum, not lse - z_y: one row's loss stays right under an offset that float32 logits can hold."""
    n, v = 4, 64
    z = (torch.randint(-32, 32, (n, v)) / 8).float()        # exact in float32 with the offset added
    y = torch.randint(v, (n,))
    loss = linear_cross_entropy(torch.eye(n), (z + offset).T.contiguous(), y, reduction="none", backend=backend)
    true = F.cross_entropy(z.double(), y, reduction="none")
    assert error(loss, true) < 1e-6


@each_backend
def test_infinite_and_nan_logits(backend):
    """-inf is probability 0; NaN and +inf make the token's loss NaN, as in PyTorch, and no other token's."""
    v = 9
    z = torch.randn(5, v)
    z[0, 3] = -torch.inf
    z[1, 2] = torch.nan
    z[2, 4] = torch.inf
    y = torch.tensor([1, 1, 1, 1, 3])
    bias = torch.zeros(v)
    # the logits enter as a bias, one row at a time: products with infinity would be NaN
    for row in range(5):
        loss = linear_cross_entropy(
            torch.zeros(1, 2), torch.zeros(v, 2), y[row : row + 1], linear_bias=bias + z[row], backend=backend)
        true = F.cross_entropy(z[row : row + 1], y[row : row + 1])
        assert loss.isnan() == true.isnan()
        if not true.isnan():
            torch.testing.assert_close(loss, true)
    z[3, 1] = -torch.inf        # the target itself
    loss = linear_cross_entropy(torch.zeros(1, 2), torch.zeros(v, 2), y[3:4], linear_bias=z[3], backend=backend)
    assert loss == torch.inf


# -- memory and chunks ------------------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_results_do_not_depend_on_the_chunk_size(backend, dtype, reduction, monkeypatch):
    """Of whole rows; test_every_op.py has tiles of the vocabulary."""
    x, w, b, y = problem(n=50, v=2000, dtype=dtype)
    results = []
    for rows in (50, 20, 9):
        with planned(monkeypatch, "linear_cross_entropy", rows, 2000, 2000):
            loss = linear_cross_entropy(x, w, y, linear_bias=b, reduction=reduction, backend=backend)
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), (x, w, b))))
    for other in results[1:]:
        assert error(other[0], results[0][0]) <= 1e-6
        for a, e in zip(other[1:], results[0][1:], strict=True):
            assert error(a, e) <= 4 * torch.finfo(dtype).eps


@each_case
def test_a_strided_bias(backend, dtype):
    """Of 16 bits it is added elsewhere than of 32: see test_strided_inputs."""
    x, w, b, y = problem(dtype=dtype)
    apart = b.detach().repeat_interleave(2)[::2]
    assert not apart.is_contiguous()
    true, found = (linear_cross_entropy(x, w, y, linear_bias=bias, backend=backend) for bias in (b, apart))
    assert torch.equal(found, true)


# -- autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frozen", "products"), [((), 3), ((1, 2), 2), ((0,), 2), ((0, 1, 2), 1)])
def test_products_counted(frozen, products):
    """Three GEMMs, two with a frozen head, one without gradients."""
    tensors = [*problem(ignored=0)]
    x, w, b = (t.detach().requires_grad_(i not in frozen) for i, t in enumerate(tensors[:3]))
    product = 2 * x.shape[0] * x.shape[1] * w.shape[0]

    def step():
        loss = linear_cross_entropy(x, w, tensors[3], linear_bias=b, backend="torch")
        if loss.requires_grad:
            loss.backward()

    assert flops(step) == products * product
    with torch.no_grad():
        assert flops(step) == product


@each_backend
def test_upstream_scale_of_a_mean(backend):
    """What DistributedDataParallel and loss scalers do to the gradient is honoured."""
    x, w, b, y = problem()
    plain = torch.autograd.grad(linear_cross_entropy(x, w, y, linear_bias=b, backend=backend), (x, w, b))
    scaled = torch.autograd.grad(linear_cross_entropy(x, w, y, linear_bias=b, backend=backend) * -7.0, (x, w, b))
    for a, e in zip(scaled, plain, strict=True):
        torch.testing.assert_close(a, -7 * e)


# -- statistics, module, errors ---------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_stats(backend, reduction):
    x, w, b, y = problem()
    loss, stats = linear_cross_entropy(
        x, w, y, linear_bias=b, label_smoothing=0.1, reduction=reduction, return_stats=True, backend=backend)
    z = F.linear(x, w, b).detach()
    valid = y != -100
    torch.testing.assert_close(stats.nll, F.cross_entropy(z, y, reduction="none"))
    torch.testing.assert_close(stats.lse, torch.where(valid, z.logsumexp(-1), 0))
    assert stats.denominator == valid.sum()
    assert not (stats.nll.requires_grad or stats.lse.requires_grad)
    torch.autograd.grad(loss.sum(), (x, w, b))


def test_module_holds_options():
    x, w, b, y = problem()
    loss = LinearCrossEntropyLoss(softcap=2.0, reduction="sum")
    assert torch.equal(loss(x, w, y, b), linear_cross_entropy(x, w, y, linear_bias=b, softcap=2.0, reduction="sum"))
    assert "softcap=2.0" in repr(loss)
    with pytest.raises(TypeError, match="soft_cap"):
        LinearCrossEntropyLoss(soft_cap=2.0)


@pytest.mark.parametrize("label", [601, -1, 10**12])
@pytest.mark.parametrize("kind", ["hard", "sparse"])
def test_a_label_outside_the_vocabulary_is_named(label, kind):
    x, w, b, y = problem(ignored=0)
    y[5] = label
    target = y if kind == "hard" else SparseTarget(y.unsqueeze(-1), torch.ones(len(y), 1))
    with pytest.raises(IndexError, match=rf"expected labels in \[0, 601\) or ignore_index, got {label}"):
        linear_cross_entropy(x, w, target, linear_bias=b)


@pytest.mark.parametrize(("change", "error_type", "message"), [
    ({"reduction": "avg"}, ValueError, "reduction: expected 'none', 'mean' or 'sum', got 'avg'"),
    ({"tail": "drop"}, ValueError, "tail: expected"),
    ({"tail": "bucket"}, ValueError, "tail: expected 'none' with hard labels"),
    ({"temperature": 0.0}, ValueError, "temperature: expected a finite number above 0, got 0.0"),
    ({"logit_scale": -1.0}, ValueError, "logit_scale: expected a finite number above 0, got -1.0"),
    ({"z_loss": float("nan")}, ValueError, "z_loss: expected a finite number, at least 0, got nan"),
    ({"softcap": -1.0}, ValueError, "softcap: expected"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing: expected a number in"),
    ({"linear_weight": torch.zeros(601, 31)}, ValueError,
     r"linear_weight: expected \(V, 32\), got float32 \(601, 31\)"),
    ({"linear_weight": torch.zeros(601, 32).double()}, ValueError, "linear_weight: expected torch.float32 like input"),
    ({"target": torch.zeros(TOKENS - 1, dtype=torch.int64)}, ValueError, rf"target: expected \({TOKENS},\) like input"),
    ({"target": torch.zeros(TOKENS)}, ValueError, "target: expected integer labels"),
    ({"target": torch.zeros(TOKENS, 600)}, ValueError,
     rf"target: expected \({TOKENS},\) like input without D, got \({TOKENS}, 600"),
    ({"target": [1, 2]}, TypeError, "target: expected a tensor or a SparseTarget, got list"),
    ({"linear_bias": torch.zeros(600)}, ValueError, r"linear_bias: expected floating point \(601,\)"),
    ({"weight": torch.zeros(601, requires_grad=True)}, ValueError, "weight: expected a constant"),
    ({"token_weight": torch.zeros(TOKENS - 1)}, ValueError, "token_weight: expected"),
    ({"backend": "cuda-graphs"}, UsageError, "backend: expected 'auto' or one of"),
    ({"input": torch.zeros(TOKENS, 32).double(), "linear_weight": torch.zeros(601, 32).double(), "backend": "cpu"},
     UsageError, "it serves float32, bfloat16, float16, not float64"),
    ({"grad_filter": 1.0}, ValueError, r"grad_filter: expected a number in \[0, 1\), got 1.0"),
    ({"grad_filter_weight": float("nan")}, ValueError, r"grad_filter_weight: expected a number in \[0, 1\), got nan"),
    ({"vocab_order": torch.arange(600)}, ValueError, r"vocab_order: expected int64 \(601,\), a permutation"),
    ({"vocab_order": torch.arange(601).clamp(max=599)}, ValueError, "vocab_order: expected a permutation"),
    ({"vocab_order": torch.arange(1, 602)}, ValueError, "vocab_order: expected a permutation"),
])
def test_errors_name_argument_expected_and_given(change, error_type, message):
    x, w, b, y = problem(ignored=0)
    arguments = {"input": x, "linear_weight": w, "target": y, "linear_bias": b, **change}
    with pytest.raises(error_type, match=message):
        linear_cross_entropy(arguments.pop("input"), arguments.pop("linear_weight"), arguments.pop("target"),
                             **arguments)


def test_a_named_backend_serves_or_raises():
    x, w, b, y = problem(dtype=torch.float64)
    with pytest.raises(UsageError, match=r"'cpu' cannot serve this call: it serves .*float16, not float64"):
        linear_cross_entropy(x, w, y, linear_bias=b, backend="cpu")
    linear_cross_entropy(x, w, y, linear_bias=b)        # "auto" finds one that can
    with pytest.raises(UsageError, match="'reference' cannot serve this call: process_group: not in this backend yet"):
        backends.choose("linear_cross_entropy", x.device, x.dtype, "reference", ["process_group"])


def test_auto_says_why_it_fell_back(monkeypatch, caplog):
    monkeypatch.setattr(native, "missing", lambda: "no compiler was there")
    monkeypatch.setattr(backends, "_logged", set())
    x, w, b, y = problem()
    with caplog.at_level("DEBUG", logger="ssd_core"):
        linear_cross_entropy(x, w, y, linear_bias=b)
        linear_cross_entropy(x, w, y, linear_bias=b)
    assert caplog.text.count("no compiler was there") == 1
