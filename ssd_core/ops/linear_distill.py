"""``linear_distill``: a student's head against a teacher, without (N, V) logits of either."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssd_core import backends, checks, groups
from ssd_core.ops import autograd, tokens
from ssd_core.plan import Demand, plan_chunks
from ssd_core.targets import SparseTarget, TeacherHidden, TeacherLogits

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
TAILS = ("bucket", "renormalise", "support")


class DistillStats(NamedTuple):
    """What the loss was made of; constants, in the tokens' shape and 0 where a token is ignored."""

    divergence: Tensor      # times temperature ** 2 with temperature_squared
    nll: Tensor             # of target, at temperature 1; 0 without
    lse: Tensor             # log-sum-exp of the student's logits at temperature 1
    denominator: Tensor     # 0-d: what "mean" divides by


class Options(NamedTuple):
    """Numbers that the loss depends on."""

    logit_scale: float
    softcap: float              # 0: none
    temperature: float
    beta: float
    ce_weight: float
    label_smoothing: float
    z_loss: float
    teacher_logit_scale: float
    teacher_softcap: float


@torch.library.custom_op("ssd_core::linear_distill", mutates_args=())
def _linear_distill(
    input: Tensor,                      # (N, D)
    linear_weight: Tensor,              # (V, D)
    linear_bias: Tensor | None,         # (V,)
    ids: Tensor | None,                 # (N, K) of a sparse teacher
    probs: Tensor | None,               # (N, K)
    teacher_logits: Tensor | None,      # (N, V')
    teacher_input: Tensor | None,       # (N, D')
    teacher_weight: Tensor | None,      # (V', D')
    teacher_bias: Tensor | None,        # (V',)
    labels: Tensor | None,              # (N,)
    valid: Tensor,                      # (N,) bool
    class_weight: Tensor | None,        # (V,)
    label_weight: Tensor | None,        # (N,)
    row_scale: Tensor | None,           # (N,); None: no total and no gradients
    needs: list[bool],
    dtype: torch.dtype,
    options: list[float],
    divergence: str,
    tail: str,
    temperature_squared: bool,
    with_ce: bool,                      # whether anything at temperature 1 is wanted
    workspace_bytes: int | None,
    process_group: str,
    vocab_start: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(total, loss, divergence, nll, lse, d_input, d_weight, d_bias)``: see ``_linear_cross_entropy``."""
    group = groups.find(process_group)
    vocab = groups.total(len(linear_weight), input.device, group)
    check_values(ids, probs, labels, valid, vocab)
    rows = tokens.counting(valid)
    serving = backends.choose(
        "linear_distill", input.device, dtype, backend, ["process_group"] if process_group else [])
    wide = next((len(t) if t is teacher_weight else t.shape[1] for t in (teacher_logits, teacher_weight)
                 if t is not None), 0)
    numbers = Options(*options)
    teacher_row = 0
    if teacher_input is not None:       # some of them, or in float32 where kernels multiply no float64
        size = teacher_input.element_size()
        teacher_row = teacher_input.shape[1] * ((size if rows is not None else 0) + (4 if size > 4 else 0))
    demand = Demand(
        len(input) if rows is None else len(rows), input.shape[1],
        groups.largest(max(len(linear_weight), wide), input.device, group), 0 if ids is None else 2 * ids.shape[1],
        dtype, input.device, gathered=rows is not None, cast=tokens.packed(linear_weight, dtype),
        logits=1 if teacher_input is None else 2, passes=2 if ids is None else 1,
        teacher_hidden=0 if teacher_input is None else teacher_input.shape[1], teacher_row=teacher_row,
        # of tiles as kernels.distill.DistillRows.looks
        dense=ids is None, looks=2 if ids is None and divergence == "jsd" and 0 < numbers.beta < 1 else 1,
        ranks=groups.size(group), summed=len(input) if process_group else 0, d_weight=needs[1],
        wide_input=input.dtype.itemsize == 2 and bool(process_group),
        buffers=10 if ids is not None else (
            11 + (numbers.temperature != 1) + (numbers.softcap + numbers.teacher_softcap > 0)))
    demand = serving.counted(demand)
    with tokens.without_autocast(input.device):
        *results, d_input, d_weight, d_bias = serving.load()(
            input, linear_weight, linear_bias, ids, probs, teacher_logits, teacher_input, teacher_weight, teacher_bias,
            labels, rows, class_weight=class_weight, label_weight=label_weight,
            row_scale=tokens.of_rows(row_scale, rows), needs=needs,
            chunks=plan_chunks(demand, workspace_bytes), keep_float32=input.dtype == torch.float16, dtype=dtype,
            group=group, vocab=vocab, vocab_start=vocab_start, divergence=divergence, tail=tail,
            temperature_squared=temperature_squared, with_ce=with_ce, **numbers._asdict())
    loss, value, nll, lse = (tokens.spread(values, rows, len(input)) for values in results)
    total = loss.new_zeros(()) if row_scale is None else (loss * row_scale).sum()
    return total, loss, value, nll, lse, *autograd.present(input, d_input, d_weight, d_bias)


@_linear_distill.register_fake
def _(input, linear_weight, linear_bias, ids, probs, teacher_logits, teacher_input, teacher_weight, teacher_bias,
      labels, valid, class_weight, label_weight, row_scale, needs, dtype, *_):
    wide = tokens.wide_dtype(dtype)
    each = [input.new_empty(input.shape[0], dtype=wide) for _ in range(4)]
    grads = autograd.empty_head_gradients(input, linear_weight, linear_bias, needs, row_scale is not None)
    return input.new_empty((), dtype=wide), *each, *grads


autograd.register(_linear_distill, tensors=14, gradients=3)


def linear_distill(
    input: Tensor,
    linear_weight: Tensor,
    teacher: SparseTarget | TeacherLogits | TeacherHidden,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    tail: str = "bucket",
    target: Tensor | None = None,
    ce_weight: float = 0.0,
    linear_bias: Tensor | None = None,
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
    workspace_bytes: int | None = None,
    process_group=None,
    vocab_start: int = 0,
    backend: str = "auto",
    return_stats: bool = False,
):
    """Divergence from a teacher to a linear head, no (N, V) logits of either kept. For a dense teacher it equals::

        q = F.log_softmax(F.linear(input, linear_weight, linear_bias).float() / temperature, -1)
        p = F.log_softmax(teacher_logits.float() / temperature, -1)
        F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()            # forward_kl

    with q and p exchanged for "reverse_kl", and for "jsd" with ``m = beta p + (1 - beta) q``: ``beta KL(p | m) + (1 -
    beta) KL(q | m)`` (beta 0 is forward KL and 1 is reverse KL, as in GKD, arXiv 2306.13649, and TRL). A token's loss
    is ``(1 - ce_weight) * divergence + ce_weight * cross_entropy(target) + z_loss * logsumexp ** 2``, times its
    ``token_weight``; nothing is mixed in and no temperature applied unless asked for. One product makes the student's
    logits for all of it.

    Args:
        input, linear_weight, linear_bias, logit_scale, softcap: the student, as in ``linear_cross_entropy``.
        teacher: a SparseTarget (...) of probabilities at ``temperature`` (repeated ids are added up); TeacherLogits;
            or TeacherHidden, whose logits are computed chunk by chunk. No gradient reaches a teacher. Whoever has fewer
            ids has probability 0 on the others: a divergence that is infinite then is infinite here.
        tail: for sparse teachers, a comparison of K + 1 buckets, the ids and everything else. "bucket": what the
            probabilities lack to 1 is the teacher's mass on everything else. "renormalise": they are divided by their
            sum and nothing is left; the student keeps its tail. "support": both sides are restricted to the ids. The
            reverse KL to a teacher with an empty tail is infinite, so "renormalise" is refused there; use "support" for
            truncated teachers.
        temperature: of both sides of the divergence. temperature_squared: multiply it and its gradient by its square.
        target: (...) labels of the cross-entropy, at temperature 1; tokens at ``ignore_index`` are ignored altogether.
        weight, label_smoothing: of the cross-entropy; class weights do not enter the denominator.
        reduction: "mean" divides by ``num_items_in_batch``, or else by the sum of token weights that are not ignored.
        shift: token t of ``input`` and of a dense teacher predicts token t + 1 of ``target`` and of a sparse teacher.
        token_weight, num_items_in_batch, workspace_bytes, process_group, vocab_start, backend: as in
            ``linear_cross_entropy``; over a process group a dense teacher holds this rank's ids, too.
        return_stats: also return DistillStats.

    Returns:
        The loss in float32 (float64 for float64 input), or (loss, DistillStats). Sparse teachers ignore tokens without
        any probability; if no token counts the loss is 0.

    Raises:
        ValueError, TypeError: an argument does not fit. IndexError: an id outside [0, V), on CPU. RuntimeError:
        ``create_graph=True``, which is not supported.
    """
    checks.expect_type(teacher, "teacher", (SparseTarget, TeacherLogits, TeacherHidden),
                       "a SparseTarget, TeacherLogits or TeacherHidden")
    checks.one_of(reduction, "reduction", tokens.REDUCTIONS)
    tokens.check_head(input, linear_weight, linear_bias)
    tokens.check_logit_options(temperature, logit_scale, softcap, z_loss, label_smoothing)
    shape = input.shape[:-1]
    check_distill(teacher, target, shape, input.device, divergence, beta, tail, ce_weight, temperature_squared)
    tokens.check_constants(weight=weight, token_weight=token_weight)
    tokens.check_same_device(input, weight=weight, token_weight=token_weight)
    tokens.check_vectors(weight=(weight, linear_weight.shape[:1]), token_weight=(token_weight, shape))
    tokens.check_group(process_group, vocab_start)
    dtype = tokens.product_dtype(input, linear_weight)
    wide = tokens.wide_dtype(dtype)

    ids, probs, labels, valid = distill_targets(teacher, target, shape, ignore_index, shift, wide, input.device)
    class_weight = None if weight is None else weight.to(wide)
    label_weight = None
    if class_weight is not None and labels is not None:
        label_weight = tokens.label_weights(class_weight, labels, vocab_start, process_group)
    row_weight = tokens.row_weights(token_weight, shape, shift, wide, input.device) * valid
    denominator = tokens.mean_denominator(num_items_in_batch, row_weight, wide)

    head = (input.reshape(-1, input.shape[-1]), linear_weight, linear_bias)
    hidden = teacher if isinstance(teacher, TeacherHidden) else None
    dense = (teacher.logits.reshape(-1, teacher.logits.shape[-1]) if isinstance(teacher, TeacherLogits) else None, *(
        (None, None, None) if hidden is None else (
            hidden.input.detach().reshape(-1, hidden.input.shape[-1]), hidden.linear_weight.detach(),
            None if hidden.linear_bias is None else hidden.linear_bias.detach())))
    numbers = Options(
        float(logit_scale), float(softcap or 0), float(temperature), float(beta), float(ce_weight),
        float(label_smoothing if ce_weight else 0), float(z_loss), 1.0 if hidden is None else float(hidden.logit_scale),
        0.0 if hidden is None else float(hidden.softcap or 0))
    with_ce = labels is not None or z_loss > 0 or return_stats
    constants = (tokens.needs(*head), dtype, list(numbers), divergence, tail, temperature_squared, with_ce,
                 workspace_bytes, tokens.group_name(process_group), vocab_start, backend)
    loss, value, nll, lse = autograd.reduced(
        _linear_distill, (*head, ids, probs, *dense, labels, valid, class_weight, label_weight), constants, reduction,
        row_weight, denominator, dtype, results=4)
    loss = tokens.shaped(loss, shape, shift) if reduction == "none" else loss
    if return_stats:
        return loss, DistillStats(*(tokens.shaped(values, shape, shift) for values in (value, nll, lse)), denominator)
    return loss


def check_distill(teacher, target, shape, device, divergence, beta, tail, ce_weight, temperature_squared) -> None:
    """What ``linear_distill`` and ``distill`` have in common."""
    checks.one_of(divergence, "divergence", DIVERGENCES)
    checks.in_range(beta, "beta", 0, 1)
    checks.in_range(ce_weight, "ce_weight", 0, 1)
    checks.one_of(tail, "tail", TAILS)
    checks.expect_type(temperature_squared, "temperature_squared", bool, "True or False")
    infinite = tail == "renormalise" and (divergence == "reverse_kl" or (divergence == "jsd" and beta == 1))
    checks.expect(not (infinite and isinstance(teacher, SparseTarget)), "tail",
                  "'bucket' or 'support' with the reverse KL (to a teacher without a tail it is infinite)", repr(tail))
    checks.expect(teacher.shape == shape, "teacher", lambda: f"{tuple(shape)} like the tokens", tuple(teacher.shape))
    checks.expect(teacher.device == device, "teacher", f"tensors on {device} like input", teacher.device)
    labelled = ce_weight == 0 or target is not None
    checks.expect(labelled, "target", "labels for the cross-entropy (ce_weight > 0)", target)
    if target is not None:
        checks.expect_type(target, "target", Tensor, "a tensor of labels")
        tokens.check_labels(target, "target", shape)


def check_values(ids, probs, labels, valid, vocab: int) -> None:
    """Ids and weights of the tokens that count."""
    if labels is not None:
        tokens.check_target_values(labels.unsqueeze(-1), None, valid, vocab, "target")
    if ids is not None:
        tokens.check_target_values(ids, probs, valid, vocab, "teacher")


def distill_targets(teacher, target, shape, ignore_index, shift: bool, wide, device):
    """ids and probs (N, K) of a sparse teacher, labels (N,), and which tokens count (N,)."""
    ids = probs = labels = None
    valid = torch.ones(shape, dtype=torch.bool, device=device)
    if isinstance(teacher, SparseTarget):
        ids, probs, valid = teacher.ids, teacher.probs.to(wide), (teacher.probs > 0).any(-1)
    if target is not None:
        wanted = target != (-100 if ignore_index is None else ignore_index)
        labels, valid = target.where(wanted, 0).long(), valid & wanted
    if shift:
        ids, probs = tokens.shifted(ids, -2), tokens.shifted(probs, -2)
        labels, valid = tokens.shifted(labels), tokens.shifted(valid)
    if ids is not None:
        ids = ids.reshape(-1, ids.shape[-1])
        probs = probs.reshape(ids.shape)
    return ids, probs, None if labels is None else labels.reshape(-1), valid.reshape(-1)
