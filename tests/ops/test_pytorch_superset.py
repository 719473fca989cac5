"""What PyTorch 2.13 documents and tests of its ``linear_cross_entropy`` holds once the import is changed to ours.

Four things differ on purpose: the loss of 16-bit input is float32; a mean over nothing is 0, not NaN; ``options`` find
nothing left to do; wrong arguments raise ValueError or TypeError that name the argument. The truth is ``F.linear`` and
``F.cross_entropy`` in float64, to which PyTorch says its op is equal, so that older versions can judge as well.
"""

import inspect
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from tolerances import LOSS, ROUNDING, error

from ssd_core import LinearCrossEntropyLoss, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("poisoned")

CLASSES, HIDDEN = 7, 5
LAYOUTS = {"single": ((), ()), "batch": ((8,), ()), "line": ((6,), (3,)), "cube": ((4,), (3, 2, 4))}  # N, d_1 ... d_K
KINDS = ["labels", "probabilities"]
REDUCTIONS = ["mean", "sum", "none"]

each_backend = pytest.mark.parametrize("backend", ["auto", "torch"])
# the compiled backend takes no float64, "torch" does
each_case = pytest.mark.parametrize(("backend", "dtype"), [("auto", torch.float32), ("torch", torch.float64)])
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
since_2_13 = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this PyTorch has no such op yet")


def problem(layout="batch", kind="labels", dtype=torch.float32, seed=0):
    """Input (N, D), weight (C, d_1, ..., D), bias (C, d_1, ...) and labels (N, d_1, ...) or probabilities (N, C, d_1,
    ...), which need not sum to 1."""
    batch, positions = LAYOUTS[layout]
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    x, w, b = normal(*batch, HIDDEN), normal(CLASSES, *positions, HIDDEN), normal(CLASSES, *positions)
    if kind == "labels":
        return x, w, b, torch.randint(CLASSES, (*batch, *positions), generator=g)
    return x, w, b, torch.rand(*batch, CLASSES, *positions, generator=g, dtype=torch.float64).to(dtype)


def class_weights(dtype):
    return torch.linspace(0.5, 2, CLASSES, dtype=torch.float64).to(dtype)


def pytorch(x, w, target, *, linear_bias=None, ignore_index=None, **options):
    """The logits in full, and PyTorch's loss of them."""
    z = F.linear(x, w.flatten(0, -2), None if linear_bias is None else linear_bias.flatten())
    z = z.unflatten(-1, w.shape[:-1])
    return F.cross_entropy(z, target, ignore_index=-100 if ignore_index is None else ignore_index, **options)


def differentiated(function, x, w, b, target, **options):
    """The loss, and its gradients under an upstream gradient that differs from token to token."""
    leaves = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]
    loss = function(*leaves[:2], target, linear_bias=leaves[2] if len(leaves) == 3 else None, **options)
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return loss.detach(), torch.autograd.grad(loss, leaves, upstream if loss.ndim else torch.ones_like(loss))


def widened(tensor):
    return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor


def check(backend, *problems, weight=None, **options):
    """Losses and gradients against float64, pooled over the problems; for the gradients, next to the error that PyTorch
    makes in x's dtype."""
    losses, ours, eager = [], [], []
    for x, w, b, target in problems:
        true, true_grads = differentiated(
            pytorch, *map(widened, (x, w, b, target)), weight=widened(weight), **options)
        _, eager_grads = differentiated(pytorch, x, w, b, target, weight=weight, **options)
        loss, grads = differentiated(linear_cross_entropy, x, w, b, target, weight=weight, backend=backend, **options)
        assert loss.shape == true.shape
        assert loss.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
        losses.append((loss.flatten(), true.flatten()))
        for grad, expected in zip(grads, true_grads, strict=True):
            assert grad.dtype == x.dtype and grad.shape == expected.shape
        ours.append([error(grad, expected) for grad, expected in zip(grads, true_grads, strict=True)])
        eager.append([error(grad, expected) for grad, expected in zip(eager_grads, true_grads, strict=True)])
    assert error(*map(torch.cat, zip(*losses, strict=True))) <= LOSS[x.dtype]
    for found, theirs in zip(pooled(ours), pooled(eager), strict=True):
        assert found <= 1.5 * theirs + ROUNDING[x.dtype]


def pooled(errors):
    """One error for each gradient: the root mean square over the problems."""
    return torch.tensor(errors, dtype=torch.float64).square().mean(0).sqrt().tolist()


# -- the signature ----------------------------------------------------------------------------------------------------


@since_2_13
def test_every_parameter_of_pytorch_is_ours_with_its_default():
    """Except for ``ignore_index``: our default is what PyTorch's None means."""
    ours = inspect.signature(linear_cross_entropy).parameters
    theirs = inspect.signature(F.linear_cross_entropy).parameters
    for name, parameter in theirs.items():
        assert name in ours, name
        default = -100 if name == "ignore_index" else parameter.default
        assert (ours[name].kind, ours[name].default) == (parameter.kind, default), name
    positional = [name for name, p in ours.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert positional == ["input", "linear_weight", "target"]


# -- labels and probabilities -----------------------------------------------------------------------------------------


@each_case
@each_layout
@each_reduction
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [None, -100, 3, CLASSES + 5])
def test_labels(backend, dtype, layout, reduction, smoothing, weighted, ignore_index):
    """``ignore_index`` may be a class, or lie outside them; None is -100. The mean divides by the class weights of the
    labels that count, over tokens and positions alike."""
    x, w, b, y = problem(layout, dtype=dtype)
    if y.ndim:
        y.view(-1)[1] = -100 if ignore_index is None else ignore_index
        y.view(-1)[0] = 0
    else:
        y.fill_(2)
    check(backend, (x, w, b, y), weight=class_weights(dtype) if weighted else None, reduction=reduction,
          label_smoothing=smoothing, ignore_index=ignore_index)


@each_case
@each_layout
@each_reduction
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_probabilities(backend, dtype, layout, reduction, smoothing, weighted):
    """Class weights multiply each class's term, and the mean divides by tokens times positions whatever they are."""
    x, w, b, p = problem(layout, "probabilities", dtype)
    check(backend, (x, w, b, p), weight=class_weights(dtype) if weighted else None, reduction=reduction,
          label_smoothing=smoothing)


@each_backend
@each_dtype
@each_layout
@each_kind
@pytest.mark.parametrize("bias", [True, False])
def test_dtypes(backend, dtype, layout, kind, bias):
    problems = [problem(layout, kind, dtype, seed) for seed in range(8)]
    check(backend, *((x, w, b if bias else None, target) for x, w, b, target in problems))


@each_backend
@pytest.mark.parametrize(("dtype", "target_dtype"), [
    (torch.bfloat16, torch.float32), (torch.float32, torch.float64), (torch.float32, torch.bfloat16)])
def test_probabilities_of_another_dtype(backend, dtype, target_dtype):
    problems = [problem("line", "probabilities", dtype, seed) for seed in range(8)]
    check(backend, *((x, w, b, p.to(target_dtype)) for x, w, b, p in problems))


@each_case
@each_reduction
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_probabilities_are_taken_as_they_are(backend, dtype, reduction, smoothing):
    """PyTorch checks none of them: a row of zeros counts in the mean and is smoothed, a negative entry is a factor."""
    x, w, b, p = problem("batch", "probabilities", dtype)
    p[2] = 0
    p[3] *= -1
    p[4, 1] = 50
    check(backend, (x, w, b, p), reduction=reduction, label_smoothing=smoothing)


@each_case
@pytest.mark.parametrize("layout", ["batch", "cube"])
def test_one_hot_probabilities_are_labels(backend, dtype, layout):
    """Except that the mean of labels divides by their class weights."""
    x, w, b, y = problem(layout, dtype=dtype)
    p = F.one_hot(y, CLASSES).movedim(-1, 1).to(dtype)
    weight = class_weights(dtype)
    for reduction in REDUCTIONS:
        options = {"linear_bias": b, "weight": weight, "reduction": reduction, "backend": backend}
        of_labels = linear_cross_entropy(x, w, y, **options)
        factor = weight[y].mean() if reduction == "mean" else 1
        torch.testing.assert_close(linear_cross_entropy(x, w, p, **options), of_labels * factor)


@each_case
def test_smoothing_mixes_probabilities_with_the_uniform_distribution(backend, dtype):
    x, w, b, p = problem("line", "probabilities", dtype)
    smoothed = linear_cross_entropy(x, w, p, linear_bias=b, label_smoothing=0.2, backend=backend)
    mixed = linear_cross_entropy(x, w, 0.8 * p + 0.2 / CLASSES, linear_bias=b, backend=backend)
    torch.testing.assert_close(smoothed, mixed)


@each_case
@each_kind
def test_positions_are_separate_heads(backend, dtype, kind):
    x, w, b, target = problem("cube", kind, dtype)
    weight = class_weights(dtype)
    every = linear_cross_entropy(x, w, target, linear_bias=b, weight=weight, reduction="none", backend=backend)
    for place in [(0, 0, 0), (1, 0, 3), (2, 1, 2)]:
        at = (..., *place)
        one = linear_cross_entropy(x, w[(slice(None), *place)], target[at], linear_bias=b[at], weight=weight,
                                   reduction="none", backend=backend)
        torch.testing.assert_close(every[at], one)


@each_case
@each_kind
def test_a_single_class_costs_nothing(backend, dtype, kind):
    x = torch.randn(4, HIDDEN, dtype=dtype)
    target = torch.zeros(4, dtype=torch.int64) if kind == "labels" else torch.rand(4, 1, dtype=dtype)
    assert linear_cross_entropy(x, torch.randn(1, HIDDEN, dtype=dtype), target, backend=backend) == 0


# -- PyTorch's own op and module --------------------------------------------------------------------------------------


@since_2_13
@each_case
@each_layout
@each_kind
def test_same_as_pytorchs_op(backend, dtype, layout, kind):
    x, w, b, target = problem(layout, kind, dtype)
    theirs, their_grads = differentiated(F.linear_cross_entropy, x, w, b, target)
    ours, our_grads = differentiated(linear_cross_entropy, x, w, b, target, backend=backend)
    for a, e in zip((ours, *our_grads), (theirs, *their_grads), strict=True):
        torch.testing.assert_close(a, e)


ASKED = [{}, {"batch_chunk_size": 2}, {"chunking_method": "aspect_ratio:4"}, {"allow_retain_graph": True},
         {"acc_policy": "accurate", "acc_dtype": torch.float32}]


@since_2_13
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize(("layout", "kind", "smoothing"), [
    ("batch", "labels", 0.0), ("single", "labels", 0.0), ("batch", "labels", 0.1), ("cube", "labels", 0.0),
    ("batch", "probabilities", 0.0)])
def test_options_change_nothing(dtype, asked, layout, kind, smoothing):
    """They ask for what this op always does, and where PyTorch ignores them with a warning there is none."""
    arguments = problem(layout, kind, dtype)
    plain = differentiated(linear_cross_entropy, *arguments, label_smoothing=smoothing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = differentiated(linear_cross_entropy, *arguments, label_smoothing=smoothing,
                               options=torch.nn.LinearCrossEntropyOptions(**asked))
    for a, e in zip((given[0], *given[1]), (plain[0], *plain[1]), strict=True):
        assert torch.equal(a, e)


@since_2_13
@each_reduction
def test_near_pytorchs_chunked_op_in_bfloat16(reduction):
    x, w, b, y = problem(dtype=torch.bfloat16)
    theirs, their_grads = differentiated(
        F.linear_cross_entropy, x, w, b, y, reduction=reduction,
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=3, acc_policy="accurate"))
    ours, our_grads = differentiated(linear_cross_entropy, x, w, b, y, reduction=reduction)
    for a, e in zip((ours, *our_grads), (theirs, *their_grads), strict=True):
        assert error(a, e) < 1e-2


@since_2_13
@pytest.mark.parametrize("out_features", [(), (3, 2)])
@pytest.mark.parametrize("bias", [False, True])
@each_kind
def test_module_gives_what_pytorchs_gives(out_features, bias, kind):
    weight = class_weights(torch.float32)
    theirs = torch.nn.LinearCrossEntropyLoss(
        HIDDEN, CLASSES, out_features=out_features, bias=bias, weight=weight, label_smoothing=0.1)
    ours = LinearCrossEntropyLoss(weight=weight, label_smoothing=0.1)
    x = torch.randn(4, HIDDEN)
    labels = torch.randint(CLASSES, (4, *out_features))
    target = labels if kind == "labels" else torch.rand(4, CLASSES, *out_features)
    head = theirs.linear.weight.reshape(CLASSES, *out_features, HIDDEN)
    head_bias = theirs.linear.bias.reshape(CLASSES, *out_features) if bias else None
    torch.testing.assert_close(ours(x, head, target, head_bias), theirs(x, target))


# -- gradients --------------------------------------------------------------------------------------------------------


@each_layout
@each_kind
@each_reduction
def test_gradients_by_finite_differences(layout, kind, reduction):
    x, w, b, target = problem(layout, kind, torch.float64)
    weight = class_weights(torch.float64)

    def loss(x, w, b):
        return linear_cross_entropy(x, w, target, linear_bias=b, weight=weight, reduction=reduction, backend="torch")

    assert torch.autograd.gradcheck(loss, (x, w, b), fast_mode=True)


@each_case
@each_kind
@each_reduction
@pytest.mark.parametrize("layout", ["batch", "line"])
def test_a_retained_graph_can_be_used_twice(backend, dtype, kind, reduction, layout):
    """And no more than once where it was not retained."""
    x, w, b, target = problem(layout, kind, dtype)
    loss = linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, backend=backend).sum()
    true = torch.autograd.grad(pytorch(x, w, target, linear_bias=b, reduction=reduction).sum(), (x, w, b))
    for scale, retain in ((3.0, True), (-2.0, False)):
        grads = torch.autograd.grad(loss, (x, w, b), torch.tensor(scale, dtype=dtype), retain_graph=retain)
        for a, e in zip(grads, true, strict=True):
            torch.testing.assert_close(a, scale * e)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (x, w, b))


@each_case
@each_kind
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1)])
def test_frozen_tensors_get_no_gradient(backend, dtype, kind, wanted):
    tensors = problem("line", kind, dtype)
    _, every = differentiated(pytorch, *tensors)
    x, w, b = (t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors[:3]))
    linear_cross_entropy(x, w, tensors[3], linear_bias=b, backend=backend).backward()
    for i, leaf in enumerate((x, w, b)):
        if i in wanted:
            torch.testing.assert_close(leaf.grad, every[i])
        else:
            assert leaf.grad is None


@each_backend
def test_no_gradient_where_none_can_be_wanted(backend):
    x, w, b, p = problem("line", "probabilities")
    with torch.no_grad():
        assert not linear_cross_entropy(x, w, p, linear_bias=b, backend=backend).requires_grad
    x, w, b = (t.detach() for t in (x, w, b))
    assert not linear_cross_entropy(x, w, p, linear_bias=b, backend=backend).requires_grad


@each_backend
def test_a_target_that_wants_a_gradient_is_refused(backend):
    """PyTorch differentiates probabilities as well; here that would be lost without a word."""
    x, w, b, p = problem("line", "probabilities")
    with pytest.raises(ValueError, match=r"^target: expected .*constant"):
        linear_cross_entropy(x, w, p.requires_grad_(), linear_bias=b, backend=backend)


@each_reduction
@pytest.mark.parametrize("transform", [
    lambda f, x: torch.func.grad(f)(x), lambda f, x: torch.func.jvp(f, (x,), (x,))], ids=["grad", "jvp"])
def test_functional_derivatives_are_refused(transform, reduction):
    """PyTorch's chunked op refuses the first and gives zeros for the second."""
    x, w, _, y = problem()

    def loss(x):
        return linear_cross_entropy(x, w, y, reduction=reduction).sum()

    assert loss(x.detach()).isfinite()
    with pytest.raises(RuntimeError):
        transform(loss, x.detach())


# -- nothing depends on how the work is divided -----------------------------------------------------------------------


@each_case
@each_kind
@each_reduction
@pytest.mark.parametrize("positions", [(), (3,)])
def test_results_do_not_depend_on_the_chunk_size(backend, dtype, kind, reduction, positions):
    g = torch.Generator().manual_seed(0)
    n, c = 10, 300
    x = torch.randn(n, HIDDEN, generator=g, dtype=dtype)
    w = torch.randn(c, *positions, HIDDEN, generator=g, dtype=dtype)
    b = torch.randn(c, *positions, generator=g, dtype=dtype)
    target = torch.randint(c, (n, *positions), generator=g)
    if kind == "probabilities":
        target = torch.rand(n, c, *positions, generator=g, dtype=dtype)
    options = {"reduction": reduction, "backend": backend}
    with pytest.raises(ValueError, match="workspace_bytes: expected at least") as refused:
        linear_cross_entropy(x, w, target, linear_bias=b, workspace_bytes=1, **options)
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    whole, whole_grads = differentiated(linear_cross_entropy, x, w, b, target, **options)
    for workspace in (least, least + 4000):
        loss, grads = differentiated(linear_cross_entropy, x, w, b, target, workspace_bytes=workspace, **options)
        for a, e in zip((loss, *grads), (whole, *whole_grads), strict=True):
            assert error(a, e) <= 10 * torch.finfo(dtype).eps


@each_case
@each_kind
@pytest.mark.parametrize("layout", ["batch", "cube"])
def test_a_tokens_loss_does_not_depend_on_its_batch(backend, dtype, kind, layout):
    """And the gradients of batches add up."""
    x, w, b, target = problem(layout, kind, dtype)
    for reduction in ("none", "sum"):
        options = {"reduction": reduction, "backend": backend}
        whole, whole_grads = differentiated(linear_cross_entropy, x, w, b, target, **options)
        # the upstream gradient that ``differentiated`` gives depends on the shape: sums have the same everywhere
        parts = [differentiated(linear_cross_entropy, x[i : i + 2], w, b, target[i : i + 2], **options)
                 for i in range(0, len(x), 2)]
        losses = [loss for loss, _ in parts]
        torch.testing.assert_close(torch.cat(losses) if reduction == "none" else sum(losses), whole)
        if reduction == "sum":
            torch.testing.assert_close(torch.cat([grads[0] for _, grads in parts]), whole_grads[0])
            for i in (1, 2):
                torch.testing.assert_close(sum(grads[i] for _, grads in parts), whole_grads[i])


@each_case
@each_kind
@pytest.mark.parametrize("layout", ["batch", "line"])
def test_strides_do_not_matter(backend, dtype, kind, layout):
    x, w, b, target = problem(layout, kind, dtype)
    plain = differentiated(linear_cross_entropy, x, w, b, target, backend=backend)

    def strided(tensor):
        """Every second place of a larger tensor, the axes in reverse in memory."""
        tensor = tensor.detach()
        larger = torch.zeros(*(2 * s for s in reversed(tensor.shape)), dtype=tensor.dtype)
        view = larger.permute(*reversed(range(tensor.ndim)))[(slice(None, None, 2),) * tensor.ndim]
        return view.copy_(tensor)

    loss, grads = differentiated(linear_cross_entropy, *map(strided, (x, w, b, target)), backend=backend)
    for a, e in zip((loss, *grads), (plain[0], *plain[1]), strict=True):
        torch.testing.assert_close(a, e)


@each_case
@each_layout
@each_kind
def test_arguments_are_left_as_they_were(backend, dtype, layout, kind):
    x, w, b, target = problem(layout, kind, dtype)
    weight = class_weights(dtype)
    arguments = (x, w, b, target, weight)
    before = [t.detach().clone() for t in arguments]
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(x, w, target, linear_bias=b, weight=weight, label_smoothing=0.1,
                                    reduction=reduction, backend=backend)
        loss.sum().backward()
    assert all(torch.equal(a, e) for a, e in zip(arguments, before, strict=True))


@each_kind
def test_under_compile(kind):
    x, w, b, target = problem("line", kind)
    compiled = torch.compile(linear_cross_entropy, backend="eager")
    plain = differentiated(linear_cross_entropy, x, w, b, target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # of Dynamo, on what it does not trace
        loss, grads = differentiated(compiled, x, w, b, target)
    for a, e in zip((loss, *grads), (plain[0], *plain[1]), strict=True):
        assert torch.equal(a, e)


# -- nothing to count -------------------------------------------------------------------------------------------------


def zero_gradients(loss, leaves):
    grads = torch.autograd.grad(loss.sum(), leaves)
    return all(grad.shape == leaf.shape and not grad.any() for grad, leaf in zip(grads, leaves, strict=True))


@each_case
@pytest.mark.parametrize("layout", ["batch", "cube"])
@each_kind
@each_reduction
def test_an_empty_batch(backend, dtype, layout, kind, reduction):
    """The mean is 0 with zero gradients; PyTorch's is NaN."""
    x, w, b, target = problem(layout, kind, dtype)
    x, target = x.detach()[:0].requires_grad_(), target[:0]
    loss = linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, backend=backend)
    true = pytorch(x, w, target, linear_bias=b, reduction=reduction)
    assert loss.shape == true.shape and (true.isnan() if reduction == "mean" else not true.any())
    assert not loss.any() and zero_gradients(loss, (x, w, b))


@each_case
@each_layout
@each_reduction
@pytest.mark.parametrize("ignore_index", [None, 3, CLASSES + 5])
def test_all_ignored(backend, dtype, layout, reduction, ignore_index):
    """The mean is 0 with zero gradients; PyTorch's is NaN."""
    x, w, b, y = problem(layout, dtype=dtype)
    y.fill_(-100 if ignore_index is None else ignore_index)
    options = {"linear_bias": b, "reduction": reduction, "ignore_index": ignore_index}
    loss, true = linear_cross_entropy(x, w, y, backend=backend, **options), pytorch(x, w, y, **options)
    assert loss.shape == true.shape and (true.isnan() if reduction == "mean" else not true.any())
    assert not loss.any() and zero_gradients(loss, (x, w, b))


@each_case
@pytest.mark.parametrize("layout", ["batch", "cube"])
@each_kind
def test_class_weights_of_zero(backend, dtype, layout, kind):
    """The mean of labels divides by the weights: 0 here, NaN in PyTorch. That of probabilities does not."""
    x, w, b, target = problem(layout, kind, dtype)
    options = {"linear_bias": b, "weight": torch.zeros(CLASSES, dtype=dtype)}
    loss, true = linear_cross_entropy(x, w, target, backend=backend, **options), pytorch(x, w, target, **options)
    assert true.isnan() if kind == "labels" else true == 0
    assert loss == 0 and zero_gradients(loss, (x, w, b))


# -- what is refused --------------------------------------------------------------------------------------------------

LABELS, PROBABILITIES = torch.zeros(4, dtype=torch.int64), torch.zeros(4, CLASSES)


@each_backend
@pytest.mark.parametrize(("change", "named"), [
    ({"input": torch.zeros(())}, "input"),
    ({"input": torch.zeros(2, 4, HIDDEN)}, "target"),
    ({"linear_weight": torch.zeros(HIDDEN)}, "linear_weight"),
    ({"linear_weight": torch.zeros(CLASSES, HIDDEN + 1)}, "linear_weight"),
    ({"linear_weight": torch.zeros(CLASSES, 3, HIDDEN + 1), "target": torch.zeros(4, 3).long()}, "linear_weight"),
    ({"linear_weight": torch.zeros(CLASSES, 3, HIDDEN), "input": torch.zeros(HIDDEN),
      "target": torch.zeros(3).long()}, "input"),
    ({"linear_weight": torch.zeros(CLASSES, 3, HIDDEN)}, "target"),
    ({"linear_weight": torch.zeros(CLASSES, 3, HIDDEN), "target": torch.zeros(4, CLASSES)}, "target"),
    ({"linear_weight": torch.zeros(CLASSES, 3, HIDDEN), "target": torch.zeros(4, 3, CLASSES)}, "target"),
    ({"linear_weight": torch.zeros(CLASSES, 3, HIDDEN), "target": torch.zeros(4, 3)}, "target"),
    ({"target": PROBABILITIES.long()}, "target"),
    ({"target": PROBABILITIES.bool()}, "target"),
    ({"target": torch.zeros(5, CLASSES)}, "target"),
    ({"target": torch.zeros(4, CLASSES + 1)}, "target"),
    ({"target": LABELS.float()}, "target"),
    ({"target": torch.zeros(5).long()}, "target"),
    ({"target": LABELS + CLASSES}, "target"),
    ({"linear_weight": torch.zeros(CLASSES, 3, HIDDEN), "target": torch.full((4, 3), CLASSES)}, "target"),
    ({"target": PROBABILITIES, "ignore_index": 0}, "ignore_index"),
    ({"target": PROBABILITIES, "ignore_index": -1}, "ignore_index"),
    ({"linear_weight": torch.zeros(CLASSES, 3, HIDDEN), "target": torch.zeros(4, CLASSES, 3), "ignore_index": 0},
     "ignore_index"),
    ({"linear_bias": torch.zeros(CLASSES + 1)}, "linear_bias"),
    ({"linear_weight": torch.zeros(CLASSES, 3, HIDDEN), "target": torch.zeros(4, 3).long(),
      "linear_bias": torch.zeros(CLASSES)}, "linear_bias"),
    ({"linear_weight": torch.zeros(CLASSES, 3, HIDDEN), "target": torch.zeros(4, 3).long(),
      "linear_bias": torch.zeros(3 * CLASSES)}, "linear_bias"),
    ({"weight": torch.zeros(CLASSES + 1)}, "weight"),
    ({"target": PROBABILITIES, "weight": torch.zeros(CLASSES + 1)}, "weight"),
    ({"linear_weight": torch.zeros(CLASSES, 3, HIDDEN), "target": torch.zeros(4, 3).long(),
      "weight": torch.zeros(CLASSES, 3)}, "weight"),
    ({"target": PROBABILITIES, "weight": torch.ones(CLASSES, requires_grad=True)}, "weight"),
    ({"label_smoothing": -0.1}, "label_smoothing"),
    ({"target": PROBABILITIES, "label_smoothing": 1.1}, "label_smoothing"),
    ({"reduction": "avg"}, "reduction"),
    ({"options": {"batch_chunk_size": 2}}, "options"),
])
def test_what_is_refused(backend, change, named):
    arguments = {"input": torch.zeros(4, HIDDEN), "linear_weight": torch.zeros(CLASSES, HIDDEN), "target": LABELS,
                 **change}
    with pytest.raises((ValueError, TypeError, IndexError), match=f"^{named}: expected"):
        linear_cross_entropy(**arguments, backend=backend)
