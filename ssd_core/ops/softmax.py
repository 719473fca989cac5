"""``softmax`` of logits at a temperature."""

from __future__ import annotations

import torch
from torch import Tensor

from ssd_core import backends, checks
from ssd_core.ops import tokens


@torch.library.custom_op("ssd_core::softmax", mutates_args=())
def _softmax(logits: Tensor, temperature: float, log: bool, backend: str) -> Tensor:
    """(N, V)"""
    function = backends.resolve("log_softmax" if log else "softmax", logits.device, logits.dtype, backend)
    return function(logits, temperature=temperature)


@torch.library.custom_op("ssd_core::softmax_backward", mutates_args=())
def _softmax_backward(grad: Tensor, out: Tensor, temperature: float, log: bool, backend: str) -> Tensor:
    """(N, V) with respect to the logits."""
    op = "log_softmax_backward" if log else "softmax_backward"
    return backends.resolve(op, out.device, out.dtype, backend)(grad, out, temperature=temperature)


@_softmax.register_fake
def _(logits, *_):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_softmax_backward.register_fake
def _(grad, out, *_):
    return torch.empty_like(out)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output)
    ctx.constants = inputs[1:]


def _backward(ctx, grad):
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("softmax: create_graph=True is not supported (no second derivatives)")
    return _softmax_backward(grad, *ctx.saved_tensors, *ctx.constants), None, None, None


_softmax.register_autograd(_backward, setup_context=_save)


def softmax(logits: Tensor, temperature: float = 1.0, *, backend: str = "auto") -> Tensor:
    """It equals::

        F.softmax(logits.float() / temperature, -1).to(logits.dtype)

    and rounds once, without float32 copies. ``logits`` (..., V), any floating dtype; a row of -inf alone, or with a
    NaN or +inf, gives NaN.

    Raises:
        ValueError, TypeError: an argument does not fit. RuntimeError: ``create_graph=True``.
    """
    return of_rows(logits, temperature, False, backend)


def of_rows(logits, temperature, log: bool, backend: str):
    tokens.check_floats(logits, "logits", "V")
    checks.finite_positive(temperature, "temperature")
    return _softmax(logits.reshape(-1, logits.shape[-1]), float(temperature), log, backend).view(logits.shape)
