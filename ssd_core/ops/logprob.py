"""``logprob``: log-probability and entropy of given tokens, of logits that are there."""

from __future__ import annotations

import torch
from torch import Tensor

from ssd_core import backends, checks
from ssd_core.ops import autograd, tokens
from ssd_core.ops.linear_logprob import Logprob


@torch.library.custom_op("ssd_core::logprob", mutates_args=())
def _logprob(
    logits: Tensor,                     # (N, V)
    ids: Tensor,                        # (N,) int64
    valid: Tensor,                      # (N,) bool
    row_scale: Tensor | None,           # (N, 2); None: no gradient
    needs: list[bool],
    logit_scale: float,
    softcap: float,                     # 0: none
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(total, logprob, entropy, lse, argmax, d_logits)``: see ``_linear_cross_entropy``."""
    checks.labels_in_range(ids, valid, logits.shape[1], "target")
    rows = tokens.counting(valid)
    function = backends.resolve("logprob", logits.device, logits.dtype, backend)
    *results, d_logits = function(
        logits, ids, rows, row_scale=tokens.of_rows(row_scale, rows),
        logit_scale=logit_scale, softcap=softcap, temperature=temperature)
    logprob, entropy, lse, argmax = (tokens.spread(values, rows, len(logits)) for values in results)
    return lse.new_zeros(()), logprob, entropy, lse, argmax.long(), *autograd.present(logits, d_logits)


@_logprob.register_fake
def _(logits, ids, valid, row_scale, *_):
    wide = tokens.wide_dtype(logits.dtype)
    each = [logits.new_empty(logits.shape[0], dtype=kind) for kind in (wide, wide, wide, torch.int64)]
    return logits.new_empty((), dtype=wide), *each, autograd.empty_gradient(logits, row_scale is not None)


autograd.register(_logprob, tensors=4, gradients=1, differentiable=2)


def logprob(
    logits: Tensor, target: Tensor, *, ignore_index: int | None = -100, temperature: float = 1.0,
    logit_scale: float = 1.0, softcap: float | None = None, shift: bool = False, backend: str = "auto",
) -> Logprob:
    """Log-probability of given tokens and entropy. It equals::

        log_q = F.log_softmax(logits.float() / temperature, -1)
        logprob, entropy = log_q.gather(-1, target.unsqueeze(-1)).squeeze(-1), -(log_q.exp() * log_q).sum(-1)

    without (N, V) memory but for the gradient. ``logits`` (..., V) in any floating dtype, ``target`` (...) integer;
    options, result and errors as in ``linear_logprob``.
    """
    tokens.check_floats(logits, "logits", "V")
    checks.expect_type(target, "target", Tensor, "a tensor")
    tokens.check_same_device(logits, target=target)
    tokens.check_logit_options(temperature, logit_scale, softcap)
    shape = logits.shape[:-1]
    tokens.check_labels(target, "target", shape)
    ids, valid = tokens.labels(target, ignore_index, shift)
    flat = logits.reshape(-1, logits.shape[-1])
    _, *results = _logprob(
        flat, ids, valid, None, tokens.needs(flat), float(logit_scale), float(softcap or 0), float(temperature),
        backend)
    return Logprob(*(tokens.shaped(values, shape, shift) for values in results[:4]))
