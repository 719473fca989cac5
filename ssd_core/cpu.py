"""Backend "cpu": the interfaces of ``ssd_core.chunked``, served by the compiled extension."""

from __future__ import annotations

from ssd_core import groups, native

# -- ranks that share a vocabulary


def _gather(group):
    return None if group is None else lambda tensor: groups.all_gather(tensor, group)


def _rows(chunks, input, group) -> int:
    """Of a chunk, the same on all ranks, also on those with more threads or another instruction set."""
    return groups.smallest(chunks.rows, input.device, group)


def _summed(d_input, input, group):
    """Over the ranks, in float32."""
    if d_input is None or group is None:
        return d_input
    return groups.all_reduce(d_input, "sum", group).to(input.dtype)


def _counted(held, demand):
    """For ``Backend.counted``: the bytes of so many rows and columns, and of what is told the other ranks and d_input
    until it is summed."""
    if not demand.summed:
        return {"held": held}
    d_input = demand.summed * demand.hidden * 4 if demand.wide_input else 0
    return {"held": lambda rows, columns: held(rows, columns) + d_input + native.ranks_bytes(
        demand.tokens, rows, demand.vocab, demand.support + 1, demand.ranks)}


# -- ops


def linear_cross_entropy(
    input, linear_weight, linear_bias, ids, probs, dense, rows, *, class_weight, label_weight, row_scale, needs, chunks,
    keep_float32, dtype, logit_scale, softcap, temperature, label_smoothing, z_loss, bucket, vocab, vocab_start, group,
    grad_filter, grad_filter_weight, one_sign, vocab_order,
):
    world = groups.size(group)
    *results, d_input, d_weight, d_bias = native.linear_cross_entropy(
        input, linear_weight, linear_bias, ids.long(), probs, dense, class_weight, rows, row_scale, dtype, needs,
        keep_float32, _rows(chunks, input, group), chunks.tile, logit_scale=logit_scale, softcap=softcap,
        temperature=temperature, label_smoothing=label_smoothing, z_loss=z_loss, bucket=bucket,
        grad_filter=grad_filter / world, grad_filter_weight=grad_filter_weight / world, vocab_order=vocab_order,
        held_bytes=chunks.spare, gather=_gather(group), vocab_start=vocab_start)
    return *results, _summed(d_input, input, group), d_weight, d_bias


def linear_cross_entropy_bytes(demand):
    def held(rows: int, columns: int) -> int:
        found = native.linear_cross_entropy_bytes(
            rows, columns, demand.vocab, demand.hidden, demand.support, demand.dtype, demand.softcap, demand.smoothing,
            demand.dense, demand.cast or demand.filtered)
        if demand.filtered:
            found += native.grad_filter_bytes(
                demand.tokens, rows, demand.vocab, demand.hidden, demand.dtype, demand.filtered, demand.wide_input)
        return found

    return _counted(held, demand)


def linear_logprob(
    input, linear_weight, linear_bias, ids, rows, *, row_scale, needs, chunks, keep_float32, dtype, vocab_start, group,
    **options,
):
    *results, d_input, d_weight, d_bias = native.linear_logprob(
        input, linear_weight, linear_bias, ids.long(), rows, row_scale, dtype, needs, keep_float32,
        _rows(chunks, input, group), chunks.tile, gather=_gather(group), vocab_start=vocab_start, **options)
    return *results, _summed(d_input, input, group), d_weight, d_bias


def linear_logprob_bytes(demand):
    return _counted(lambda rows, columns: native.linear_logprob_bytes(
        rows, columns, demand.vocab, demand.hidden, demand.dtype, demand.cast), demand)


def linear_distill(
    input, linear_weight, linear_bias, ids, probs, teacher_logits, teacher_input, teacher_weight, teacher_bias, labels,
    rows, *, class_weight, label_weight, row_scale, needs, chunks, keep_float32, dtype, group, vocab, vocab_start,
    **options,
):
    *results, d_input, d_weight, d_bias = native.linear_distill(
        input, linear_weight, linear_bias, None if ids is None else ids.long(), probs, teacher_logits, teacher_input,
        teacher_weight, teacher_bias, labels, class_weight, rows, row_scale, dtype, needs, keep_float32,
        _rows(chunks, input, group), chunks.tile, gather=_gather(group), vocab_start=vocab_start, **options)
    return *results, _summed(d_input, input, group), d_weight, d_bias


def linear_distill_bytes(demand):
    return _counted(lambda rows, columns: native.linear_distill_bytes(
        rows, columns, demand.vocab, demand.hidden, demand.support, demand.teacher_hidden, demand.dtype,
        demand.cast), demand)


def cross_entropy(logits, ids, probs, dense, rows, *, class_weight, label_weight, row_scale, **options):
    results, d_logits = native.cross_entropy_rows(
        logits, ids, probs, dense, class_weight, rows, row_scale, **options)
    return *results, d_logits


sample = native.sample


def logprob(logits, ids, rows, *, row_scale, **options):
    results, d_logits = native.logprob_rows(logits, ids, rows, row_scale, **options)
    return *results, d_logits


def distill(
    logits, ids, probs, teacher_logits, labels, rows, *, class_weight, label_weight, row_scale, **options,
):
    results, d_logits = native.distill_rows(
        logits, ids, probs, teacher_logits, labels, class_weight, rows, row_scale, **options)
    return *results, d_logits


def softmax(logits, *, temperature):
    return native.softmax_rows(logits, temperature, False)


def softmax_backward(grad, out, *, temperature):
    return native.softmax_rows_backward(grad, out, temperature, False)


def log_softmax(logits, *, temperature):
    return native.softmax_rows(logits, temperature, True)


def log_softmax_backward(grad, out, *, temperature):
    return native.softmax_rows_backward(grad, out, temperature, True)
