"""The definitions behind the interfaces that every backend has: the same arguments as in ``ssd_core.chunked``."""

from __future__ import annotations

import contextlib

import torch

from ssd_core.reference import grad_filter as filters
from ssd_core.reference.cross_entropy import cross_entropy as define_cross_entropy
from ssd_core.reference.distill import distill as define_distill
from ssd_core.reference.head import logits as head_logits
from ssd_core.reference.head import outputs, widen
from ssd_core.reference.linear_cross_entropy import linear_cross_entropy as define_linear_cross_entropy
from ssd_core.reference.linear_distill import linear_distill as define_linear_distill
from ssd_core.reference.linear_logprob import linear_logprob as define_linear_logprob
from ssd_core.reference.log_softmax import log_softmax as define_log_softmax
from ssd_core.reference.logprob import logprob as define_logprob
from ssd_core.reference.softmax import softmax as define_softmax

TILE = 256


def linear_cross_entropy(
    input, linear_weight, linear_bias, ids, probs, dense, rows, *, class_weight, label_weight, row_scale, needs, chunks,
    keep_float32, dtype, logit_scale, softcap, temperature, vocab, vocab_start=0, group=None, grad_filter=0.0,
    grad_filter_weight=0.0, one_sign=False, vocab_order=None, **options,
):
    options |= {"class_weight": class_weight, "temperature": temperature, "logit_scale": logit_scale,
                "softcap": softcap or None, "dense": _take(dense, rows)}
    targets = _take(ids, rows).long(), _take(probs, rows)

    def define(x, weight, bias):
        return define_linear_cross_entropy(x, weight, *targets, linear_bias=bias, **options)

    leaves = [None if t is None else t.detach().to(dtype) for t in (input, linear_weight, linear_bias)]
    results, grads = _differentiated(define, leaves, rows, row_scale, needs)
    certificate = None
    if grad_filter or grad_filter_weight:
        certificate, grads = _filtered(
            leaves, rows, row_scale, grads, targets, options, (grad_filter, grad_filter_weight), vocab_order)
    return *results, certificate, *_cast(grads, (input, linear_weight, linear_bias), keep_float32)


def linear_distill(
    input, linear_weight, linear_bias, ids, probs, teacher_logits, teacher_input, teacher_weight, teacher_bias, labels,
    rows, *, class_weight, label_weight, row_scale, needs, chunks, keep_float32, dtype, group, vocab, vocab_start,
    with_ce, softcap, teacher_softcap, **options,
):
    teacher = {
        "ids": None if ids is None else _take(ids, rows).long(), "probs": _take(probs, rows),
        "teacher_logits": _take(teacher_logits, rows), "teacher_input": _take(teacher_input, rows),
        "teacher_weight": teacher_weight, "teacher_bias": teacher_bias, "labels": _take(labels, rows)}

    def define(x, weight, bias):
        return define_linear_distill(
            x, weight, linear_bias=bias, class_weight=class_weight, softcap=softcap or None,
            teacher_softcap=teacher_softcap or None, **teacher, **options)

    leaves = [None if t is None else t.detach().to(dtype) for t in (input, linear_weight, linear_bias)]
    results, grads = _differentiated(define, leaves, rows, row_scale, needs)
    return *results, *_cast(grads, (input, linear_weight, linear_bias), keep_float32)


def linear_logprob(
    input, linear_weight, linear_bias, ids, rows, *, row_scale, needs, chunks, keep_float32, dtype, softcap, group,
    vocab_start, **options,
):
    def define(x, weight, bias):
        return define_linear_logprob(x, weight, _take(ids, rows), linear_bias=bias, softcap=softcap or None, **options)

    leaves = [None if t is None else t.detach().to(dtype) for t in (input, linear_weight, linear_bias)]
    results, grads = _differentiated(define, leaves, rows, row_scale, needs)
    return *results, *_cast(grads, (input, linear_weight, linear_bias), keep_float32)


def cross_entropy(
    logits, ids, probs, dense, rows, *, class_weight, label_weight, row_scale, softcap, **options,
):
    def define(u):
        return define_cross_entropy(
            u, _take(ids, rows).long(), _take(probs, rows), dense=_take(dense, rows), class_weight=class_weight,
            softcap=softcap or None, **options)

    return _of_logits(define, logits, rows, row_scale)


def distill(
    logits, ids, probs, teacher_logits, labels, rows, *, class_weight, label_weight, row_scale, softcap, with_ce,
    **options,
):
    def define(u):
        return define_distill(
            u, ids=None if ids is None else _take(ids, rows).long(), probs=_take(probs, rows),
            teacher_u=_take(teacher_logits, rows), labels=_take(labels, rows), class_weight=class_weight,
            softcap=softcap or None, **options)

    return _of_logits(define, logits, rows, row_scale)


def logprob(logits, ids, rows, *, row_scale, softcap, **options):
    def define(u):
        return define_logprob(u, _take(ids, rows), softcap=softcap or None, **options)

    return _of_logits(define, logits, rows, row_scale)


def softmax(logits, *, temperature):
    return define_softmax(logits, temperature=temperature).to(logits.dtype)


def log_softmax(logits, *, temperature):
    return define_log_softmax(logits, temperature=temperature).to(logits.dtype)


def softmax_backward(grad, out, *, temperature):
    p = widen(out)
    return (p * (grad - (p * grad).sum(-1, keepdim=True)) / temperature).to(out.dtype)


def log_softmax_backward(grad, out, *, temperature):
    grad = widen(grad)
    return ((grad - widen(out).exp() * grad.sum(-1, keepdim=True)) / temperature).to(out.dtype)


def _of_logits(define, logits, rows, row_scale):
    results, (grad, *_) = _differentiated(lambda u, *_: define(u), [logits, None, None], rows, row_scale, [True] * 3)
    return *results, grad


def _filtered(leaves, rows, row_scale, grads, targets, options, bounds, vocab_order):
    """The certificate, and the gradients of input and weight from the filtered gradient of the head's outputs."""
    x, weight, bias = leaves[0] if rows is None else leaves[0][rows], *leaves[1:]
    u = outputs(x, weight, bias)
    z = head_logits(u, logit_scale=options["logit_scale"], softcap=options["softcap"]) / options["temperature"]
    ids, probs = targets
    used = torch.ones_like(ids) if probs is None else (probs > 0).long()
    protected = torch.zeros(z.shape, dtype=torch.int64, device=z.device).scatter_add_(1, ids * used, used) > 0
    order = filters.default_order(z.softmax(-1)) if vocab_order is None else vocab_order

    def outputs_gradient():
        with _autograd():
            leaf = u.detach().requires_grad_()
            loss, *_ = define_cross_entropy(leaf, *targets, **options)
            return torch.autograd.grad((loss * row_scale).sum(), leaf)[0]

    grad = torch.zeros_like(u) if row_scale is None else outputs_gradient()
    found, grads = [], list(grads)
    for place, bound in enumerate(bounds):
        if not bound:
            continue
        kept, skipped, active = filters.grad_filter(
            grad, z.softmax(-1), protected, delta=bound, tile=TILE, order=order)
        most, mean = (skipped.max(), skipped.mean()) if len(skipped) else (skipped.sum(), skipped.sum())
        found.append(torch.stack((most, mean, active.to(z.dtype).sum() / max(1, active.numel()))))
        if place == 0 and grads[0] is not None:
            d_rows = kept @ weight.to(kept.dtype)
            grads[0] = d_rows if rows is None else torch.zeros_like(leaves[0], dtype=kept.dtype).index_copy_(
                0, rows, d_rows)
        if place == 1 and grads[1] is not None:
            grads[1] = kept.T @ x.to(kept.dtype)
    found = torch.stack(found)
    return torch.stack((found[:, 0].max(), found[:, 1].max(), found[:, 2].mean())), grads


@contextlib.contextmanager
def _autograd():
    """Inside of a custom operator autograd is switched off at the dispatcher: on again."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    excluded = excluded.remove(torch._C.DispatchKey.AutogradFunctionality)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def _take(tensor, rows):
    return tensor if tensor is None or rows is None else tensor[rows]


def _differentiated(define, leaves, rows, row_scale, needs):
    """What ``define(x, weight, bias)`` gives of the rows that count, and the gradients of the first results, as many as
    ``row_scale`` has columns, each times its scale."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
    with _autograd():
        results = define(_take(leaves[0], rows), *leaves[1:])
        grads = [None] * 3
        wanted = [i for i, need in enumerate(needs) if need and row_scale is not None and leaves[i] is not None]
        if wanted:
            scales = row_scale.unsqueeze(-1) if row_scale.ndim == 1 else row_scale
            total = sum((result * scale).sum() for result, scale in zip(results, scales.unbind(-1), strict=False))
            for i, grad in zip(wanted, torch.autograd.grad(total, [leaves[i] for i in wanted]), strict=True):
                grads[i] = grad
    return [result.detach() for result in results], grads


def _cast(grads, tensors, keep_float32):
    return [None if grad is None else grad.to(torch.float32 if keep_float32 and i > 0 else tensor.dtype)
            for i, (grad, tensor) in enumerate(zip(grads, tensors, strict=True))]
