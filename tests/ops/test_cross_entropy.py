"""``cross_entropy`` beyond test_every_op.py: a superset of PyTorch's, of logits that are there."""

import pytest
import torch
import torch.nn.functional as F
from suite import OPS, TOKENS, check_op, each_backend, each_case, gradients, hard, on_logits, pool, sparse, upstream_of

from ssd_core import SparseTarget, cross_entropy, linear_cross_entropy
from ssd_core.ops.linear_cross_entropy import LossStats

pytestmark = pytest.mark.usefixtures("poisoned")

OP = OPS["cross_entropy-hard"]
each_dense_backend = each_backend(OP.name, "class probabilities")
each_backend, each_case = each_backend(OP.name), each_case(OP.name)
RANDOM = torch.Generator().manual_seed(0)
WEIGHT = torch.rand(601, generator=RANDOM) + 0.1


def same(loss, true, z):
    torch.testing.assert_close(loss, true)
    torch.testing.assert_close(*gradients(loss.sum(), [z]), *gradients(true.sum(), [z]))


@each_case
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("tail", "total"), [
    ("none", 1.0), ("none", 0.6), ("renormalise", 0.6), ("bucket", 0.6), ("bucket", 1.0)])
def test_sparse_targets(backend, dtype, reduction, tail, total):
    upstream = upstream_of(OP, TOKENS, 601) if reduction == "none" else -1.5
    check_op(OP, backend, dtype, on_logits(sparse(dtype, total=total)), reduction=reduction, tail=tail,
             upstream=upstream, seeds=pool(dtype))


@each_case
@pytest.mark.parametrize("options", [
    {"label_smoothing": 0.1}, {"temperature": 1.7}, {"logit_scale": 0.4}, {"softcap": 2.0}, {"z_loss": 0.01},
    {"softcap": 3.0, "logit_scale": 1.5, "temperature": 0.7, "z_loss": 1e-3, "label_smoothing": 0.2},
], ids=lambda options: "-".join(options))
@pytest.mark.parametrize("kind", [hard, sparse])
def test_options(backend, dtype, options, kind):
    check_op(OP, backend, dtype, on_logits(kind(dtype)), seeds=pool(dtype), **options)


@each_case
@pytest.mark.parametrize(("smoothing", "reduction"), [(0.0, "mean"), (0.2, "mean"), (0.2, "none")])
def test_class_weights(backend, dtype, smoothing, reduction):
    check_op(OP, backend, dtype, on_logits(hard(dtype)), weight=WEIGHT, label_smoothing=smoothing, reduction=reduction,
             seeds=pool(dtype))


each_option = pytest.mark.parametrize("options", [
    {}, {"weight": WEIGHT}, {"label_smoothing": 0.2}, {"weight": WEIGHT, "label_smoothing": 0.2}],
    ids=lambda options: "-".join(options))


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@each_option
def test_it_is_pytorchs(backend, reduction, options):
    z, y = on_logits(hard())(0)
    same(cross_entropy(z, y, reduction=reduction, backend=backend, **options),
         F.cross_entropy(z, y, reduction=reduction, **options), z)


@each_dense_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@each_option
def test_class_probabilities_are_pytorchs(backend, reduction, options):
    z, _ = on_logits(hard(ignored=0))(0)
    dense = F.softmax(torch.randn(TOKENS, 601, generator=RANDOM), -1)
    same(cross_entropy(z, dense, reduction=reduction, backend=backend, **options),
         F.cross_entropy(z, dense, reduction=reduction, **options), z)


@each_backend
@pytest.mark.parametrize("ignore_index", [7, None, -1, 10**9])
def test_any_ignore_index(backend, ignore_index):
    z, y = on_logits(hard(ignored=0))(0)
    y[::3] = -100 if ignore_index is None else ignore_index
    same(cross_entropy(z, y, ignore_index=ignore_index, backend=backend),
         F.cross_entropy(z, y, ignore_index=-100 if ignore_index is None else ignore_index), z)


@each_backend
def test_infinite_logits_of_the_target(backend):
    """-inf of the target makes the loss +inf, and that of a row of -inf alone NaN, as in PyTorch."""
    z, y = on_logits(hard(v=30, ignored=0))(0)
    z.data[2, y[2]] = -torch.inf
    z.data[5] = -torch.inf
    loss, true = cross_entropy(z, y, reduction="none", backend=backend), F.cross_entropy(z, y, reduction="none")
    torch.testing.assert_close(loss, true, equal_nan=True)
    assert loss[2] == torch.inf and loss[5].isnan() and loss.isfinite().sum() == TOKENS - 2


@each_backend
def test_importance_weights_may_repeat_ids_and_not_sum_to_one(backend):
    """Random-sampling distillation: m draws of weight 1 / m are the sum of m hard losses."""
    z, _ = on_logits(hard())(0)
    ids = torch.randint(601, (TOKENS, 4), generator=RANDOM, dtype=torch.int32)
    ids[:, 1] = ids[:, 0]
    each = [cross_entropy(z, ids[:, k], backend=backend) for k in range(4)]
    same(cross_entropy(z, SparseTarget(ids, torch.full(ids.shape, 0.75)), backend=backend), 0.75 * sum(each), z)


@each_dense_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["hard", "sparse", "dense"])
def test_shift_predicts_the_next_token(backend, reduction, kind):
    z, y = on_logits((sparse if kind == "sparse" else hard)(n=24))(0)
    z, token_weight = z.detach().view(2, 12, -1).requires_grad_(), torch.rand(2, 12, generator=RANDOM)
    if kind == "sparse":
        y = SparseTarget(y.ids.view(2, 12, -1), y.probs.view(2, 12, -1))
    else:
        y = y.view(2, 12) if kind == "hard" else torch.randn(2, 12, 601, generator=RANDOM).softmax(-1)
    loss = cross_entropy(z, y, token_weight=token_weight, shift=True, reduction=reduction, backend=backend)
    by_hand = cross_entropy(
        z[:, :-1], y[:, 1:], token_weight=token_weight[:, 1:], reduction=reduction, backend=backend)
    assert loss.shape == by_hand.shape == ((2, 11) if reduction == "none" else ())
    same(loss, by_hand, z)


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_stats(backend, reduction):
    z, y = on_logits(hard())(0)
    loss, stats = cross_entropy(
        z, y, weight=WEIGHT, label_smoothing=0.1, reduction=reduction, return_stats=True, backend=backend)
    assert isinstance(stats, LossStats) and not any(t.requires_grad for t in stats)
    torch.testing.assert_close(stats.nll, F.cross_entropy(z, y, reduction="none"))
    torch.testing.assert_close(stats.lse, torch.where(y != -100, z.detach().logsumexp(-1), 0))
    torch.testing.assert_close(stats.denominator, WEIGHT[y[y != -100]].sum())
    assert (stats.skipped_max, stats.skipped_mean, stats.active) == (0, 0, 1)
    torch.testing.assert_close(loss, F.cross_entropy(z, y, WEIGHT, label_smoothing=0.1, reduction=reduction))


@each_backend
@pytest.mark.parametrize("kind", [hard, sparse])
def test_it_is_linear_cross_entropy_of_a_head_that_does_nothing(backend, kind):
    z, target = on_logits(kind(v=40))(0)
    options = {"temperature": 2.0, "softcap": 5.0, "z_loss": 0.01, "logit_scale": 0.7, "backend": backend}
    same(cross_entropy(z, target, **options), linear_cross_entropy(z, torch.eye(40), target, **options), z)


@pytest.mark.parametrize(("change", "error_type", "message"), [
    ({"target": [1, 2]}, TypeError, "target: expected a tensor or a SparseTarget, got list"),
    ({"target": torch.zeros(TOKENS)}, ValueError, rf"target: expected integer labels, got float32 \({TOKENS},\)"),
    ({"target": torch.zeros(TOKENS, 600)}, ValueError,
     rf"target: expected \({TOKENS},\) like .*, got \({TOKENS}, 600\)"),
    ({"tail": "drop"}, ValueError, "tail: expected"),
    ({"tail": "bucket"}, ValueError, "tail: expected 'none' with hard labels and class probabilities, got 'bucket'"),
    ({"target": SparseTarget(torch.zeros(TOKENS, 2).int(), torch.tensor([[1.0, -0.5]]).repeat(TOKENS, 1))}, ValueError,
     "target.probs: expected weights of at least 0, got a negative one"),
    ({"target": SparseTarget(torch.zeros(TOKENS, 2).int(), torch.ones(TOKENS, 2)), "weight": WEIGHT}, ValueError,
     "weight: expected None with a SparseTarget, got class weights"),
    ({"target": torch.ones(TOKENS, 601), "ignore_index": 3}, ValueError,
     "ignore_index: expected None with class probabilities, got 3"),
    ({"target": torch.ones(TOKENS, 601, requires_grad=True)}, ValueError,
     "target: expected constant class probabilities"),
])
def test_errors_name_argument_expected_and_given(change, error_type, message):
    z, y = on_logits(hard())(0)
    with pytest.raises(error_type, match=message):
        cross_entropy(z, **{"target": y, **change})
