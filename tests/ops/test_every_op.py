"""What holds for every op on every backend: the table is in suite.py. What only one op has is in its own file."""

import threading

import pytest
import torch
from suite import (
    DEVICE_TYPE,
    DTYPES,
    INTERPRETED,
    OPS,
    TOKENS,
    VOCABULARIES,
    Taught,
    as_tuple,
    check_op,
    every,
    expected,
    gradients,
    planned,
    upstream_of,
)
from tolerances import FACTOR, LOSS, ROUNDING, error

from ssd_core import SparseTarget, TeacherHidden, TeacherLogits
from ssd_core.checks import UsageError

pytestmark = pytest.mark.usefixtures("poisoned")


def linear(op):
    return op.linear


def reduced(op):
    return op.reduced


def with_target(op):
    """Whose tokens can be ignored."""
    return "softmax" not in op.name


def each_token(op):
    """The options with which every token has a result of its own."""
    return {"reduction": "none"} if op.reduced else {}


def taken(target, index):
    """The target of some tokens."""
    if isinstance(target, Taught):
        return Taught(taken(target.teacher, index), taken(target.labels, index))
    if isinstance(target, TeacherLogits):
        return TeacherLogits(target.logits[index])
    if isinstance(target, TeacherHidden):
        return TeacherHidden(target.input[index], target.linear_weight, target.linear_bias)
    return None if target is None else target[index]


def rearranged(target, change):
    """The target with ``change`` made to the tensors that have an entry for each token."""
    if isinstance(target, Taught):
        return Taught(rearranged(target.teacher, change), rearranged(target.labels, change))
    if isinstance(target, SparseTarget):
        return SparseTarget(change(target.ids), change(target.probs))
    if isinstance(target, TeacherLogits):
        return TeacherLogits(change(target.logits))
    if isinstance(target, TeacherHidden):
        return TeacherHidden(change(target.input), target.linear_weight, target.linear_bias)
    return None if target is None else change(target)


def nothing(target):
    """The same with all tokens ignored."""
    if isinstance(target, Taught) and target.labels is not None:
        return target._replace(labels=nothing(target.labels))
    if isinstance(target, Taught):
        return target._replace(teacher=nothing(target.teacher))
    if isinstance(target, SparseTarget):
        return SparseTarget(target.ids, torch.zeros_like(target.probs))
    return torch.full_like(target, -100)


def counts(target):
    """Which tokens do."""
    if isinstance(target, Taught):
        found = counts(target.teacher) if isinstance(target.teacher, SparseTarget) else True
        return found if target.labels is None else found & counts(target.labels)
    return (target.probs > 0).any(-1) if isinstance(target, SparseTarget) else target != -100


def run(op, backend, problem, upstream=1.0, **options):
    """Results and gradients."""
    *leaves, target = problem
    results = as_tuple(op.call(*leaves, target, backend=backend, **options))
    return [r.detach() for r in results], gradients(results, leaves, upstream)


def same(found, true):
    for part, whole in zip(found, true, strict=True):
        for a, e in zip(part, whole, strict=True):
            torch.testing.assert_close(a, e)


# -- numbers ----------------------------------------------------------------------------------------------------------


@every(dtypes=DTYPES)
def test_results_and_gradients(op, backend, dtype):
    """Upstream gradients of every sign and size, one for each token; odd N."""
    check_op(op, backend, dtype, upstream=upstream_of(op, TOKENS, 601), **each_token(op))


@every(reduced, dtypes=DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(op, backend, dtype, reduction):
    check_op(op, backend, dtype, upstream=-2.0, reduction=reduction)


@every(linear, dtypes=DTYPES)
def test_without_bias(op, backend, dtype):
    check_op(op, backend, dtype, op.draw(dtype=dtype, bias=False))


@every()
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_vocabulary_sizes(op, backend, vocab):
    """Of one token and of five."""
    sizes, upstream = {"d": 8, "v": vocab, "ignored": 0}, upstream_of(op, 1, vocab) if "softmax" in op.name else -2.0
    check_op(op, backend, torch.float32, lambda seed: op.draw(n=(5, 1)[seed % 2], **sizes)(seed + 1),
             upstream=upstream, seeds=2 if vocab > 100 else 40)


@every(linear)
@pytest.mark.parametrize("sizes", [(15, 33, 65), (16, 16, 64), (17, 5, 127), (1, 1, 129)], ids=str)
def test_edges_of_tiles(op, backend, sizes):
    """Of tokens, hidden states and vocabulary: a kernel's smallest tiles are 16 x 16 x 64."""
    n, d, v = sizes
    check_op(op, backend, torch.float32, op.draw(n=n, d=d, v=v, ignored=0), upstream=upstream_of(op, n, v), seeds=3,
             **each_token(op))


@every(linear, dtypes=DTYPES)
@pytest.mark.parametrize("plan", [(7, 64, 601), (TOKENS, 601, 100), (11, 33, 97)], ids=str)
def test_any_chunks(op, backend, dtype, plan, monkeypatch):
    """Rows, columns of the vocabulary at a time, and both. 16-bit products of a part are rounded before they are added
    up: by a third of the half-ulp squared, and nothing else is lost."""
    once = torch.finfo(dtype).eps / 2 / 3**0.5 if dtype.itemsize == 2 else 0.0
    with planned(monkeypatch, op.name, *plan):
        check_op(op, backend, dtype, upstream=upstream_of(op, TOKENS, 601), extra=once, seeds=4, **each_token(op))
        if op.reduced:
            check_op(op, backend, dtype, upstream=-2.0, extra=once, seeds=4)


@every()
def test_any_blocks(op, backend, monkeypatch):
    """The rows that are worked on while they are in cache: a few, the last fewer."""
    monkeypatch.setattr("ssd_core.chunked.logits.block_elements", lambda device: 601 * 17)
    check_op(op, backend, torch.float32, upstream=upstream_of(op, TOKENS, 601), seeds=2, **each_token(op))


@every(linear)
def test_chunks_and_blocks_change_nothing_but_rounding(op, backend, monkeypatch):
    problem = op.draw()(0)
    true = run(op, backend, problem)
    for plan in ((5, 64, 601), (TOKENS, 601, 64), (9, 64, 64)):
        with planned(monkeypatch, op.name, *plan):
            results, grads = run(op, backend, problem)
        for found, whole in zip((*results, *grads), (*true[0], *true[1]), strict=True):
            assert error(found, whole) <= ROUNDING[torch.float32]


@every(linear)
def test_the_least_workspace_that_an_error_names_is_enough(op, backend):
    problem = op.draw(n=3, v=40)(1)
    with pytest.raises(ValueError, match=r"workspace_bytes: expected at least \d+ for \d+ logits, got 500") as caught:
        run(op, backend, problem, workspace_bytes=500)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    same(run(op, backend, problem, workspace_bytes=least), run(op, backend, problem))


@every(linear)
def test_a_small_workspace_means_tiles(op, backend, monkeypatch):
    """And the same results."""
    plans, module = [], f"ssd_core.ops.{op.name}.plan_chunks"
    from ssd_core.plan import plan_chunks

    def planning(*args):
        plans.append(plan_chunks(*args))
        return plans[-1]

    monkeypatch.setattr(module, planning)
    problem, small = op.draw(n=200, v=2500)(0), 5_900_000 if "distill" in op.name else 3_700_000
    if backend == "cpu":
        small = small * 2 // 5
    elif backend == "triton":           # which has no buffers of a row pass
        small //= 4
    true, found = (run(op, backend, problem, workspace_bytes=budget) for budget in (None, small))
    assert plans[0].rows >= counts(problem[-1]).sum() and plans[0].tile == 2500
    assert plans[-1].rows < counts(problem[-1]).sum() or plans[-1].tile < 2500
    same(found, true)


@every(lambda op: not op.linear)
@pytest.mark.parametrize("offset", [1e3, -1e3])
def test_a_common_offset_costs_no_digits(op, backend, offset):
    """Logits are multiples of 1/8, exact in float32 with the offset added; so are a teacher's, which has another."""
    z, target = op.draw(v=65, ignored=0)(1)
    z = (z.detach() * 8).round() / 8
    true = target
    if isinstance(target, Taught) and isinstance(target.teacher, TeacherLogits):
        teacher = (target.teacher.logits * 8).round() / 8
        target = target._replace(teacher=TeacherLogits(teacher - offset))
        true = target._replace(teacher=TeacherLogits(teacher))
    upstream = upstream_of(op, TOKENS, 65)
    found = run(op, backend, ((z + offset).requires_grad_(), target), upstream, **each_token(op))
    leaf = z.double().requires_grad_()
    results = as_tuple(op.define(leaf, true, **each_token(op)))
    for a, e in zip((*found[0], *found[1]), (*results, *gradients(results, [leaf], upstream)), strict=True):
        assert error(a, e) < 1e-6


@every(with_target)
def test_nan_reaches_its_own_token_only(op, backend):
    """In loss and gradient of the hidden state or logits; a weight's gradient is NaN, as it adds up all tokens."""
    leaf, *rest = op.draw(ignored=0)(1)
    bad = torch.arange(len(leaf)) == 4
    dirty = leaf.detach().masked_fill(bad.unsqueeze(-1), torch.nan).requires_grad_()
    results, (grad, *_) = run(op, backend, (dirty, *rest), **each_token(op))
    assert all(r[4].isnan() and r[~bad].isfinite().all() for r in results)
    assert grad[4].isnan().all() and grad[~bad].isfinite().all()
    true_results, (true, *_) = run(op, backend, (leaf, *rest), **each_token(op))
    same(([r[~bad] for r in results], [grad[~bad]]), ([r[~bad] for r in true_results], [true[~bad]]))


@every(lambda op: not op.linear)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_logit_that_is_no_number(op, backend, bad):
    """NaN or +inf among a token's logits makes it NaN, as in PyTorch, and no other token."""
    z, target = op.draw(v=12, ignored=0)(1)
    z.data[4, 7] = bad
    results, _ = run(op, backend, (z, target), **each_token(op))
    fine = torch.arange(len(z)) != 4
    for result in results:
        assert result[4].isnan().all() and result[fine].isfinite().all()


@every(lambda op: not op.linear)
def test_excluded_logits_have_probability_zero(op, backend):
    """-inf at ids that no target names: results and gradients as the definition has them, 0 there, never NaN."""
    z, target = op.draw(v=30, ignored=0)(1)
    spared = torch.zeros(z.shape, dtype=torch.bool)
    spared[:, 3:9] = True
    for part in target if isinstance(target, Taught) else (target,):
        if isinstance(part, SparseTarget):
            spared.scatter_(1, part.ids.long(), False)
        elif isinstance(part, torch.Tensor):
            spared.scatter_(1, part.unsqueeze(-1), False)
    if isinstance(target, Taught) and isinstance(target.teacher, TeacherLogits):
        target = target._replace(teacher=TeacherLogits(target.teacher.logits.masked_fill(spared, -torch.inf)))
    z = z.detach().masked_fill(spared, -torch.inf).requires_grad_()
    results, (grad,) = run(op, backend, (z, target), upstream_of(op, TOKENS, 30), **each_token(op))
    leaf = z.detach().double().requires_grad_()
    true = as_tuple(op.define(leaf, target, **each_token(op)))
    finite = [t.isfinite() for t in true]
    for result, t, where in zip(results, true, finite, strict=True):
        assert torch.equal(result.isfinite(), where) and error(result[where], t[where]) < 1e-6
    if op.name != "log_softmax":
        assert all(where.all() for where in finite) and (grad[spared] == 0).all() and grad.isfinite().all()


# -- shapes -----------------------------------------------------------------------------------------------------------


@every()
def test_no_tokens_at_all(op, backend):
    *leaves, target = op.draw(n=0)(0)
    results, grads = run(op, backend, (*leaves, target), **each_token(op))
    assert all(len(r) == 0 for r in results) and all((g == 0).all() for g in grads)
    if op.reduced:
        for reduction in ("mean", "sum"):
            results, grads = run(op, backend, (*leaves, target), reduction=reduction)
            assert results[0] == 0 and all((g == 0).all() for g in grads)


@every()
def test_unbatched_and_many_dimensions(op, backend):
    leaf, *rest, target = op.draw(n=24, ignored=0)(1)
    flat = as_tuple(op.call(leaf, *rest, target, backend=backend, **each_token(op)))

    def cube(tensor):
        return tensor.view(2, 3, 4, *tensor.shape[1:])

    cubes = as_tuple(op.call(cube(leaf), *rest, rearranged(target, cube), backend=backend, **each_token(op)))
    ones = as_tuple(op.call(leaf[5], *rest, taken(target, 5), backend=backend, **each_token(op)))
    for one, three, whole in zip(ones, cubes, flat, strict=True):
        assert three.shape == (2, 3, 4, *whole.shape[1:])
        torch.testing.assert_close(three.flatten(0, 2), whole)
        torch.testing.assert_close(one, whole[5])


@every()
def test_strided_inputs(op, backend):
    def strided(tensor):
        wide = torch.full((*tensor.shape, 2), -1, dtype=tensor.dtype)
        wide[..., 1] = tensor.detach()
        return wide[..., 1]

    def transposed(tensor):
        return tensor.detach().t().contiguous().t()

    *leaves, target = op.draw(n=20, d=16)(0)
    true = run(op, backend, (*leaves, target))
    for change in (strided, transposed):
        views = [(change if t.ndim == 2 else strided)(t).requires_grad_() for t in leaves]
        other = rearranged(target, lambda t, change=change: (change if t.ndim == 2 else strided)(t))
        assert not any(view.is_contiguous() for view in views)
        same(run(op, backend, (*views, other)), true)


# -- what counts ------------------------------------------------------------------------------------------------------


@every(with_target, dtypes=DTYPES)
def test_all_ignored_is_zero_not_nan(op, backend, dtype):
    """A masked micro-batch must not end a run."""
    *leaves, target = op.draw(dtype=dtype)(0)
    for options in [{"reduction": r} for r in ("mean", "sum", "none")] if op.reduced else [{}]:
        results, grads = run(op, backend, (*leaves, nothing(target)), **options)
        assert all((t == 0).all() for t in (*results, *grads))


@every(reduced)
def test_weights_of_zero_are_zero_not_nan(op, backend):
    *leaves, target = op.draw()(0)
    results, grads = run(op, backend, (*leaves, target), token_weight=torch.zeros(TOKENS))
    assert all((t == 0).all() for t in (*results, *grads))


@every(with_target)
def test_ignored_tokens_meet_no_product(op, backend):
    """NaN at ignored positions (padding), of the teacher too, reaches neither results nor gradients."""
    leaf, *rest, target = op.draw()(0)
    ignored = ~counts(target)
    assert ignored.any()

    def dirty(tensor):
        wide = ignored.view(-1, *[1] * (tensor.ndim - 1))
        return tensor.detach().masked_fill(wide, torch.nan) if tensor.is_floating_point() else tensor

    if isinstance(target, Taught) and not isinstance(target.teacher, SparseTarget):
        other = rearranged(target, dirty)
    else:
        other = target
    true = run(op, backend, (leaf, *rest, target), **each_token(op))
    found = run(op, backend, (dirty(leaf).requires_grad_(), *rest, other), **each_token(op))
    for a, e in zip((*found[0], *found[1]), (*true[0], *true[1]), strict=True):
        assert torch.equal(a, e)
    assert (found[1][0][ignored] == 0).all()


@every(reduced, dtypes=DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_token_weights(op, backend, dtype, reduction):
    check_op(op, backend, dtype, token_weight=torch.rand(TOKENS, generator=torch.Generator().manual_seed(0)) * 2,
             reduction=reduction, seeds=4)


@every(reduced)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_num_items_in_batch_makes_accumulation_exact(op, backend, as_tensor):
    """Micro-batches of different sizes add up to the mean over all tokens."""
    leaf, *rest, target = op.draw(n=40)(0)
    (whole,), true = run(op, backend, (leaf, *rest, target))
    count = counts(target).sum()
    count = count if as_tensor else count.item()
    parts = [run(op, backend, (leaf.detach()[part].requires_grad_(), *rest, taken(target, part)),
                 num_items_in_batch=count) for part in (slice(0, 3), slice(3, 29), slice(29, 40))]
    torch.testing.assert_close(sum(loss for (loss,), _ in parts), whole)
    torch.testing.assert_close(torch.cat([grads[0] for _, grads in parts]), true[0])
    for place in range(1, len(true)):
        torch.testing.assert_close(sum(grads[place] for _, grads in parts), true[place])


@every(lambda op: op.reduced and op.linear, dtypes=[torch.float16])
def test_float16_gradients_of_a_mean_do_not_underflow(op, backend, dtype):
    """With 2^17 items a probability of 1e-3 is 7e-9 in the mean's gradient: below float16, not after loss scaling."""
    *leaves, target = op.draw(n=16, dtype=torch.float16)(1)
    loss = op.call(*leaves, target, num_items_in_batch=2**17, backend=backend)
    grads = gradients(loss * 2.0**16, leaves)
    true_leaves = [t.detach().double().requires_grad_() for t in leaves]
    true = gradients(op.define(*true_leaves, target, reduction="sum"), true_leaves)
    for grad, reference in zip(grads, true, strict=True):
        assert error(grad.double() * 2, reference) < 2e-3


# -- autograd ---------------------------------------------------------------------------------------------------------


def modes(op):
    return [{"reduction": "mean"}, {"reduction": "none"}] if op.reduced else [{}]


@every()
def test_two_backwards_through_one_graph(op, backend):
    """Gradients saved in the forward are scaled in place only when nobody comes back for them."""
    *leaves, target = op.draw()(0)
    for options in modes(op):
        total = sum(r.sum() for r in as_tuple(op.call(*leaves, target, backend=backend, **options)))
        if "softmax" in op.name:        # the sum of a softmax is constant
            total = (op.call(*leaves, target, backend=backend) * upstream_of(op, TOKENS, 601)).sum()
        first = gradients(total, leaves, 3.0, retain_graph=True)
        first = [g.clone() for g in first]
        second = gradients(total, leaves, -2.0)
        for a, e in zip(second, first, strict=True):
            assert e.any()
            torch.testing.assert_close(a, -2 / 3 * e)


@every()
def test_gradients_of_a_retained_graph_are_the_callers_own(op, backend):
    *leaves, target = op.draw()(0)
    for options in modes(op):
        results = as_tuple(op.call(*leaves, target, backend=backend, **options))
        first = gradients(results, leaves, retain_graph=True)
        kept = [grad.clone() for grad in first]
        for grad in first:
            grad.zero_()
        assert all(torch.equal(a, e) for a, e in zip(gradients(results, leaves), kept, strict=True))


@every(linear)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_partial_requires_grad(op, backend, wanted):
    *leaves, target = op.draw()(0)
    for options in modes(op):
        _, true = run(op, backend, (*leaves, target), **options)
        some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(leaves)]
        results = as_tuple(op.call(*some, target, backend=backend, **options))
        for i, grad in zip(wanted, gradients(results, [some[i] for i in wanted]), strict=True):
            assert torch.equal(grad, true[i])


@every()
def test_without_gradients(op, backend):
    """Constants in, constants out; under no_grad too."""
    *leaves, target = op.draw()(0)
    true, _ = run(op, backend, (*leaves, target))
    with torch.no_grad():
        found = as_tuple(op.call(*leaves, target, backend=backend))
    constants = as_tuple(op.call(*(t.detach() for t in leaves), target, backend=backend))
    for a, b, e in zip(found, constants, true, strict=True):
        assert not (a.requires_grad or b.requires_grad)
        assert torch.equal(a, e) and torch.equal(b, e)


@every()
def test_create_graph_is_refused(op, backend):
    *leaves, target = op.draw()(0)
    for options in modes(op):
        results = as_tuple(op.call(*leaves, target, backend=backend, **options))
        name = "softmax" if "softmax" in op.name else op.name
        with pytest.raises(RuntimeError, match=rf"^{name}: create_graph=True is not supported"):
            torch.autograd.grad(results[0].sum(), leaves, create_graph=True)


@every(linear)
def test_autocast(op, backend):
    """Products are taken in autocast's dtype and gradients come in the tensors' own: no worse than 16-bit tensors."""
    *leaves, target = op.draw()(0)
    for options in modes(op):
        with torch.autocast(DEVICE_TYPE, torch.bfloat16):
            results = as_tuple(op.call(*leaves, target, backend=backend, **options))
        grads = gradients(results, leaves)
        assert all(r.dtype == torch.float32 for r in results) and all(g.dtype == torch.float32 for g in grads)
        half = [t.detach().bfloat16().requires_grad_() for t in leaves]
        by_hand = as_tuple(op.call(*half, target, backend=backend, **options))
        true_results, true = expected(op.define, leaves, target, **options)
        for result, hand, t in zip(results, by_hand, true_results, strict=True):
            assert error(result.detach(), t) <= error(hand.detach(), t) + LOSS[torch.bfloat16]
        for grad, hand, t in zip(grads, gradients(by_hand, half), true, strict=True):
            assert error(grad, t) <= FACTOR * error(hand, t)


@every()
def test_inputs_stay_as_they_are(op, backend):
    *leaves, target = op.draw()(0)
    kept = []
    rearranged(target, lambda t: kept.append((t, t.clone())) or t)
    kept += [(t, t.detach().clone()) for t in leaves]
    run(op, backend, (*leaves, target))
    assert all(torch.equal(now, before) for now, before in kept)


@every()
def test_threads_may_call_at_once(op, backend):
    if backend == "triton" and INTERPRETED:
        pytest.skip("Triton's interpreter serves one thread at a time")
    problems = [op.draw(n=33)(seed) for seed in range(3)]
    true = [run(op, backend, problem) for problem in problems]
    found = [None] * 3

    def work(i):
        for _ in range(4):
            found[i] = run(op, backend, problems[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, whole in zip(found, true, strict=True):
        assert all(torch.equal(a, e) for a, e in zip((*ours[0], *ours[1]), (*whole[0], *whole[1]), strict=True))


# -- errors -----------------------------------------------------------------------------------------------------------


@every(with_target)
@pytest.mark.parametrize("id_", [601, -1, 10**9])
def test_an_id_outside_the_vocabulary_is_named(op, backend, id_):
    *leaves, target = op.draw(ignored=0)(1)
    name = "target"
    if isinstance(target, Taught) and isinstance(target.teacher, SparseTarget):
        target.teacher.ids[5, 1], name = id_, "teacher.ids"
    elif isinstance(target, SparseTarget):
        target.ids[5, 1], name = id_, "target.ids"
    else:
        (target.labels if isinstance(target, Taught) else target)[5] = id_
    if DEVICE_TYPE != "cpu":        # to see it there would take a synchronisation
        assert any(result.isnan().any() for result in as_tuple(op.call(*leaves, target, backend=backend)))
        return
    with pytest.raises(IndexError, match=rf"{name}: expected labels in \[0, 601\) or ignore_index, got {id_}"):
        op.call(*leaves, target, backend=backend)


@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_a_backend_that_does_not_exist_is_named(op):
    *leaves, target = op.draw()(0)
    with pytest.raises(UsageError, match=rf"backend: expected 'auto' or one of \[.*'torch'.*\] for {op.name}, got 'x'"):
        op.call(*leaves, target, backend="x")


@pytest.mark.parametrize("op", [op for op in OPS.values() if with_target(op)], ids=str)
@pytest.mark.parametrize(("change", "message"), [
    ({"temperature": 0.0}, "temperature: expected a finite number above 0, got 0.0"),
    ({"temperature": float("inf")}, "temperature: expected a finite number above 0, got inf"),
    ({"logit_scale": -1.0}, "logit_scale: expected a finite number above 0, got -1.0"),
    ({"softcap": float("nan")}, "softcap: expected a finite number above 0, got nan"),
])
def test_errors_of_shared_options(op, change, message):
    *leaves, target = op.draw()(0)
    with pytest.raises(ValueError, match=message):
        op.call(*leaves, target, **change)


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.reduced], ids=str)
@pytest.mark.parametrize(("change", "message"), [
    ({"reduction": "avg"}, "reduction: expected 'none', 'mean' or 'sum', got 'avg'"),
    ({"z_loss": float("nan")}, "z_loss: expected a finite number, at least 0, got nan"),
    ({"z_loss": -0.1}, "z_loss: expected a finite number, at least 0, got -0.1"),
    ({"label_smoothing": 1.5}, r"label_smoothing: expected a number in \[0, 1\], got 1.5"),
    ({"token_weight": torch.zeros(TOKENS - 1)},
     rf"token_weight: expected floating point \({TOKENS},\), got float32 \({TOKENS - 1},\)"),
    ({"token_weight": torch.ones(TOKENS, requires_grad=True)}, "token_weight: expected a constant"),
    ({"num_items_in_batch": torch.ones(2)}, r"num_items_in_batch: expected a number or 0-d tensor, got .*2"),
    ({"weight": torch.zeros(600)}, r"weight: expected floating point \(601,\), got float32 \(600,\)"),
    ({"weight": torch.zeros(601, requires_grad=True)}, "weight: expected a constant"),
])
def test_errors_of_shared_options_of_losses(op, change, message):
    *leaves, target = op.draw()(0)
    with pytest.raises(ValueError, match=message):
        op.call(*leaves, target, **change)


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.linear], ids=str)
@pytest.mark.parametrize(("place", "wrong", "message"), [
    (0, torch.zeros(TOKENS, 31), r"linear_weight: expected \(V, 31\), got float32 \(601, 32\)"),
    (0, torch.zeros(TOKENS, 32).long(),
     rf"input: expected floating point \(..., D\) with D > 0, got int64 \({TOKENS}, 32\)"),
    (0, torch.tensor(1.0), r"input: expected floating point \(..., D\) with D > 0, got float32 \(\)"),
    (1, torch.zeros(601, 31), r"linear_weight: expected \(V, 32\), got float32 \(601, 31\)"),
    (1, torch.zeros(601, 32).double(), "linear_weight: expected torch.float32 like input, got torch.float64"),
    (2, torch.zeros(600), r"linear_bias: expected floating point \(601,\), got float32 \(600,\)"),
])
def test_errors_of_heads(op, place, wrong, message):
    leaves = [*op.draw()(0)]
    leaves[place] = wrong
    with pytest.raises(ValueError, match=message):
        op.call(*leaves)


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.linear], ids=str)
@pytest.mark.parametrize(("change", "error_type", "message"), [
    ({"process_group": "world"}, ValueError, "process_group: expected a torch.distributed process group, got str"),
    ({"vocab_start": 5}, ValueError, "vocab_start: expected 0 without a process group, got 5"),
    ({"vocab_start": -1}, ValueError, "vocab_start: expected at least 0, got -1"),
])
def test_errors_of_groups(op, change, error_type, message):
    with pytest.raises(error_type, match=message):
        op.call(*op.draw()(0), **change)


@pytest.mark.parametrize("op", [op for op in OPS.values() if not op.linear], ids=str)
@pytest.mark.parametrize("wrong", [torch.zeros(TOKENS, 601).long(), torch.tensor(1.0), torch.zeros(TOKENS, 0)])
def test_errors_of_logits(op, wrong):
    _, target = op.draw()(0)
    with pytest.raises(ValueError, match=r"logits: expected floating point \(..., V\) with V > 0, got "):
        op.call(wrong, target)
    with pytest.raises(TypeError, match="logits: expected a tensor, got list"):
        op.call([1.0], target)


@pytest.mark.parametrize("op", [op for op in OPS.values() if with_target(op)], ids=str)
def test_targets_of_another_shape_are_named(op):
    *leaves, target = op.draw()(0)
    name = "teacher" if isinstance(target, Taught) else "target"
    with pytest.raises(ValueError, match=rf"{name}: expected \({TOKENS},\) like .*, got \({TOKENS - 1},\)"):
        op.call(*leaves, taken(target, slice(TOKENS - 1)))
