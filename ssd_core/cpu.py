"""Backend "cpu": the interfaces of ``ssd_core.chunked``, served by the compiled extension."""

from __future__ import annotations

import torch

from ssd_core import native

BLOCK = 1 << 22     # logits that are copied at a time


def linear_cross_entropy(
    input, linear_weight, linear_bias, ids, probs, dense, rows, *, class_weight, label_weight, row_scale, needs, chunks,
    keep_float32, dtype, logit_scale, softcap, temperature, label_smoothing, z_loss, bucket, vocab, vocab_start, group,
    grad_filter, grad_filter_weight, vocab_order,
):
    return native.linear_cross_entropy(
        input, linear_weight, linear_bias, ids.long(), probs, dense, class_weight, rows, row_scale, dtype, needs,
        keep_float32, chunks.rows, chunks.tile, logit_scale=logit_scale, softcap=softcap, temperature=temperature,
        label_smoothing=label_smoothing, z_loss=z_loss, bucket=bucket, grad_filter=grad_filter,
        grad_filter_weight=grad_filter_weight, vocab_order=vocab_order, held_bytes=chunks.spare)


def linear_cross_entropy_bytes(demand):
    def held(rows: int, columns: int) -> int:
        found = native.linear_cross_entropy_bytes(
            rows, columns, demand.vocab, demand.hidden, demand.support, demand.dtype, demand.softcap, demand.smoothing,
            demand.dense, demand.cast or demand.filtered)
        if demand.filtered:
            found += native.grad_filter_bytes(demand.tokens, rows, demand.vocab, demand.hidden, demand.dtype)
        return found

    return held


def linear_logprob(
    input, linear_weight, linear_bias, ids, rows, *, row_scale, needs, chunks, keep_float32, dtype, vocab_start, group,
    **options,
):
    return native.linear_logprob(
        input, linear_weight, linear_bias, ids.long(), rows, row_scale, dtype, needs, keep_float32, chunks.rows,
        chunks.tile, **options)


def linear_logprob_bytes(demand):
    return lambda rows, columns: native.linear_logprob_bytes(
        rows, columns, demand.vocab, demand.hidden, demand.dtype, demand.cast)


def linear_distill(
    input, linear_weight, linear_bias, ids, probs, teacher_logits, teacher_input, teacher_weight, teacher_bias, labels,
    rows, *, class_weight, label_weight, row_scale, needs, chunks, keep_float32, dtype, group, vocab, vocab_start,
    **options,
):
    return native.linear_distill(
        input, linear_weight, linear_bias, None if ids is None else ids.long(), probs, teacher_logits, teacher_input,
        teacher_weight, teacher_bias, labels, class_weight, rows, row_scale, dtype, needs, keep_float32, chunks.rows,
        chunks.tile, **options)


def linear_distill_bytes(demand):
    return lambda rows, columns: native.linear_distill_bytes(
        rows, columns, demand.vocab, demand.hidden, demand.support, demand.teacher_hidden, demand.dtype, demand.cast)


def cross_entropy(
    logits, ids, probs, dense, rows, *, class_weight, label_weight, row_scale, logit_scale, softcap, temperature,
    label_smoothing, z_loss, bucket,
):
    count = len(logits) if rows is None else len(rows)
    results = logits.new_empty(3, count, dtype=torch.float32)
    make = torch.empty_like if rows is None else torch.zeros_like
    d_logits = None if row_scale is None else make(logits, memory_format=torch.contiguous_format)
    step = max(1, BLOCK // logits.shape[1])
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        index = part if rows is None else rows[part]
        z = logits[index].contiguous()
        if row_scale is not None and rows is None:
            d_logits[part] = z
            z = d_logits[part]
        results[:, part] = torch.stack(native.cross_entropy_rows_(
            z, None, ids[index].long(), None if probs is None else probs[index], class_weight,
            None if row_scale is None else row_scale[part], logit_scale=logit_scale, softcap=softcap,
            temperature=temperature, label_smoothing=label_smoothing, z_loss=z_loss, bucket=bucket))
        if row_scale is not None and rows is not None:
            d_logits[index] = z
    return *results, d_logits


def sample(logits, seeds, positions, *, temperature, top_k, top_p, min_p, support_limit):
    count, vocab = logits.shape
    step = count if logits.stride(1) == 1 else max(1, BLOCK // vocab)   # other strides are copied block by block
    draws = []
    for start in range(0, count, step):
        part = slice(start, start + step)
        z = logits[part] if step == count else logits[part].contiguous()
        draws.append(native.sample(z, seeds[part], positions[part], temperature=temperature, top_k=top_k, top_p=top_p,
                                   min_p=min_p, support_limit=support_limit))
    *draw, ids, probs = draws[0] if len(draws) == 1 else map(torch.cat, zip(*draws, strict=True))
    width = int((probs > 0).sum(-1).max())
    return *draw, ids[:, :width], probs[:, :width]
