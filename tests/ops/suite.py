"""What the tests of all ops share: the table of ops, backends and dtypes, problems, and what they are held against.

A backend joins by its record in ``ssd_core.backends`` and an op by its line in OPS: they inherit every case of
test_every_op.py, and a backend those of its ops' own tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from elsewhere import DEVICE
from tolerances import FACTOR, LOSS, ROUNDING, error, row_errors

import ssd_core
from ssd_core import SparseTarget, TeacherHidden, TeacherLogits
from ssd_core.backends import BACKENDS
from ssd_core.plan import ChunkPlan
from ssd_core.reference.cross_entropy import cross_entropy as define_cross_entropy
from ssd_core.reference.distill import distill as define_distill
from ssd_core.reference.log_softmax import log_softmax as define_log_softmax
from ssd_core.reference.logprob import logprob as define_logprob
from ssd_core.reference.softmax import softmax as define_softmax

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"     # a hundred times slower
TOKENS = 13 if INTERPRETED else 131
ROUTE = os.environ.get("SSD_CORE_ROUTE", "chunked")         # of backend "triton"
DEVICE_TYPE = torch.device(DEVICE).type
VOCABULARIES = [1, 7, 50257, 128256, 151936, 262144]


# -- problems ---------------------------------------------------------------------------------------------------------


def problem(n=TOKENS, d=32, v=601, dtype=torch.float32, seed=0, bias=True, ignored=0.2):
    """Hidden states, weight, bias and hard labels; some labels are ignored."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    w = (2 * torch.randn(v, d, generator=g, dtype=torch.float64) / d**0.5).to(dtype).requires_grad_()
    b = torch.randn(v, generator=g, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    y = torch.randint(v, (n,), generator=g)
    y[torch.rand(n, generator=g) < ignored] = -100
    return x, w, b, y


def soft(n, v, k=5, total=1.0, seed=1, dtype=torch.float32):
    """Probabilities that sum to ``total`` on k ids of each token; some tokens are ignored."""
    g = torch.Generator().manual_seed(seed)
    k = min(k, v)
    ids = torch.stack([torch.randperm(v, generator=g)[:k] for _ in range(n)]).int() if n else torch.zeros(0, k).int()
    probs = torch.rand(n, k, generator=g) + 0.05
    probs = total * probs / probs.sum(-1, keepdim=True)
    probs[3::7] = 0                                         # ignored tokens
    return SparseTarget(ids, probs.to(dtype))


class Taught(NamedTuple):
    """What distillation is against."""

    teacher: SparseTarget | TeacherLogits | TeacherHidden
    labels: torch.Tensor | None


def hard(dtype=torch.float32, **options):
    """A problem of hard labels for each seed: ``(x, w, b, labels)``."""
    return lambda seed: problem(dtype=dtype, seed=seed, **options)


def sparse(dtype=torch.float32, total=1.0, **options):
    """The same with sparse targets."""

    def draw(seed):
        x, w, b, y = problem(dtype=dtype, seed=seed, **options)
        return x, w, b, soft(len(y), w.shape[0], total=total, seed=seed + 100)

    return draw


def taught(kind, dtype=torch.float32, total=0.8, labels=False, more=0, ignored=0.2, teacher_options=None, **options):
    """The same with a teacher: "sparse", "logits" or "hidden" of ``more`` ids than the student's V; with ``labels``,
    some are ignored. The teacher's tensors have the student's dtype, probabilities float32 or float64."""

    def draw(seed):
        x, w, b, y = problem(dtype=dtype, seed=seed, ignored=ignored, **options)
        other, weight, bias, _ = (t.detach() for t in problem(
            len(x), x.shape[1] + 3, len(w) + more, dtype=dtype, seed=seed + 100))
        if kind == "sparse":
            probs = soft(len(x), len(w), total=total, seed=seed + 100)
            teacher = SparseTarget(probs.ids, probs.probs.double() if dtype == torch.float64 else probs.probs)
        elif kind == "logits":
            teacher = TeacherLogits(F.linear(other, weight, bias))
        else:
            teacher = TeacherHidden(other, weight, bias, **(teacher_options or {}))
        return x, w, b, Taught(teacher, y if labels else None)

    return draw


def on_logits(draw):
    """The problem whose logits are the outputs of ``draw``'s heads: ``(z, target)``."""

    def of(seed):
        *head, target = draw(seed)
        return F.linear(*head).detach().requires_grad_(), target

    return of


# -- definitions: of leaves in float64 the truth, of others what unfused PyTorch makes of them -------------------------


def outputs(x, w, b=None):
    """Raw outputs as eager PyTorch has them, 16-bit ones rounded; what follows is in float32 or float64."""
    u = F.linear(x, w, b)
    return u if u.dtype == torch.float64 else u.float()


def reduced(loss, valid, counted, token_weight, reduction):
    factor = (torch.ones(loss.shape) if token_weight is None else token_weight).double()
    loss = torch.where(valid, loss * factor, 0)
    if reduction != "none":
        loss = loss.sum()
    return loss / (counted * factor)[valid].sum() if reduction == "mean" else loss


def cross_entropy(u, target, *, reduction="mean", weight=None, token_weight=None, tail="none", **options):
    if isinstance(target, SparseTarget):
        ids, probs, valid = target.ids.long(), target.probs.to(u.dtype), (target.probs > 0).any(-1)
        if tail == "renormalise":
            probs = probs / probs.sum(-1, keepdim=True).clamp_min(1e-30)
        counted = torch.ones(len(valid))
    else:
        ids, probs, valid = target.clamp_min(0).unsqueeze(-1), None, target != -100
        counted = torch.ones(len(valid)) if weight is None else weight[ids[:, 0]]
    loss, *_ = define_cross_entropy(u, ids, probs, class_weight=weight, bucket=tail == "bucket", **options)
    return reduced(loss, valid, counted, token_weight, reduction)


PLAIN = {"divergence": "forward_kl", "beta": 0.5, "temperature": 1.0, "temperature_squared": False, "tail": "bucket"}


def distill(u, taught, *, reduction="mean", weight=None, token_weight=None, **options):
    teacher, labels = taught
    given, valid = {}, torch.ones(len(u), dtype=torch.bool)
    if isinstance(teacher, SparseTarget):
        given, valid = {"ids": teacher.ids.long(), "probs": teacher.probs}, (teacher.probs > 0).any(-1)
    elif isinstance(teacher, TeacherLogits):
        given = {"teacher_u": teacher.logits}
    else:
        head = (teacher.input, teacher.linear_weight, teacher.linear_bias)
        given = {"teacher_u": outputs(*(
                     t.to(u.dtype) if t is not None and u.dtype == torch.float64 else t for t in head)),
                 "teacher_logit_scale": teacher.logit_scale, "teacher_softcap": teacher.softcap}
    if labels is not None:
        given["labels"], valid = labels.clamp_min(0), valid & (labels != -100)
    loss, *_ = define_distill(u, class_weight=weight, **given, **{**PLAIN, **options})
    return reduced(loss, valid, torch.ones(len(u)), token_weight, reduction)


def logprob(u, target, **options):
    valid = target != -100
    values = define_logprob(u, target.clamp_min(0), **options)[:2]
    return tuple(torch.where(valid, value, 0) for value in values)


def softmax(z, _, temperature=1.0):
    return define_softmax(z, temperature=temperature) if z.dtype == torch.float64 else (z / temperature).softmax(-1)


def log_softmax(z, _, temperature=1.0):
    wide = z.dtype == torch.float64
    return define_log_softmax(z, temperature=temperature) if wide else (z / temperature).log_softmax(-1)


# -- the table --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Op:
    """``call(*leaves, target, backend=..., **options)`` and ``define(*leaves, target, **options)`` give a tensor, or a
    tuple of tensors of which each is differentiable. ``draw(**sizes)(seed)`` is a problem ``(*leaves, target)``."""

    name: str
    call: Callable
    define: Callable
    draw: Callable
    variant: str = ""

    @property
    def linear(self) -> bool:
        """Of a head, and so with a plan of chunks."""
        return self.name.startswith("linear")

    @property
    def reduced(self) -> bool:
        """Has token weights and a reduction."""
        return "entropy" in self.name or "distill" in self.name

    @property
    def module(self) -> str:
        return f"ssd_core.ops.{self.name}"

    def __str__(self) -> str:
        return self.name + (f"-{self.variant}" if self.variant else "")


def _of_logits(name, define, draw, variant=""):
    """The two ops of one definition: of a head, and of logits."""

    def of_head(x, w, b, target, **options):
        return define(outputs(x, w, b), target, **options)

    def wide(z, target, **options):
        return define(z if z.dtype == torch.float64 else z.float(), target, **options)

    call = _distill if name == "distill" else _logprob if name == "logprob" else _loss
    yield Op(f"linear_{name}", call(f"linear_{name}"), of_head, draw, variant)
    if variant != "hidden":
        yield Op(name, call(name), wide, lambda **sizes: on_logits(draw(**sizes)), variant)


def _split(head):
    """Positional arguments before the target, and the bias."""
    return head[:2], {"linear_bias": head[2]} if len(head) == 3 else {}


def _loss(name):
    def call(*leaves, **options):
        *head, target = leaves
        tensors, bias = _split(head)
        return getattr(ssd_core, name)(*tensors, target, **bias, **options)

    return call


def _distill(name):
    def call(*leaves, **options):
        *head, (teacher, labels) = leaves
        tensors, bias = _split(head)
        return getattr(ssd_core, name)(*tensors, teacher, target=labels, **bias, **options)

    return call


def _logprob(name):
    loss = _loss(name)
    return lambda *leaves, **options: tuple(loss(*leaves, **options)[:2])


def _softmax(name):
    return lambda z, _, **options: getattr(ssd_core, name)(z, **options)


def _rows(**sizes):
    def draw(seed):
        z, _ = on_logits(hard(**sizes))(seed)
        return z, None

    return draw


OPS = {str(op): op for op in (
    *_of_logits("cross_entropy", cross_entropy, hard, "hard"),
    *_of_logits("cross_entropy", cross_entropy, sparse, "sparse"),
    *_of_logits("distill", distill, lambda **sizes: taught("sparse", **sizes), "sparse"),
    *_of_logits("distill", distill, lambda **sizes: taught("logits", labels=True, **sizes), "logits"),
    *_of_logits("distill", distill, lambda **sizes: taught("hidden", labels=True, **sizes), "hidden"),
    *_of_logits("logprob", logprob, hard),
    Op("softmax", _softmax("softmax"), softmax, _rows),
    Op("log_softmax", _softmax("log_softmax"), log_softmax, _rows),
)}


def backends(name: str) -> list[str]:
    """Those that serve the device's tensors. One that is missing here fails rather than passing as tests that did not
    run."""
    return [record.name for record in _records(name) if record.name != "reference"]


def cases(name: str):
    """Each backend with each dtype that it serves; the reference in float32 shows that its interface is right."""
    for record in _records(name):
        for dtype in DTYPES if record.name != "reference" else DTYPES[:1]:
            if str(dtype)[6:] in record.dtypes:
                yield record.name, dtype


def _records(name):
    return [record for record in BACKENDS
            if record.op == name and (not record.devices or DEVICE_TYPE in record.devices)]


def each_backend(name: str, option: str = ""):
    """Or each that has the option."""
    lacking = [record.name for record in _records(name) if option in record.lacks]
    return pytest.mark.parametrize("backend", [name for name in backends(name) if name not in lacking])


def each_case(name: str):
    return pytest.mark.parametrize(
        ("backend", "dtype"), [pytest.param(*case, id=f"{case[0]}-{str(case[1])[6:]}") for case in cases(name)])


def every(condition=lambda op: True, dtypes=()):
    """Each op of the table that meets the condition, with each of its backends; with ``dtypes``, each of its cases of
    these."""
    names, found = ("op", "backend") + ("dtype",) * bool(dtypes), []
    for key, op in OPS.items():
        if condition(op):
            each = ((case for case in cases(op.name) if case[1] in dtypes) if dtypes
                    else ((backend,) for backend in backends(op.name)))
            found += [pytest.param(op, *case, id="-".join((key, case[0], *(str(d)[6:] for d in case[1:]))))
                      for case in each]
    return pytest.mark.parametrize(names, found)


# -- comparison -------------------------------------------------------------------------------------------------------


def as_tuple(results):
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)


def upstreams(results, upstream):
    """Gradients of the results: one number or tensor for all, or one for each."""
    each = upstream if isinstance(upstream, (list, tuple)) else [upstream] * len(results)
    return [torch.as_tensor(one, dtype=result.dtype).expand_as(result)
            for one, result in zip(each, results, strict=True)]


def upstream_of(op, count, vocab):
    """Of every sign and size, one for each token; for a softmax, the sum of which is constant, one for each id."""
    return torch.linspace(-2, 3, vocab if "softmax" in op.name else count, dtype=torch.float64)


def gradients(results, leaves, upstream=1.0, **how):
    """Of the leaves that are there."""
    results = as_tuple(results)
    return torch.autograd.grad(results, [t for t in leaves if t is not None], upstreams(results, upstream), **how)


def expected(define, leaves, target, *, upstream=1.0, wide=torch.float64, **options):
    """Results and gradients by the definition: in float64, or (``wide=None``) unfused in the leaves' dtype."""
    leaves = [None if t is None else t.detach().to(wide or t.dtype).requires_grad_() for t in leaves]
    results = as_tuple(define(*leaves, target, **options))
    return [result.detach() for result in results], gradients(results, leaves, upstream)


def check(call, define, dtype, draw, *, upstream=1.0, seeds=6, extra=0.0, **options):
    """Results and gradients of ``call`` are as near the float64 truth as the unfused op's at this dtype, over the
    problems ``draw(seed) -> (*leaves, target)``. ``extra``: a relative rounding that is allowed for on top."""
    ours, theirs, ours_rows, theirs_rows = ({} for _ in range(4))
    for seed in range(-(-seeds // 3) if INTERPRETED else seeds):
        *leaves, target = draw(seed)
        true_results, true_grads = expected(define, leaves, target, upstream=upstream, **options)
        results = as_tuple(call(*leaves, target, **options))
        for result, true in zip(results, true_results, strict=True):
            assert result.shape == true.shape
            assert error(result.detach(), true) <= LOSS[dtype]
        grads = gradients(results, leaves, upstream)
        _, plain = expected(define, leaves, target, upstream=upstream, wide=None, **options)
        present = [leaf for leaf in leaves if leaf is not None]
        for place, (leaf, grad, true, eager) in enumerate(zip(present, grads, true_grads, plain, strict=True)):
            assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
            ours.setdefault(place, []).append(error(grad, true))
            theirs.setdefault(place, []).append(error(eager, true))
            if grad.ndim == 2 and true.any():
                ours_rows.setdefault(place, []).append(row_errors(grad, true))
                theirs_rows.setdefault(place, []).append(row_errors(eager, true))
    for place, found in ours.items():
        unfused = pooled(theirs[place])
        assert pooled(found) <= ((FACTOR * unfused) ** 2 + extra**2) ** 0.5 + ROUNDING[dtype], place
    for place, found in ours_rows.items():
        for quantile in (0.5, 0.99):
            bound = 1.25 * torch.cat(theirs_rows[place]).quantile(quantile) + extra + 10 * ROUNDING[dtype]
            assert torch.cat(found).quantile(quantile) <= bound, (place, quantile)


def pool(dtype) -> int:
    """How many problems it takes: what rounding to 16 bits does to one of them is chance."""
    return 8 if dtype.itemsize == 2 else 2


def pooled(errors):
    return (sum(e * e for e in errors) / len(errors)) ** 0.5


def check_op(op, backend, dtype, draw=None, **options):
    """``check`` of an op of the table."""
    def call(*args, **given):
        return op.call(*args, backend=backend, **given)

    check(call, op.define, dtype, draw or op.draw(dtype=dtype), **options)


# -- other tools ------------------------------------------------------------------------------------------------------


def flops(function):
    """Of the matrix products, those inside of custom ops too."""
    with torch.profiler.profile(with_flops=True) as profile:
        function()
    return sum(event.flops for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm"))


@contextlib.contextmanager
def planned(monkeypatch, name, rows, columns, tile):
    """Calls of a ``linear_*`` op work on chunks of these sizes."""
    with monkeypatch.context() as patch:
        patch.setattr(f"ssd_core.ops.{name}.plan_chunks", lambda demand, *_: ChunkPlan(
            rows, columns, tile, route=ROUTE if demand.tiled else "chunked"))
        yield
