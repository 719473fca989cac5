"""``linear_cross_entropy``: from hidden states and the lm_head's weight to the loss, without (N, V) logits."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from ssd_core import backends, checks
from ssd_core.plan import plan_chunks
from ssd_core.targets import SparseTarget


class LossStats(NamedTuple):
    """What the loss was made of; constants, in the target's shape and 0 where a token is ignored."""

    nll: torch.Tensor           # negative log-likelihood, without class weight, smoothing, z-loss or token weight
    lse: torch.Tensor           # log-sum-exp of the logits
    denominator: torch.Tensor   # 0-d: what "mean" divides by


class _Reduced(torch.autograd.Function):
    """The summed loss, its gradients computed along with it: three products in all."""

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, run, needs, row_weight, scale):
        # float16 gradients of a mean underflow: there the scale's power of two, which rounds nothing, waits for the
        # backward, after loss scaling
        late = input.dtype == torch.float16
        early_scale, exponent = torch.frexp(scale) if late else (scale, None)
        loss, nll, lse, *grads = run(
            input, linear_weight, linear_bias, row_scale=row_weight * early_scale if any(needs) else None,
            needs=needs, keep_float32=late)
        ctx.save_for_backward(*grads, torch.ldexp(torch.ones_like(scale), exponent) if late else None)
        ctx.dtypes = [None if t is None else t.dtype for t in (input, linear_weight, linear_bias)]
        ctx.mark_non_differentiable(nll, lse)
        return (loss * row_weight).sum() * scale, nll, lse

    @staticmethod
    def backward(ctx, grad_loss, *_):
        _refuse_create_graph()
        *grads, late_scale = ctx.saved_tensors
        scale = grad_loss if late_scale is None else grad_loss * late_scale
        # In place only if nobody comes back for these gradients. 16-bit ones are rounded once more unless the scale
        # is a power of two: the price of computing them before it is known.
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        if not kept and scale.device.type == "cpu" and scale.item() == 1:
            scaled = grads
        elif kept:
            scaled = [None if grad is None else grad * scale for grad in grads]
        else:
            scaled = [None if grad is None else grad.mul_(scale) for grad in grads]
        cast = [None if grad is None else grad.to(dtype) for grad, dtype in zip(scaled, ctx.dtypes, strict=True)]
        return *cast, None, None, None, None


class _PerToken(torch.autograd.Function):
    """The loss of each token; the backward recomputes the logits, so that any upstream gradient is honoured."""

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, run, needs):
        loss, nll, lse, *_ = run(
            input, linear_weight, linear_bias, row_scale=None, needs=needs, keep_float32=False)
        ctx.save_for_backward(input, linear_weight, linear_bias)
        ctx.run, ctx.needs = run, needs
        ctx.mark_non_differentiable(nll, lse)
        return loss, nll, lse

    @staticmethod
    def backward(ctx, grad_loss, *_):
        _refuse_create_graph()
        *_, d_input, d_weight, d_bias = ctx.run(
            *ctx.saved_tensors, row_scale=grad_loss.contiguous(), needs=ctx.needs, keep_float32=False)
        return d_input, d_weight, d_bias, None, None


def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor | SparseTarget,
    *,
    linear_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    tail: str = "none",
    token_weight: torch.Tensor | None = None,
    num_items_in_batch: float | torch.Tensor | None = None,
    shift: bool = False,
    grad_filter: float = 0.0,
    grad_filter_weight: float | None = None,
    vocab_order: torch.Tensor | None = None,
    workspace_bytes: int | None = None,
    process_group=None,
    vocab_start: int = 0,
    backend: str = "auto",
    return_stats: bool = False,
):
    """Cross-entropy of a linear head, its (N, V) logits never materialised. With default options it equals::

        logits = F.linear(input, linear_weight, linear_bias).float()
        F.cross_entropy(logits.flatten(0, -2), target.flatten(), weight, ignore_index=ignore_index,
                        reduction=reduction, label_smoothing=label_smoothing)

    and in general the logits are ``z = softcap * tanh(logit_scale * linear(input) / softcap) / temperature``, the loss
    of a token with class weight ``c`` is ``c * (1 - label_smoothing) * nll + label_smoothing * smooth + z_loss *
    logsumexp(z) ** 2``, times its ``token_weight``. A SparseTarget with weights ``w`` on ids ``a``, ``S = w.sum()``,
    has ``nll = S * logsumexp(z) - (w * z[a]).sum()``.

    Args:
        input: (..., D) hidden states; float64, float32, bfloat16 or float16.
        linear_weight: (V, D) of input's dtype (under autocast both are cast).
        target: (...) integer labels in [0, V) or ``ignore_index``, or a SparseTarget of shape (...).
        linear_bias: (V,).
        weight: (V,) class weights, for hard labels.
        reduction: "mean" divides by ``num_items_in_batch``, or else by the sum of token weights times class weights
            of the tokens that are not ignored; "sum"; "none" returns (...) with 0 for ignored tokens.
        temperature, logit_scale, softcap, z_loss: see above.
        tail: for sparse targets whose weights do not sum to 1. "none": as they are. "renormalise": divided by S.
            "bucket": what is missing to 1 is the target's probability of all other ids together.
        token_weight: (...) constant factors of the tokens' losses.
        num_items_in_batch: the denominator of "mean" over all micro-batches and ranks; a number or 0-d tensor.
        shift: token t of ``input`` predicts token t + 1 of ``target`` along the last axis of ``target``; "none" then
            returns (..., T - 1).
        workspace_bytes: memory beyond inputs and returned gradients (16-bit weights add one float32 accumulator of
            their gradient); by default 64 MiB on a CPU, 512 MiB on an accelerator.
        grad_filter, grad_filter_weight, vocab_order, process_group, vocab_start: in no backend yet; they raise.
        backend: "auto", or one of those that ``ssd-core info`` lists.
        return_stats: also return LossStats.

    Returns:
        The loss in float32 (float64 for float64 input), or (loss, LossStats). If no token counts it is 0, with zero
        gradients.

    Raises:
        ValueError, TypeError: an argument does not fit. IndexError: a label outside [0, V), on CPU; elsewhere the
        loss is not finite. RuntimeError: ``create_graph=True``, which is not supported.
    """
    checks.expect(reduction in ("none", "mean", "sum"), "reduction", "'none', 'mean' or 'sum'", repr(reduction))
    checks.expect(tail in ("none", "renormalise", "bucket"), "tail", "'none', 'renormalise' or 'bucket'", repr(tail))
    _check_tensors(input, linear_weight, linear_bias, weight, target, token_weight)
    checks.finite_positive(temperature, "temperature")
    checks.finite_positive(logit_scale, "logit_scale")
    checks.expect(math.isfinite(z_loss) and z_loss >= 0, "z_loss", "a finite number, at least 0", z_loss)
    checks.in_range(label_smoothing, "label_smoothing", 0, 1)
    if softcap is not None:
        checks.finite_positive(softcap, "softcap")
    input, linear_weight, linear_bias = _autocast(input, linear_weight, linear_bias)
    checks.expect(linear_weight.dtype == input.dtype, "linear_weight", f"{input.dtype} like input", linear_weight.dtype)

    shape = target.shape
    vocab = linear_weight.shape[0]
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    ids, probs, valid = _token_targets(target, ignore_index, tail, vocab, weight, wide)
    token_weights = torch.ones(shape, dtype=wide, device=input.device) if token_weight is None else token_weight
    if shift:
        valid, ids, token_weights = _shifted(valid), _shifted(ids, -2), _shifted(token_weights)
        probs = None if probs is None else _shifted(probs, -2)
    ids, valid = ids.reshape(-1, ids.shape[-1]), valid.reshape(-1)
    probs = None if probs is None else probs.reshape(ids.shape)

    rows = None if valid.all() else valid.nonzero().squeeze(-1)     # ignored rows meet no product
    row_weight = token_weights.reshape(-1).to(wide)
    row_weight = row_weight if rows is None else row_weight[rows]
    class_weight = None if weight is None else weight.to(wide)
    if num_items_in_batch is not None:
        denominator = torch.as_tensor(num_items_in_batch, device=input.device).to(wide)
        checks.expect(denominator.ndim == 0, "num_items_in_batch", "a number or 0-d tensor", denominator.shape)
    else:
        counted = ids[:, 0] if rows is None else ids[rows, 0]
        denominator = (row_weight if class_weight is None else row_weight * class_weight[counted]).sum()

    lacking = {"grad_filter": grad_filter, "grad_filter_weight": grad_filter_weight, "vocab_order": vocab_order,
               "process_group": process_group, "vocab_start": vocab_start}
    options = [name for name, value in lacking.items() if value is not None and (torch.is_tensor(value) or value != 0)]
    function = backends.resolve("linear_cross_entropy", input.device, input.dtype, backend, options)
    chunks = plan_chunks(
        valid.shape[0] if rows is None else rows.shape[0], input.shape[-1], vocab, ids.shape[-1], dtype=input.dtype,
        device=input.device, gathered=rows is not None, workspace_bytes=workspace_bytes)
    run = functools.partial(
        _without_autocast, function, ids=ids, probs=probs, rows=rows, class_weight=class_weight, chunks=chunks,
        label_smoothing=label_smoothing, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
        z_loss=z_loss, bucket=tail == "bucket")

    head = (input.reshape(-1, input.shape[-1]), linear_weight, linear_bias)
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in head)
    if reduction == "none":
        loss, nll, lse = _PerToken.apply(*head, run, needs)
        loss = _spread(loss * row_weight, rows, shape, shift)
    else:
        scale = torch.ones_like(denominator)
        if reduction == "mean":
            scale = torch.where(denominator == 0, 0, 1 / denominator)
        loss, nll, lse = _Reduced.apply(*head, run, needs, row_weight, scale)
    if return_stats:
        return loss, LossStats(_spread(nll, rows, shape, shift), _spread(lse, rows, shape, shift), denominator)
    return loss


def _check_tensors(input, linear_weight, linear_bias, weight, target, token_weight):
    for name, tensor in (("input", input), ("linear_weight", linear_weight)):
        checks.expect_type(tensor, name, torch.Tensor, "a tensor")
    checks.expect_type(target, "target", (torch.Tensor, SparseTarget), "a tensor or a SparseTarget")
    floats = input.is_floating_point() and input.ndim > 0
    checks.expect(floats, "input", "floating point (..., D)", checks.describe(input))
    hidden = input.shape[-1]
    matrix = linear_weight.ndim == 2 and linear_weight.shape[1] == hidden and linear_weight.shape[0] > 0
    checks.expect(matrix, "linear_weight", f"(V, {hidden})", checks.describe(linear_weight))
    vocab, tokens = linear_weight.shape[0], input.shape[:-1]
    checks.expect(target.shape == tokens, "target", f"{tuple(tokens)} like input without D", tuple(target.shape))
    if isinstance(target, torch.Tensor):
        integers = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
        checks.expect(integers, "target", "integer labels or a SparseTarget", checks.describe(target))
    vectors = (("linear_bias", linear_bias, (vocab,)), ("weight", weight, (vocab,)),
               ("token_weight", token_weight, tuple(tokens)))
    for name, tensor, shape in vectors:
        if tensor is not None:
            fits = tensor.is_floating_point() and tuple(tensor.shape) == shape
            checks.expect(fits, name, f"floating point {shape}", checks.describe(tensor))
    for name, tensor in (("weight", weight), ("token_weight", token_weight)):
        constant = tensor is None or not tensor.requires_grad
        checks.expect(constant, name, "a constant (no gradient reaches it)", "a tensor that requires grad")
    others = (("linear_weight", linear_weight), ("target", target), ("linear_bias", linear_bias), ("weight", weight),
              ("token_weight", token_weight))
    for name, tensor in others:
        same = tensor is None or tensor.device == input.device
        checks.expect(same, name, f"a tensor on {input.device} like input", None if same else tensor.device)


def _token_targets(target, ignore_index, tail, vocab, weight, wide):
    """ids (..., K), probs (..., K) or None for hard labels, and which tokens count (...)."""
    if isinstance(target, torch.Tensor):
        checks.expect(tail == "none", "tail", "'none' with hard labels", repr(tail))
        valid = target != ignore_index
        checks.labels_in_range(target[valid], vocab, "target")
        return target.where(valid, 0).unsqueeze(-1), None, valid
    checks.expect(weight is None, "weight", "None with a SparseTarget", "class weights")
    used = target.probs > 0
    checks.labels_in_range(target.ids[used], vocab, "target.ids")
    probs = target.probs.to(wide)
    if probs.device.type == "cpu":
        checks.expect(not (probs < 0).any(), "target.probs", "weights of at least 0", "a negative one")
    if tail == "renormalise":
        probs = probs / probs.sum(-1, keepdim=True).clamp_min(torch.finfo(probs.dtype).tiny)
    return target.ids, probs, used.any(-1)


def _autocast(*tensors):
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _without_autocast(function, input, *args, **options):
    with torch.autocast(input.device.type, enabled=False):
        return function(input, *args, **options)


def _shifted(tensor, axis=-1):
    """Tokens 1 to T - 1, then zeros in the last place (which for ``valid`` means ignored)."""
    checks.expect(tensor.ndim >= -axis, "target", "a time axis to shift along", tuple(tensor.shape))
    later, last = tensor.narrow(axis, 1, tensor.shape[axis] - 1), tensor.narrow(axis, 0, 1)
    return torch.cat((later, torch.zeros_like(last)), axis)


def _spread(values, rows, shape, shift):
    """(M,) values of the tokens that count -> the target's shape, 0 elsewhere."""
    if rows is not None:
        values = values.new_zeros(shape.numel()).index_copy(0, rows, values)
    values = values.reshape(shape)
    return values[..., :-1] if shift else values


def _refuse_create_graph():
    if torch.is_grad_enabled():
        raise RuntimeError("linear_cross_entropy: create_graph=True is not supported (no second derivatives)")
