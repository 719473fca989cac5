"""Losses over several heads at once, as ``F.linear_cross_entropy`` defines them: one head per position."""

from __future__ import annotations

import torch
from torch import Tensor

from ssd_core import checks
from ssd_core.ops import tokens
from ssd_core.targets import SparseTarget


def k_dimensional(loss, input, linear_weight, target, *, linear_bias, reduction, return_stats, **options):
    """``loss`` (linear_cross_entropy) with a weight (V, d_1, ..., d_K, D) and a bias (V, d_1, ..., d_K): position p of
    (d_1, ..., d_K) has the head ``linear_weight[:, p]``. ``input`` (N, D); ``target`` labels (N, d_1, ..., d_K) or
    probabilities (N, V, d_1, ..., d_K)."""
    checks.one_of(reduction, "reduction", tokens.REDUCTIONS)
    tokens.check_floats(input)
    checks.expect(input.ndim == 2, "input", "(N, D) with a K-dimensional linear_weight", input)
    fits = linear_weight.shape[-1] == input.shape[-1]
    checks.expect(fits, "linear_weight", f"(V, d_1, ..., d_K, {input.shape[-1]})", linear_weight)
    checks.expect(not isinstance(target, SparseTarget), "target", "labels or class probabilities", "a SparseTarget")
    checks.expect_type(target, "target", Tensor, "a tensor")
    for name, default in (("shift", False), ("token_weight", None), ("process_group", None)):
        asked = options[name] is not default
        checks.expect(not asked, name, f"{default} with a K-dimensional linear_weight", options[name])
    checks.expect(not return_stats, "return_stats", "False with a K-dimensional linear_weight", return_stats)
    vocab, *positions, _ = linear_weight.shape
    if linear_bias is not None:
        tokens.check_vectors(linear_bias=(linear_bias, linear_weight.shape[:-1]))
        linear_bias = linear_bias.flatten(1)
    labels, probabilities = (len(input), *positions), (len(input), vocab, *positions)
    dense = target.shape == probabilities and target.is_floating_point()
    fits = dense or target.shape == labels
    checks.expect(fits, "target", f"labels {labels} or probabilities {probabilities}", target)

    # 16-bit gradients of the input are added up over the heads in float32
    wide = input.to(tokens.wide_dtype(input.dtype))
    weights, targets = linear_weight.flatten(1, -2), target.flatten(2) if dense else target.flatten(1)
    shared = options | {"num_items_in_batch": None}
    how = "none" if reduction == "none" else "sum"
    losses, denominators = zip(*(
        loss(wide.to(input.dtype), weights[:, p], targets[..., p], reduction=how, return_stats=True,
             linear_bias=None if linear_bias is None else linear_bias[:, p], **shared)
        for p in range(weights.shape[1])), strict=True)
    if reduction == "none":
        return torch.stack(losses, -1).view(labels)
    total = torch.stack(losses).sum()
    if reduction == "sum":
        return total
    number = options["num_items_in_batch"]
    denominator = tokens.mean_denominator(
        number, torch.stack([stats.denominator for stats in denominators]), total.dtype)
    return total * tokens.reciprocal(denominator)
