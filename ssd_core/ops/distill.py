"""``distill``: logits that are there against a teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from ssd_core import backends, checks
from ssd_core.ops import autograd, tokens
from ssd_core.ops.linear_distill import DistillStats, check_distill, check_values, distill_targets
from ssd_core.targets import SparseTarget, TeacherLogits


@torch.library.custom_op("ssd_core::distill", mutates_args=())
def _distill(
    logits: Tensor,                     # (N, V)
    ids: Tensor | None,                 # (N, K) of a sparse teacher
    probs: Tensor | None,               # (N, K)
    teacher_logits: Tensor | None,      # (N, V')
    labels: Tensor | None,              # (N,)
    valid: Tensor,                      # (N,) bool
    class_weight: Tensor | None,        # (V,)
    label_weight: Tensor | None,        # (N,)
    row_scale: Tensor | None,           # (N,); None: no gradient
    needs: list[bool],
    options: list[float],               # logit_scale, softcap, temperature, beta, ce_weight, label_smoothing, z_loss
    divergence: str,
    tail: str,
    temperature_squared: bool,
    with_ce: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(total, loss, divergence, nll, lse, d_logits)``: see ``_linear_cross_entropy``."""
    check_values(ids, probs, labels, valid, logits.shape[1])
    rows = tokens.counting(valid)
    function = backends.resolve("distill", logits.device, logits.dtype, backend)
    logit_scale, softcap, temperature, beta, ce_weight, label_smoothing, z_loss = options
    *results, d_logits = function(
        logits, ids, probs, teacher_logits, labels, rows, class_weight=class_weight, label_weight=label_weight,
        row_scale=tokens.of_rows(row_scale, rows), logit_scale=logit_scale,
        softcap=softcap, temperature=temperature, beta=beta, ce_weight=ce_weight, label_smoothing=label_smoothing,
        z_loss=z_loss, divergence=divergence, tail=tail, temperature_squared=temperature_squared, with_ce=with_ce)
    loss, value, nll, lse = (tokens.spread(values, rows, len(logits)) for values in results)
    return loss.new_zeros(()), loss, value, nll, lse, *autograd.present(logits, d_logits)


@_distill.register_fake
def _(logits, ids, probs, teacher_logits, labels, valid, class_weight, label_weight, row_scale, *_):
    wide = tokens.wide_dtype(logits.dtype)
    each = [logits.new_empty(logits.shape[0], dtype=wide) for _ in range(4)]
    return logits.new_empty((), dtype=wide), *each, autograd.empty_gradient(logits, row_scale is not None)


autograd.register(_distill, tensors=9, gradients=1)


def distill(
    logits: Tensor,
    teacher: SparseTarget | TeacherLogits,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    tail: str = "bucket",
    target: Tensor | None = None,
    ce_weight: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
    shift: bool = False,
    backend: str = "auto",
    return_stats: bool = False,
):
    """Divergence from a teacher to logits. For TeacherLogits it equals::

        q = F.log_softmax(logits.float() / temperature, -1)
        p = F.log_softmax(teacher_logits.float() / temperature, -1)
        F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()            # forward_kl

    without float32 copies: beyond the logits there is their gradient only. ``logits`` (..., V) in any floating dtype,
    ``teacher`` a SparseTarget or TeacherLogits; options, result and errors as in ``linear_distill``.
    """
    checks.expect_type(teacher, "teacher", (SparseTarget, TeacherLogits), "a SparseTarget or TeacherLogits")
    checks.one_of(reduction, "reduction", tokens.REDUCTIONS)
    tokens.check_floats(logits, "logits", "V")
    tokens.check_logit_options(temperature, logit_scale, softcap, z_loss, label_smoothing)
    shape = logits.shape[:-1]
    check_distill(teacher, target, shape, logits.device, divergence, beta, tail, ce_weight, temperature_squared)
    tokens.check_constants(weight=weight, token_weight=token_weight)
    tokens.check_same_device(logits, weight=weight, token_weight=token_weight)
    tokens.check_vectors(weight=(weight, logits.shape[-1:]), token_weight=(token_weight, shape))
    wide = tokens.wide_dtype(logits.dtype)
    ids, probs, labels, valid = distill_targets(teacher, target, shape, ignore_index, shift, wide, logits.device)
    class_weight = None if weight is None else weight.to(wide)
    label_weight = None
    if class_weight is not None and labels is not None:
        label_weight = tokens.label_weights(class_weight, labels, 0, None)
    row_weight = tokens.row_weights(token_weight, shape, shift, wide, logits.device) * valid

    flat = logits.reshape(-1, logits.shape[-1])
    dense = teacher.logits.reshape(-1, teacher.logits.shape[-1]) if isinstance(teacher, TeacherLogits) else None
    numbers = [float(logit_scale), float(softcap or 0), float(temperature), float(beta), float(ce_weight),
               float(label_smoothing if ce_weight else 0), float(z_loss)]
    with_ce = labels is not None or z_loss > 0 or return_stats
    _, loss, value, nll, lse, _ = _distill(
        flat, ids, probs, dense, labels, valid, class_weight, label_weight, None, tokens.needs(flat), numbers,
        divergence, tail, temperature_squared, with_ce, backend)
    denominator = tokens.mean_denominator(num_items_in_batch, row_weight, wide)
    loss = tokens.reduced(loss * row_weight, reduction, denominator, shape, shift)
    if return_stats:
        return loss, DistillStats(*(tokens.shaped(values, shape, shift) for values in (value, nll, lse)), denominator)
    return loss
