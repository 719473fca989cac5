"""Gradients of the custom operators: either they come with a total, or they are computed again in the backward.

Every operator has the form ``op(*tensors, needs, *constants) -> (total, *results, *gradients)``. The last tensor is
the row scale. Given that, total is the sum of scale times result and the gradients, of the first tensors, are those of
total. Without it there is neither.
"""

from __future__ import annotations

import torch

from ssd_core.ops import tokens


def register(op, *, tensors: int, gradients: int, differentiable: int = 1) -> None:
    """Differentiate ``op`` in ``total`` or, without a row scale, in its ``differentiable`` first results, token by
    token and for any upstream gradient. ``tensors`` counts them, the row scale included."""
    scale = tensors - 1
    name = op._name.removeprefix("ssd_core::")

    def save(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.reduced = inputs[scale] is not None
        constants = output[1:] if ctx.reduced else (output[0], *output[1 + differentiable :])
        ctx.mark_non_differentiable(*constants)
        kept = inputs[:tensors]
        ctx.constants, ctx.needs = inputs[tensors:], inputs[tensors]
        ctx.dtypes = [None if t is None else t.dtype for t in kept[:gradients]]
        if ctx.reduced:
            kept = [grad if need else None for grad, need in zip(output[-gradients:], ctx.needs, strict=True)]
        ctx.save_for_backward(*kept)

    def backward(ctx, grad_total, *grad_results):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(f"{name}: create_graph=True is not supported (no second derivatives)")
        nothing = [None] * (tensors - gradients + len(ctx.constants))
        upstream = [grad_total] if ctx.reduced else grad_results[:differentiable]
        if all(grad is None for grad in upstream):
            return *[None] * gradients, *nothing
        if ctx.reduced:
            return *_scaled(ctx.saved_tensors, grad_total, ctx.dtypes), *nothing
        some = next(grad for grad in upstream if grad is not None)
        upstream = [torch.zeros_like(some) if grad is None else grad for grad in upstream]
        again = list(ctx.saved_tensors)
        again[scale] = torch.stack(upstream, -1) if differentiable > 1 else some.contiguous()
        found = op(*again, *ctx.constants)[-gradients:]
        return *(grad.to(dtype) if need else None for grad, dtype, need in zip(
            found, ctx.dtypes, ctx.needs, strict=True)), *nothing

    op.register_autograd(backward, setup_context=save)


def _scaled(grads, scale, dtypes):
    """Saved gradients times the upstream one, in their tensors' dtypes. In place only if nobody comes back for them;
    16-bit ones are rounded once more unless the scale is a power of two: the price of computing them before it is
    known."""
    traced = torch.compiler.is_compiling() or type(scale) is not torch.Tensor      # no values to look at
    kept = traced or torch._C._autograd._get_current_graph_task_keep_graph()
    if not kept and scale.device.type == "cpu" and scale.item() == 1:
        return [None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]
    times = torch.Tensor.mul if kept else torch.Tensor.mul_
    return [None if grad is None else times(grad, scale).to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]


def reduced(op, tensors, constants, reduction: str, row_weight, denominator, dtype, *, results: int):
    """The loss of a head, (N,) or reduced, and the other results of ``op``, ``results`` in all."""
    if reduction == "none":
        _, loss, *others = op(*tensors, None, *constants)[: 1 + results]
        return loss * row_weight, *others
    scale = tokens.reciprocal(denominator) if reduction == "mean" else torch.ones_like(denominator)
    early, late = tokens.split_scale(scale, dtype)
    loss, _, *others = op(*tensors, row_weight * early, *constants)[: 1 + results]
    return loss if late is None else loss * late, *others


def present(like, *grads):
    """An operator returns tensors only: those that nobody asked for are empty."""
    return [like.new_empty(0) if grad is None else grad for grad in grads]


def empty_head_gradients(input, linear_weight, linear_bias, needs, scaled: bool, wide: bool = True):
    """For a fake kernel: of a head. With ``wide``, float16 ones of weight and bias stay in float32 until they are
    scaled."""
    wide = torch.float32 if wide and input.dtype == torch.float16 else None
    return [torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format) if need and scaled
            else input.new_empty(0)
            for tensor, need, dtype in zip((input, linear_weight, linear_bias), needs, (None, wide, wide), strict=True)]


def empty_gradient(tensor, scaled: bool):
    """For a fake kernel: of logits."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format) if scaled else tensor.new_empty(0)
