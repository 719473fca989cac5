"""Distillation into a linear head in chunks."""

from __future__ import annotations

from ssd_core.chunked import head as heads
from ssd_core.chunked.distill import TeacherTiles, distill_rows
from ssd_core.chunked.logits import wide_dtype


def linear_distill(
    input, linear_weight, linear_bias, ids, probs, teacher_logits, teacher_input, teacher_weight, teacher_bias, labels,
    rows, *, chunks, needs, keep_float32, dtype, logit_scale, softcap, teacher_logit_scale, teacher_softcap, vocab,
    vocab_start=0, group=None, row_scale, **options,
):
    """Per-token results and gradients: ``(loss, divergence, nll, lse, d_input, d_weight, d_bias)``.

    The teacher is ``ids`` and ``probs`` (N, K), ``teacher_logits`` (N, V'), or ``teacher_input`` (N, D') with
    ``teacher_weight`` (V', D'). The rest as in ``chunked.linear_cross_entropy``.
    """
    head = heads.Head(input, linear_weight, linear_bias, logit_scale, softcap, dtype, chunks.columns)
    teacher_head = buffer = None
    extent = 0 if teacher_logits is None else teacher_logits.shape[1]
    if teacher_input is not None:
        teacher_head = heads.Head(
            teacher_input, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap, teacher_input.dtype,
            chunks.columns)
        extent = len(teacher_weight)
        buffer = teacher_input.new_empty(min(chunks.rows, len(input)), min(chunks.tile, extent))

    def make_pass(index, part):
        teacher = TeacherTiles(index, teacher_logits, teacher_head, teacher_logit_scale, teacher_softcap, buffer)
        return distill_rows(
            ids, probs, teacher, labels, index, part, None if row_scale is None else row_scale[part],
            wide=wide_dtype(dtype), device=input.device, vocab=vocab, vocab_start=vocab_start, **options)

    results, *grads = heads.run(
        head, make_pass, rows, scaled=row_scale is not None and any(needs), needs=needs, chunks=chunks,
        keep_float32=keep_float32, group=group, vocab_start=vocab_start, extent=extent)
    return *results, *grads
