"""What callers do with gradients: checkpointing, scaling, hooks on saved tensors, autocast, threads."""

import threading

import pytest
import torch
from suite import DEVICE_TYPE, DTYPES, INTERPRETED, OPS, each_backend, every, gradients, hard, problem, soft, taught
from tolerances import error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ssd_core import TeacherHidden, TeacherLogits, linear_cross_entropy, linear_distill, linear_logprob
from ssd_core.chunked.linear_cross_entropy import linear_cross_entropy as chunked
from ssd_core.plan import ChunkPlan

pytestmark = pytest.mark.usefixtures("poisoned")

LINEAR = [op for op in OPS.values() if op.linear]


def total(op, leaves, target, backend="torch", **options):
    """One number of all that an op gives, each part weighed by place."""
    results = op.call(*leaves, target, backend=backend, **options)
    results = (results,) if isinstance(results, torch.Tensor) else results
    return sum((result * torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view(result.shape)).sum()
               for result in results)


# -- checkpointing and hooks ------------------------------------------------------------------------------------------


@every()
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(op, backend, reentrant):
    """The forward is run again in the backward: same gradients, bit for bit, of what came before it, too."""
    *leaves, target = op.draw(n=23, v=301)(0)
    options = {"reduction": "none"} if op.reduced else {}

    def step(first, *others):
        return total(op, (torch.tanh(first) * 2, *others), target, backend, **options)

    true = gradients(step(*leaves), leaves)
    found = gradients_by_backward(lambda: checkpoint(step, *leaves, use_reentrant=reentrant), leaves)
    assert all(torch.equal(a, e) for a, e in zip(found, true, strict=True))


def gradients_by_backward(function, leaves):
    """Reentrant checkpointing serves ``backward`` only."""
    for leaf in leaves:
        leaf.grad = None
    function().backward()
    return [leaf.grad for leaf in leaves]


@every(lambda op: op.reduced)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hooks_on_saved_tensors(op, backend, reduction):
    """Packed on the way in and unpacked on the way out, as offloading does; a mean saves gradients only."""
    *leaves, target = op.draw(n=23, v=301)(0)
    true = gradients(total(op, leaves, target, backend, reduction=reduction), leaves)
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.numpy(force=True).copy(), tensor.requires_grad

    def unpack(saved):
        return torch.from_numpy(saved[0])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = total(op, leaves, target, backend, reduction=reduction)
    found = gradients(loss, leaves)
    assert packed and all(torch.equal(a, e) for a, e in zip(found, true, strict=True))


def test_saved_tensors_on_disk(tmp_path):
    """The hooks that PyTorch itself has: to the CPU and back."""
    x, w, b, y = problem()
    true = gradients(linear_cross_entropy(x, w, y, linear_bias=b), (x, w, b))
    with torch.autograd.graph.save_on_cpu():
        loss = linear_cross_entropy(x, w, y, linear_bias=b)
    assert all(torch.equal(a, e) for a, e in zip(gradients(loss, (x, w, b)), true, strict=True))


@every(lambda op: op.linear)
def test_inputs_changed_after_the_forward_are_noticed(op, backend):
    """What the backward needs again must not have changed: PyTorch says so rather than giving wrong gradients."""
    *leaves, target = op.draw(n=9, v=50)(0)
    options = {"reduction": "none"} if op.reduced else {}
    loss = total(op, leaves, target, backend, **options)
    with torch.no_grad():
        leaves[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(loss, leaves)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_create_graph_says_what_is_not_supported(reduction):
    """Also through what follows the loss: it never gives second derivatives that are wrong."""
    x, w, b, y = problem()
    loss = linear_cross_entropy(x, w, y, linear_bias=b, reduction=reduction).sum() ** 2
    with pytest.raises(RuntimeError, match=r"linear_cross_entropy: create_graph=True is not supported"):
        torch.autograd.grad(loss, (x,), create_graph=True)


# -- scaling ----------------------------------------------------------------------------------------------------------


@every(lambda op: op.reduced, dtypes=DTYPES)
def test_as_data_parallel_training_scales(op, backend, dtype):
    """Two ranks of different token counts: each loss over the global count, times the number of ranks, gradients
    averaged, give the gradients of one rank (unsloth-zoo #434)."""
    *head, target = op.draw(n=40, v=301, dtype=dtype)(0)
    whole = gradients(op.call(*head, target, backend=backend), head)
    count = denominator(target)
    sums = [torch.zeros_like(t, dtype=torch.float64) for t in head]
    for part in (slice(0, 9), slice(9, 40)):
        own = [t.detach()[part].requires_grad_() if t.shape[0] == 40 else t.detach().requires_grad_() for t in head]
        loss = op.call(*own, narrowed(target, part), num_items_in_batch=count, backend=backend) * 2
        for total_grad, leaf, grad in zip(sums, own, gradients(loss, own), strict=True):
            place = part if leaf.shape[0] != total_grad.shape[0] else slice(None)
            total_grad[place] += grad.double() / 2
    for ours, expected in zip(sums, whole, strict=True):
        assert error(ours, expected) <= 2 * torch.finfo(dtype).eps


def narrowed(target, part):
    """Some tokens of labels, of a SparseTarget, or of what distillation is against."""
    if not isinstance(target, tuple):
        return target[part]
    teacher, labels = target
    if isinstance(teacher, TeacherLogits):
        teacher = TeacherLogits(teacher.logits[part])
    elif isinstance(teacher, TeacherHidden):
        teacher = TeacherHidden(teacher.input[part], teacher.linear_weight, teacher.linear_bias)
    else:
        teacher = teacher[part]
    return type(target)(teacher, None if labels is None else labels[part])


def denominator(target):
    """How many tokens count."""
    labels = target
    if isinstance(target, tuple):
        labels = target.teacher if target.labels is None else target.labels
    return (labels != -100).sum() if isinstance(labels, torch.Tensor) else (labels.probs > 0).any(-1).sum()


@pytest.mark.parametrize("kind", ["sparse", "logits", "hidden"])
def test_float16_gradients_of_a_distilled_mean_do_not_underflow(kind):
    """With 2^17 items a gradient of 1e-3 is 7e-9 in the mean's: below float16, and back after loss scaling."""
    x, w, b, (teacher, _) = taught(kind, torch.float16, n=16, ignored=0)(0)
    scaling, items = 2.0**16, 2**17
    loss = linear_distill(x, w, teacher, linear_bias=b, num_items_in_batch=items)
    grads = gradients(loss * scaling, (x, w, b))
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    if kind == "hidden":
        teacher = TeacherHidden(teacher.input.double(), teacher.linear_weight.double(), teacher.linear_bias.double())
    true = linear_distill(wide[0], wide[1], teacher, linear_bias=wide[2], reduction="sum", backend="reference")
    for grad, reference in zip(grads, gradients(true, wide), strict=True):
        assert error(grad.double() * items / scaling, reference) < 3e-3


# -- autocast ---------------------------------------------------------------------------------------------------------


def mixed(op, target, dtype=torch.bfloat16):
    """A teacher as it is under autocast: in the dtype that products are taken in, if it has a head."""
    if isinstance(target, tuple) and isinstance(target.teacher, TeacherHidden):
        teacher = target.teacher
        teacher = TeacherHidden(teacher.input.to(dtype), teacher.linear_weight.to(dtype), teacher.linear_bias)
        return type(target)(teacher, target.labels)
    return target


@every(lambda op: op.linear)
@pytest.mark.parametrize("reduced", [True, False])
def test_autocast_is_no_worse_than_casting_by_hand(op, backend, reduced):
    """Input and weight are, as products need it, and the bias is not. Gradients of float32 leaves are float32."""
    options = {"reduction": "mean" if reduced else "none"} if op.reduced else {}
    cast_errors, hand_errors = [], []
    for seed in range(2 if INTERPRETED else 4):
        *leaves, target = op.draw(n=48, v=301)(seed)
        target = mixed(op, target)
        with torch.autocast(DEVICE_TYPE, torch.bfloat16):
            loss = total(op, leaves, target, backend, **options)
        found = gradients(loss, leaves)
        half = [t.detach().bfloat16().requires_grad_() for t in leaves[:2]] + [leaves[2].detach().requires_grad_()]
        by_hand = total(op, half, target, backend, **options)
        wide = [t.detach().double().requires_grad_() for t in half]
        true = total(op, wide, target_in_float64(target), "torch", **options)
        assert loss.dtype == torch.float32
        assert error(loss.detach(), true.detach()) <= 1.05 * error(by_hand.detach(), true.detach()) + 1e-5
        assert [grad.dtype for grad in found] == [torch.float32] * len(leaves)
        expected = gradients(true, wide)
        cast_errors.append([error(a, e) for a, e in zip(found, expected, strict=True)])
        hand_errors.append([error(a, e) for a, e in zip(gradients(by_hand, half), expected, strict=True)])
    for ours, theirs in zip(zip(*cast_errors, strict=True), zip(*hand_errors, strict=True), strict=True):
        assert sum(ours) <= 1.05 * sum(theirs)


def target_in_float64(target):
    if isinstance(target, tuple) and isinstance(target.teacher, TeacherHidden):
        teacher = target.teacher
        teacher = TeacherHidden(
            teacher.input.double(), teacher.linear_weight.double(), teacher.linear_bias.double())
        return type(target)(teacher, target.labels)
    if isinstance(target, tuple) and isinstance(target.teacher, TeacherLogits):
        return type(target)(TeacherLogits(target.teacher.logits.double()), target.labels)
    return target


class Casts(TorchDispatchMode):
    """How many elements each cast makes."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            self.sizes.append(out.numel())
        return out

    def __enter__(self):
        self.sizes = []
        return super().__enter__()


@pytest.mark.parametrize("tiles", [1, 4])
def test_the_weight_is_cast_a_part_at_a_time(tiles):
    """Of another dtype than the products': there is no second copy of it, also where a chunk holds all columns."""
    n, d, v, columns = 64, 64, 4096, 256
    x, w, b, y = (t.detach() for t in problem(n, d, v, ignored=0))
    casts = Casts()
    with casts:
        chunked(x, w, b, y.unsqueeze(-1), None, None, None, class_weight=None, label_weight=None,
                row_scale=torch.ones(n), needs=[True, True, True], chunks=ChunkPlan(8, columns, v // tiles),
                keep_float32=False, dtype=torch.bfloat16, logit_scale=1.0, softcap=0.0, temperature=1.0, vocab=v,
                label_smoothing=0.0, z_loss=0.0, bucket=False)
    assert max(casts.sizes) < v * d / 2
    weights = [size for size in casts.sizes if size == columns * d]
    assert len(weights) >= v // columns


@every(lambda op: op.linear)
def test_autocast_of_nothing(op, backend):
    """Disabled inside of an enabled one, it changes nothing; float64 is left alone."""
    *leaves, target = op.draw(n=23, v=301)(0)
    true = total(op, leaves, target, backend)
    with torch.autocast(DEVICE_TYPE, torch.bfloat16), torch.autocast(DEVICE_TYPE, enabled=False):
        assert torch.equal(total(op, leaves, target, backend), true)
    if backend == "torch":
        *wide, target = op.draw(n=23, v=301, dtype=torch.float64)(0)
        with torch.autocast(DEVICE_TYPE, torch.bfloat16):
            assert torch.equal(total(op, wide, target), total_outside(op, wide, target))


def total_outside(op, leaves, target):
    with torch.autocast(DEVICE_TYPE, enabled=False):
        return total(op, leaves, target)


# -- threads ----------------------------------------------------------------------------------------------------------


def test_all_ops_at_once():
    """Threads in different ops, each with forward and backward: nothing is shared that one of them changes."""
    problems = {key: op.draw(n=40, v=301)(3) for key, op in OPS.items()}

    def step(key):
        *leaves, target = problems[key]
        loss = total(OPS[key], leaves, target, "auto")
        return loss.detach(), *gradients(loss, leaves)

    true, found = {key: step(key) for key in OPS}, {key: [] for key in OPS}

    def work(key):
        found[key] = [step(key) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(key,)) for key in OPS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key, runs in found.items():
        assert len(runs) == 3, key
        for run in runs:
            assert all(torch.equal(a, e) for a, e in zip(run, true[key], strict=True)), key


# -- graphs -----------------------------------------------------------------------------------------------------------


def test_one_head_in_two_losses():
    """Gradients of two losses add up, in one backward and in two."""
    x, w, b, y = problem()
    target = soft(len(y), len(w))

    def losses():
        found = linear_logprob(x, w, y.clamp_min(0), linear_bias=b)
        return (linear_cross_entropy(x, w, y, linear_bias=b), linear_distill(x, w, target, linear_bias=b),
                found.logprob.mean() + 0.1 * found.entropy.mean())

    each = [gradients(loss, (x, w, b)) for loss in losses()]
    together = gradients(sum(losses()), (x, w, b))
    for grads, *parts in zip(together, *each, strict=True):
        torch.testing.assert_close(grads, sum(parts), rtol=1e-5, atol=1e-6)


def test_gradients_are_added_to_those_that_are_there():
    """``backward`` twice, as gradient accumulation does, leaves the sum; what was there first is not lost."""
    *leaves, target = hard()(0)
    x, w, b = leaves
    once = gradients(linear_cross_entropy(x, w, target, linear_bias=b), leaves)
    for _ in range(2):
        linear_cross_entropy(x, w, target, linear_bias=b).backward()
    assert all(torch.equal(leaf.grad, 2 * grad) for leaf, grad in zip(leaves, once, strict=True))


@each_backend("linear_cross_entropy")
def test_a_gradient_that_nobody_wants(backend):
    """Statistics alone do not ask for a backward, and a loss that is not used costs none."""
    x, w, b, y = problem()
    loss, stats = linear_cross_entropy(x, w, y, linear_bias=b, return_stats=True, backend=backend)
    assert loss.requires_grad and not any(t.requires_grad for t in stats)
    (nothing,) = torch.autograd.grad((x * 0).sum(), (w,), allow_unused=True)
    assert nothing is None
