"""``linear_cross_entropy``: from hidden states and the lm_head's weight to the loss, without (N, V) logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssd_core import backends, checks, groups
from ssd_core.ops import autograd, tokens
from ssd_core.ops.k_dimensional import k_dimensional
from ssd_core.plan import Demand, plan_chunks
from ssd_core.targets import SparseTarget


class LossStats(NamedTuple):
    """What the loss was made of; constants, in the target's shape and 0 where a token is ignored."""

    nll: Tensor             # negative log-likelihood, without class weight, smoothing, z-loss or token weight
    lse: Tensor             # log-sum-exp of the logits
    denominator: Tensor     # 0-d: what "mean" divides by
    skipped_max: Tensor     # 0-d: the largest softmax mass of a token that the gradient filter skipped
    skipped_mean: Tensor    # 0-d: the mean
    active: Tensor          # 0-d: fraction of (token, vocabulary tile) pairs that it did not skip


class Options(NamedTuple):
    """Numbers that the loss depends on."""

    logit_scale: float
    softcap: float              # 0: none
    temperature: float
    label_smoothing: float
    z_loss: float


@torch.library.custom_op("ssd_core::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    input: Tensor,                      # (N, D)
    linear_weight: Tensor,              # (V, D)
    linear_bias: Tensor | None,         # (V,)
    ids: Tensor,                        # (N, K); with dense targets not looked at
    probs: Tensor | None,               # (N, K); None: hard labels, K = 1
    dense: Tensor | None,               # (N, V) class probabilities
    valid: Tensor,                      # (N,) bool
    class_weight: Tensor | None,        # (V,)
    label_weight: Tensor | None,        # (N,) class weight of each label
    vocab_order: Tensor | None,         # (V,)
    row_scale: Tensor | None,           # (N,); None: no total and no gradients
    needs: list[bool],                  # gradients of input, weight, bias
    dtype: torch.dtype,                 # of products
    options: list[float],
    bucket: bool,
    filters: list[float],               # of d_input, of d_weight
    one_sign: bool,                     # whether no token's weight can have another sign than another's
    workspace_bytes: int | None,
    process_group: str,
    vocab_start: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(total, loss, nll, lse, certificate, d_input, d_weight, d_bias)``: total 0-d is ``(row_scale * loss).sum()``,
    its gradients those that ``needs`` asks for (the others are empty), in float32 for float16; loss, nll, lse (N,)."""
    group = groups.find(process_group)
    vocab = groups.total(len(linear_weight), input.device, group)
    if dense is None:
        tokens.check_target_values(ids, probs, valid, vocab, "target")
    if vocab_order is not None:
        checks.permutation(vocab_order, "vocab_order")
    rows = tokens.counting(valid)
    numbers = Options(*options)
    named = {"grad_filter": filters[0], "grad_filter_weight": filters[1], "process_group": process_group,
             "class probabilities": dense is not None}
    serving = backends.choose(
        "linear_cross_entropy", input.device, dtype, backend, [name for name, value in named.items() if value])
    demand = Demand(
        len(input) if rows is None else len(rows), input.shape[1],
        groups.largest(len(linear_weight), input.device, group), ids.shape[1], dtype, input.device,
        gathered=rows is not None, cast=tokens.packed(linear_weight, dtype), d_weight=needs[1],
        ranks=groups.size(group), summed=len(input) if process_group else 0,
        softcap=numbers.softcap > 0, smoothing=numbers.label_smoothing > 0,
        dense=dense is not None, looks=int(dense is None),
        wide_input=input.dtype.itemsize == 2 and bool(process_group or any(filters)), filtered=len(set(filters) - {0}),
        buffers=6 + (bucket or dense is not None) + (numbers.temperature != 1))
    demand = serving.counted(demand)
    with tokens.without_autocast(input.device):
        *results, certificate, d_input, d_weight, d_bias = serving.load()(
            input, linear_weight, linear_bias, ids, probs, dense, rows, class_weight=class_weight,
            label_weight=label_weight, row_scale=tokens.of_rows(row_scale, rows),
            needs=needs, chunks=plan_chunks(demand, workspace_bytes), keep_float32=input.dtype == torch.float16,
            dtype=dtype, group=group, vocab=vocab, vocab_start=vocab_start, grad_filter=filters[0],
            grad_filter_weight=filters[1], one_sign=one_sign, vocab_order=vocab_order, bucket=bucket,
            **numbers._asdict())
    loss, nll, lse = (tokens.spread(values, rows, len(input)) for values in results)
    total = loss.new_zeros(()) if row_scale is None else (loss * row_scale).sum()
    if certificate is None:
        certificate = loss.new_zeros(3)
        certificate[2].fill_(1)
    return total, loss, nll, lse, certificate, *autograd.present(input, d_input, d_weight, d_bias)


@_linear_cross_entropy.register_fake
def _(input, linear_weight, linear_bias, ids, probs, dense, valid, class_weight, label_weight, vocab_order, row_scale,
      needs, dtype, *_):
    wide = tokens.wide_dtype(dtype)
    each = [input.new_empty(input.shape[0], dtype=wide) for _ in range(3)]
    grads = autograd.empty_head_gradients(input, linear_weight, linear_bias, needs, row_scale is not None)
    return input.new_empty((), dtype=wide), *each, input.new_empty(3, dtype=wide), *grads


autograd.register(_linear_cross_entropy, tensors=11, gradients=3)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | SparseTarget,
    *,
    linear_bias: Tensor | None = None,
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
    grad_filter: float = 0.0,
    grad_filter_weight: float | None = None,
    vocab_order: Tensor | None = None,
    workspace_bytes: int | None = None,
    process_group=None,
    vocab_start: int = 0,
    backend: str = "auto",
    return_stats: bool = False,
    options=None,
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
        linear_weight: (V, D) of input's dtype; under autocast any, and products are taken in autocast's dtype. For
            K-dimensional losses (V, d_1, ..., d_K, D), as ``F.linear_cross_entropy`` has them.
        target: (...) integer labels in [0, V) or ``ignore_index``; a SparseTarget of shape (...); or floating point
            class probabilities (..., V).
        linear_bias: (V,).
        weight: (V,) class weights, for hard labels and class probabilities.
        reduction: "mean" divides by ``num_items_in_batch``, or else by the sum of token weights times class weights
            of the tokens that are not ignored; "sum"; "none" returns (...) with 0 for ignored tokens.
        ignore_index: None is -100. Of hard labels only; sparse targets whose weights are all 0 are ignored.
        temperature, logit_scale, softcap, z_loss: see above.
        tail: for sparse targets whose weights do not sum to 1. "none": as they are. "renormalise": divided by S.
            "bucket": what is missing to 1 is the target's probability of all other ids together.
        token_weight: (...) constant factors of the tokens' losses.
        num_items_in_batch: the denominator of "mean" over all micro-batches and ranks; a number or 0-d tensor.
        shift: token t of ``input`` predicts token t + 1 of ``target`` along the last axis of ``target``; "none" then
            returns (..., T - 1).
        grad_filter: bound on the softmax mass of a token that may be left out of the products that make input's
            gradient; the rest is replaced by its rank-1 moment match, so that the gradient's row and column sums stay
            exact and its error in L1 is at most twice the bound. The loss stays exact. 0 is exact. In our convergence
            study (experiments/README.md) training with 0.001 was the same, with 0.01 worse.
        grad_filter_weight: the same for linear_weight's gradient; None is ``grad_filter``, 0 is exact. Rows of rarely
            predicted tokens are then known by their tile's direction only.
        vocab_order: (V,) permutation whose runs of 256 ids are the filter's tiles; by default in order of mean
            probability over the call's first 128 tokens.
        workspace_bytes: memory beyond inputs and returned gradients (16-bit weights add one float32 accumulator of
            their gradient); by default 64 MiB on a CPU, 512 MiB on an accelerator.
        process_group, vocab_start: the vocabulary is split over these ranks; ``linear_weight``, ``linear_bias``,
            ``weight`` and class probabilities hold ids ``vocab_start``, ``vocab_start + 1``, ...; ``input`` and ids in
            ``target`` are the same on all ranks, as are the loss and the gradient of ``input``.
        backend: "auto", or one of those that ``ssd-core info`` lists.
        return_stats: also return LossStats.
        options: None or a ``torch.nn.LinearCrossEntropyOptions``, accepted for ``F.linear_cross_entropy``'s sake: what
            it asks for, chunks and float32 sums, is done anyhow.

    Returns:
        The loss in float32 (float64 for float64 input), or (loss, LossStats). If no token counts it is 0, with zero
        gradients.

    Raises:
        ValueError, TypeError: an argument does not fit. IndexError: a label outside [0, V), on CPU; elsewhere the
        loss is NaN. RuntimeError: ``create_graph=True``, which is not supported.
    """
    if options is not None:
        kind = getattr(torch.nn, "LinearCrossEntropyOptions", ())
        checks.expect_type(options, "options", kind, "None or torch.nn.LinearCrossEntropyOptions")
    if isinstance(linear_weight, Tensor) and linear_weight.ndim > 2:
        return k_dimensional(
            linear_cross_entropy, input, linear_weight, target, linear_bias=linear_bias, weight=weight,
            reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing, temperature=temperature,
            logit_scale=logit_scale, softcap=softcap, z_loss=z_loss, tail=tail, token_weight=token_weight,
            num_items_in_batch=num_items_in_batch, shift=shift, grad_filter=grad_filter,
            grad_filter_weight=grad_filter_weight, vocab_order=vocab_order, workspace_bytes=workspace_bytes,
            process_group=process_group, vocab_start=vocab_start, backend=backend, return_stats=return_stats)
    checks.one_of(reduction, "reduction", tokens.REDUCTIONS)
    checks.one_of(tail, "tail", ("none", "renormalise", "bucket"))
    tokens.check_head(input, linear_weight, linear_bias)
    tokens.check_logit_options(temperature, logit_scale, softcap, z_loss, label_smoothing)
    checks.expect_type(target, "target", (Tensor, SparseTarget), "a tensor or a SparseTarget")
    tokens.check_constants(weight=weight, token_weight=token_weight)
    tokens.check_same_device(input, target=target, weight=weight, token_weight=token_weight)
    shape, vocab = input.shape[:-1], linear_weight.shape[0]
    tokens.check_vectors(weight=(weight, linear_weight.shape[:1]), token_weight=(token_weight, shape))
    tokens.check_group(process_group, vocab_start)
    dtype = tokens.product_dtype(input, linear_weight)
    wide = tokens.wide_dtype(dtype)
    ids, probs, dense, valid = loss_targets(target, shape, vocab, ignore_index, tail, weight, wide, shift)
    filters = _filters(grad_filter, grad_filter_weight, tail, label_smoothing, dense, vocab_order, vocab)
    row_weight = tokens.row_weights(token_weight, shape, shift, wide, input.device) * valid
    class_weight = None if weight is None else weight.to(wide)
    label_weight = None
    if weight is not None and dense is None:
        label_weight = tokens.label_weights(class_weight, ids[:, 0], vocab_start, process_group)
    denominator = tokens.mean_denominator(
        num_items_in_batch, row_weight if label_weight is None else row_weight * label_weight, wide)

    head = (input.reshape(-1, input.shape[-1]), linear_weight, linear_bias)
    numbers = Options(
        float(logit_scale), float(softcap or 0), float(temperature), float(label_smoothing), float(z_loss))
    one_sign = reduction != "none" and token_weight is None and weight is None and z_loss == 0
    constants = (tokens.needs(*head), dtype, list(numbers), tail == "bucket", filters, one_sign, workspace_bytes,
                 tokens.group_name(process_group), vocab_start, backend)
    loss, nll, lse, certificate = autograd.reduced(
        _linear_cross_entropy, (*head, ids, probs, dense, valid, class_weight, label_weight, vocab_order), constants,
        reduction, row_weight, denominator, dtype, results=4)
    loss = tokens.shaped(loss, shape, shift) if reduction == "none" else loss
    if return_stats:
        each = (tokens.shaped(values, shape, shift) for values in (nll, lse))
        return loss, LossStats(*each, denominator, *certificate.unbind())
    return loss


def loss_targets(target, shape, vocab: int, ignore_index, tail: str, weight, wide, shift: bool):
    """ids (N, K), probs (N, K) or None, class probabilities (N, V) or None, and which tokens count (N,)."""
    ids, probs, dense, valid = _targets(target, shape, vocab, ignore_index, tail, weight, wide)
    if shift:
        ids, probs, dense = tokens.shifted(ids, -2), tokens.shifted(probs, -2), tokens.shifted(dense, -2)
        valid = tokens.shifted(valid)
    ids = ids.reshape(-1, ids.shape[-1])
    probs = None if probs is None else probs.reshape(ids.shape)
    return ids, probs, None if dense is None else dense.reshape(-1, vocab), valid.reshape(-1)


def _targets(target, shape, vocab, ignore_index, tail, weight, wide):
    """ids (..., K), probs (..., K) or None, class probabilities (..., V) or None, and which tokens count (...)."""
    if isinstance(target, SparseTarget):
        tokens.check_shape(target, "target", shape)
        checks.expect(weight is None, "weight", "None with a SparseTarget", "class weights")
        return target.ids, tokens.sparse_probs(target, tail, wide), None, (target.probs > 0).any(-1)
    checks.expect(tail == "none", "tail", "'none' with hard labels and class probabilities", repr(tail))
    if target.is_floating_point() and target.shape == (*shape, vocab):
        given = ignore_index not in (None, -100)
        checks.expect(not given, "ignore_index", "None with class probabilities", ignore_index)
        checks.expect(not target.requires_grad, "target", "constant class probabilities", "a tensor that requires grad")
        nothing = torch.zeros(*shape, 1, dtype=torch.int64, device=target.device)
        return nothing, None, target, torch.ones(shape, dtype=torch.bool, device=target.device)
    tokens.check_labels(target, "target", shape)
    valid = target != (-100 if ignore_index is None else ignore_index)
    return target.where(valid, 0).unsqueeze(-1), None, None, valid


def _filters(grad_filter, grad_filter_weight, tail, label_smoothing, dense, vocab_order, vocab) -> list[float]:
    """The bounds for input's and for weight's gradient. What the certificate cannot cover is refused."""
    filters = [float(grad_filter), float(grad_filter if grad_filter_weight is None else grad_filter_weight)]
    for name, bound in zip(("grad_filter", "grad_filter_weight"), filters, strict=True):
        checks.expect(0 <= bound < 1, name, "a number in [0, 1)", bound)
        if bound:
            unbounded = "0 with tail='bucket' (its gradient is not bounded by softmax mass)"
            checks.expect(tail != "bucket", name, unbounded, bound)
            checks.expect(label_smoothing == 0, name, "0 with label_smoothing (its gradient is dense)", bound)
            checks.expect(dense is None, name, "0 with class probabilities (their gradient is dense)", bound)
    if vocab_order is not None:
        fits = vocab_order.dtype == torch.int64 and vocab_order.shape == (vocab,)
        checks.expect(fits, "vocab_order", f"int64 ({vocab},), a permutation", vocab_order)
    return filters
