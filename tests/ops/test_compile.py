"""torch.compile(fullgraph=True) equals eager, bit for bit where the same op runs; ignored rows, other shapes."""

import importlib

import pytest
import torch

from ssd_core import (
    SparseTarget,
    TeacherHidden,
    TeacherLogits,
    cross_entropy,
    distill,
    linear_cross_entropy,
    linear_distill,
    linear_logprob,
    log_softmax,
    logprob,
    softmax,
)

pytestmark = [pytest.mark.usefixtures("fresh_compiler"),
              pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")]

D, V = 8, 300
CLASS_WEIGHT = torch.rand(V, generator=torch.Generator().manual_seed(3)) + 0.1


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def problem(n=24, dtype=torch.float32, seed=0, ignored=0.2):
    """Leaves first, then what the cases are taken against."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    x, w, b = (t.requires_grad_() for t in (random(n, D), random(V, D), random(V)))
    skip = torch.rand(n, generator=g) < ignored
    y = torch.randint(V, (n,), generator=g).masked_fill(skip, -100)
    probs = (torch.rand(n, 3, generator=g) / 4).masked_fill(skip.unsqueeze(-1), 0)
    ids = torch.stack([torch.randperm(V, generator=g)[:3] for _ in range(n)])
    return {"x": x, "w": w, "b": b, "y": y, "ids": ids, "probs": probs, "num": torch.tensor(17),
            "teacher": random(n, V + 5), "states": random(n, 5), "head": random(V, 5),
            "token_weight": torch.rand(n, generator=g)}


# Each makes a loss of a problem. Tensors are arguments, so that nothing is baked in.
CASES = {
    "mean": lambda t: linear_cross_entropy(t["x"], t["w"], t["y"], linear_bias=t["b"]),
    "sum": lambda t: linear_cross_entropy(t["x"], t["w"], t["y"], linear_bias=t["b"], reduction="sum"),
    "none": lambda t: linear_cross_entropy(
        t["x"], t["w"], t["y"], linear_bias=t["b"], reduction="none", token_weight=t["token_weight"]),
    "sparse": lambda t: linear_cross_entropy(
        t["x"], t["w"], SparseTarget(t["ids"], t["probs"]), linear_bias=t["b"], tail="bucket"),
    "renormalised": lambda t: linear_cross_entropy(
        t["x"], t["w"], SparseTarget(t["ids"], t["probs"]), tail="renormalise", softcap=3.0, z_loss=0.01),
    "class weights": lambda t: linear_cross_entropy(
        t["x"], t["w"], t["y"], linear_bias=t["b"], weight=CLASS_WEIGHT, label_smoothing=0.1, temperature=1.3),
    "class probabilities": lambda t: linear_cross_entropy(t["x"], t["w"], t["teacher"][:, :V].softmax(-1)),
    "shift": lambda t: linear_cross_entropy(
        t["x"].view(2, -1, D), t["w"], t["y"].view(2, -1), linear_bias=t["b"], shift=True),
    "num_items_in_batch": lambda t: linear_cross_entropy(
        t["x"], t["w"], t["y"], linear_bias=t["b"], num_items_in_batch=t["num"]),
    "statistics": lambda t: sum(linear_cross_entropy(t["x"], t["w"], t["y"], return_stats=True)[1][:2])
    + linear_cross_entropy(t["x"], t["w"], t["y"], linear_bias=t["b"]),
    "filtered": lambda t: linear_cross_entropy(
        t["x"], t["w"], t["y"], linear_bias=t["b"], grad_filter=0.3, grad_filter_weight=0.0),
    "distill, sparse": lambda t: linear_distill(
        t["x"], t["w"], SparseTarget(t["ids"], t["probs"]), linear_bias=t["b"], divergence="jsd"),
    "distill, logits": lambda t: linear_distill(
        t["x"], t["w"], TeacherLogits(t["teacher"]), linear_bias=t["b"], target=t["y"], ce_weight=0.3),
    "distill, hidden": lambda t: linear_distill(
        t["x"], t["w"], TeacherHidden(t["states"], t["head"]), linear_bias=t["b"], divergence="reverse_kl",
        reduction="none"),
    "linear_logprob": lambda t: torch.stack(
        linear_logprob(t["x"], t["w"], t["y"], linear_bias=t["b"], temperature=1.5)[:2]),
    "cross_entropy": lambda t: cross_entropy(t["x"] @ t["w"].T, t["y"], weight=CLASS_WEIGHT, reduction="none"),
    "logits, sparse": lambda t: cross_entropy(t["x"] @ t["w"].T, SparseTarget(t["ids"], t["probs"]), reduction="none"),
    "distill": lambda t: distill(
        t["x"] @ t["w"].T, TeacherLogits(t["teacher"]), target=t["y"], ce_weight=0.5, reduction="none"),
    "logprob": lambda t: torch.stack(logprob(t["x"] @ t["w"].T, t["y"], temperature=0.7)[:2]),
    "softmax": lambda t: softmax(t["x"] @ t["w"].T, 1.5),
    "log_softmax": lambda t: log_softmax(t["x"] @ t["w"].T, 0.7),
}


def both(function, t):
    """The loss, and gradients for an upstream gradient that is not uniform; None of a leaf that is not used."""
    loss = function(t)
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, (t["x"], t["w"], t["b"]), upstream, allow_unused=True)


def assert_equal(found, true, **rounding):
    for ours, eager in zip(found, true, strict=True):
        assert (ours is None) == (eager is None)
        if ours is not None:
            torch.testing.assert_close(ours, eager, **(rounding or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("name", CASES)
def test_equals_eager(name):
    """Cut by no graph break; rows are ignored (Liger #1338: a wrong loss then)."""
    t = problem()
    compiled = torch.compile(CASES[name], fullgraph=True, backend="aot_eager")
    assert_equal(both(compiled, t), both(CASES[name], t))
    for other in (problem(seed=1), problem(seed=2, ignored=1.0), problem(seed=3, ignored=0.0)):
        assert_equal(both(compiled, other), both(CASES[name], other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["mean", "none", "distill, logits", "linear_logprob", "softmax"])
def test_every_dtype(name, dtype):
    t = problem(dtype=dtype)
    compiled = torch.compile(CASES[name], fullgraph=True, backend="aot_eager")
    assert_equal(both(compiled, t), both(CASES[name], t))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.all)])
def test_other_numbers_of_tokens(name, dynamic):
    """The second number of tokens compiles for all of them: a third one and a fourth need no more."""
    compiled = torch.compile(CASES[name], fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (24, 40):
        assert_equal(both(compiled, problem(n)), both(CASES[name], problem(n)))
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (6, 58):
            t = problem(n)
            assert_equal(both(compiled, t), both(CASES[name], t))


@pytest.mark.parametrize("name", ["mean", "class weights", pytest.param("distill, hidden", marks=pytest.mark.all),
                                  pytest.param("linear_logprob", marks=pytest.mark.all),
                                  pytest.param("sparse", marks=pytest.mark.all)])
def test_inductor(name):
    """What is around the op is compiled too, and may round otherwise."""
    t = problem()
    compiled = torch.compile(CASES[name], fullgraph=True)
    assert_equal(both(compiled, t), both(CASES[name], t), rtol=2e-6, atol=1e-7)


def test_inside_of_a_model():
    """Among other operations, forward and backward of one graph; the gradient reaches the layers below."""
    torch.manual_seed(0)
    body, head = torch.nn.Linear(D, D), torch.nn.Linear(D, V)
    t = problem()

    def step(x, y):
        return linear_cross_entropy(torch.tanh(body(x)), head.weight, y, linear_bias=head.bias, shift=True) * 3

    parameters = (*body.parameters(), *head.parameters())
    given = t["x"].detach().view(2, -1, D), t["y"].view(2, -1)
    true = torch.autograd.grad(step(*given), parameters)
    found = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*given), parameters)
    assert_equal(found, true)


def test_two_backwards_through_a_compiled_graph():
    t = problem()
    loss = torch.compile(CASES["mean"], fullgraph=True, backend="aot_eager")(t)
    leaves = (t["x"], t["w"], t["b"])
    first = [g.clone() for g in torch.autograd.grad(loss, leaves, torch.tensor(3.0), retain_graph=True)]
    second = torch.autograd.grad(loss, leaves, torch.tensor(-1.5))
    assert_equal(second, [-g / 2 for g in first])


def test_without_gradients():
    t = problem()
    for name in ("mean", "none", "distill, sparse", "linear_logprob"):
        with torch.no_grad():
            found = torch.compile(CASES[name], fullgraph=True, backend="aot_eager")(t)
            assert torch.equal(found, CASES[name](t)) and not found.requires_grad


# -- the custom operators ---------------------------------------------------------------------------------------------

OPERATORS = {
    "linear_cross_entropy": ["mean", "none", "sparse", "class weights", "class probabilities", "filtered"],
    "linear_distill": ["distill, sparse", "distill, logits", "distill, hidden"],
    "linear_logprob": ["linear_logprob"],
    "cross_entropy": ["cross_entropy", "logits, sparse"],
    "distill": ["distill"],
    "logprob": ["logprob"],
    "softmax": ["softmax", "log_softmax"],
}


def test_every_operator_is_checked():
    """softmax_backward below."""
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("ssd_core::")}
    for name in OPERATORS:
        importlib.import_module(f"ssd_core.ops.{name}")
    assert names - {"softmax_backward"} <= OPERATORS.keys()


@pytest.mark.parametrize(("operator", "name"), [(operator, name) for operator, names in OPERATORS.items()
                                                for name in names])
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(operator, name, grad, monkeypatch):
    """Schema, fake kernel and autograd as PyTorch checks them, on the arguments of a real call."""
    module = importlib.import_module(f"ssd_core.ops.{operator}")
    op, calls = getattr(module, f"_{operator}"), []
    monkeypatch.setattr(module, f"_{operator}", lambda *arguments: (calls.append(arguments), op(*arguments))[1])
    t = problem()
    if not grad:
        t = {name: tensor.detach() for name, tensor in t.items()}
    CASES[name](t)
    (arguments,) = calls
    arguments = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("log", [False, True])
def test_opcheck_of_the_softmax_backward(log):
    from ssd_core.ops.softmax import _softmax_backward

    out = torch.randn(4, 9).log_softmax(-1) if log else torch.randn(4, 9).softmax(-1)
    torch.library.opcheck(_softmax_backward, (torch.randn(4, 9), out, 1.5, log, "auto"))
