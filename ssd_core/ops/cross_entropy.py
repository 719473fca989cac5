"""``cross_entropy``: of logits that are there."""

from __future__ import annotations

import torch
from torch import Tensor

from ssd_core import backends, checks
from ssd_core.ops import autograd, tokens
from ssd_core.ops.linear_cross_entropy import LossStats, Options, loss_targets
from ssd_core.targets import SparseTarget


@torch.library.custom_op("ssd_core::cross_entropy", mutates_args=())
def _cross_entropy(
    logits: Tensor,                     # (N, V)
    ids: Tensor,                        # (N, K); with dense targets not looked at
    probs: Tensor | None,               # (N, K); None: hard labels, K = 1
    dense: Tensor | None,               # (N, V) class probabilities
    valid: Tensor,                      # (N,) bool
    class_weight: Tensor | None,        # (V,)
    label_weight: Tensor | None,        # (N,) class weight of each label
    row_scale: Tensor | None,           # (N,); None: no gradient
    needs: list[bool],
    options: list[float],
    bucket: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(total, loss, nll, lse, d_logits)``: see ``_linear_cross_entropy``."""
    if dense is None:
        tokens.check_target_values(ids, probs, valid, logits.shape[1], "target")
    rows = tokens.counting(valid)
    function = backends.resolve(
        "cross_entropy", logits.device, logits.dtype, backend, [] if dense is None else ["class probabilities"])
    *results, d_logits = function(
        logits, ids, probs, dense, rows, class_weight=class_weight, label_weight=label_weight,
        row_scale=tokens.of_rows(row_scale, rows), bucket=bucket,
        **Options(*options)._asdict())
    loss, nll, lse = (tokens.spread(values, rows, len(logits)) for values in results)
    return loss.new_zeros(()), loss, nll, lse, *autograd.present(logits, d_logits)


@_cross_entropy.register_fake
def _(logits, ids, probs, dense, valid, class_weight, label_weight, row_scale, *_):
    wide = tokens.wide_dtype(logits.dtype)
    each = [logits.new_empty(logits.shape[0], dtype=wide) for _ in range(3)]
    return logits.new_empty((), dtype=wide), *each, autograd.empty_gradient(logits, row_scale is not None)


autograd.register(_cross_entropy, tensors=8, gradients=1)


def cross_entropy(
    logits: Tensor,
    target: Tensor | SparseTarget,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    tail: str = "none",
    token_weight: Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
    shift: bool = False,
    backend: str = "auto",
    return_stats: bool = False,
):
    """Cross-entropy of logits. With default options it equals::

        F.cross_entropy(logits.float().flatten(0, -2), target.flatten(), weight, ignore_index=ignore_index,
                        reduction=reduction, label_smoothing=label_smoothing)

    without float32 copies of the logits: beyond them there is their gradient only. ``logits`` (..., V) in any floating
    dtype, the vocabulary last; options, result and errors as in ``linear_cross_entropy``.
    """
    checks.one_of(reduction, "reduction", tokens.REDUCTIONS)
    tokens.check_floats(logits, "logits", "V")
    checks.expect_type(target, "target", (Tensor, SparseTarget), "a tensor or a SparseTarget")
    tokens.check_logit_options(temperature, logit_scale, softcap, z_loss, label_smoothing)
    tokens.check_constants(weight=weight, token_weight=token_weight)
    tokens.check_same_device(logits, target=target, weight=weight, token_weight=token_weight)
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    tokens.check_vectors(weight=(weight, logits.shape[-1:]), token_weight=(token_weight, shape))
    wide = tokens.wide_dtype(logits.dtype)
    ids, probs, dense, valid = loss_targets(target, shape, vocab, ignore_index, tail, weight, wide, shift)
    row_weight = tokens.row_weights(token_weight, shape, shift, wide, logits.device) * valid
    class_weight = None if weight is None else weight.to(wide)
    label_weight = None
    if class_weight is not None and dense is None:
        label_weight = tokens.label_weights(class_weight, ids[:, 0], 0, None)

    flat = logits.reshape(-1, vocab)
    numbers = Options(
        float(logit_scale), float(softcap or 0), float(temperature), float(label_smoothing), float(z_loss))
    _, loss, nll, lse, _ = _cross_entropy(
        flat, ids, probs, dense, valid, class_weight, label_weight, None, tokens.needs(flat), list(numbers),
        tail == "bucket", backend)
    denominator = tokens.mean_denominator(
        num_items_in_batch, row_weight if label_weight is None else row_weight * label_weight, wide)
    loss = tokens.reduced(loss * row_weight, reduction, denominator, shape, shift)
    if return_stats:
        zero, one = torch.zeros_like(denominator), torch.ones_like(denominator)
        each = (tokens.shaped(values, shape, shift) for values in (nll, lse))
        return loss, LossStats(*each, denominator, zero, zero.clone(), one)
    return loss
