"""Cross-entropy of a linear head in chunks of rows: one buffer of logits, three products per chunk."""

from __future__ import annotations

import torch

from ssd_core.chunked.cross_entropy_rows import cross_entropy_rows_

SUM_LENGTH = 1 << 14    # terms that a float32 product may add up in one go; shorter ones cost time


def linear_cross_entropy(
    input, linear_weight, linear_bias, ids, probs, rows, *, class_weight, row_scale, needs, chunks, keep_float32,
    softcap, row_pass=cross_entropy_rows_, **options,
):
    """Per-token results and gradients: ``(loss, nll, lse, d_input, d_weight, d_bias)``.

    ``input`` (N, D), ``linear_weight`` (V, D), ``linear_bias`` (V,) or None, ``ids`` (N, K) and ``probs`` (N, K) or
    None; ``rows`` (M,) int64 names the rows that count, or None for all: the others meet no product. Results are (M,)
    float32 (float64 for float64). ``row_scale`` (M,): the gradients are those of ``(row_scale * loss).sum()``, for
    input, weight and bias as ``needs`` says; None: no gradients. ``keep_float32`` leaves those of weight and bias in
    float32. ``chunks``: a ``plan.ChunkPlan``.
    """
    count = input.shape[0] if rows is None else rows.shape[0]
    hidden, vocab = input.shape[1], linear_weight.shape[0]
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    needs = needs if row_scale is not None else (False, False, False)
    results = [input.new_empty(count, dtype=wide) for _ in range(3)]
    d_input = d_weight = d_bias = None
    if needs[0]:
        d_input = torch.empty_like(input) if rows is None else torch.zeros_like(input)
    one_chunk = 0 < count <= chunks.rows
    direct = input.dtype == wide or (one_chunk and not keep_float32)    # d_weight needs no float32 accumulator
    if needs[1]:
        start_value = torch.empty if direct and count else torch.zeros
        d_weight = start_value(vocab, hidden, dtype=input.dtype if direct else wide, device=input.device)
    if needs[2]:
        d_bias = input.new_zeros(vocab, dtype=wide)

    bias = None if linear_bias is None else linear_bias.to(wide)
    buffer = input.new_empty(min(chunks.rows, count), vocab)
    for start in range(0, count, chunks.rows):
        part = slice(start, min(start + chunks.rows, count))
        index = part if rows is None else rows[part]
        x = input[index]
        logits = buffer[: x.shape[0]]
        torch.mm(x, linear_weight.t(), out=logits)
        found = row_pass(
            logits, bias, ids[index].long(), None if probs is None else probs[index], class_weight,
            None if row_scale is None else row_scale[part], softcap=softcap or 0.0, **options)
        for result, values in zip(results, found, strict=True):
            result[part] = values
        grad = logits
        if needs[0] and rows is None:
            _product(grad, linear_weight, d_input[part])
        elif needs[0]:
            d_input.index_copy_(0, index, _product(grad, linear_weight, torch.empty_like(x)))
        if needs[1] and direct:
            torch.addmm(d_weight, grad.t(), x, beta=0 if start == 0 else 1, out=d_weight)
        elif needs[1]:
            for column in range(0, vocab, chunks.columns):
                columns = slice(column, column + chunks.columns)
                d_weight[columns] += grad[:, columns].t() @ x
        if needs[2]:
            d_bias += grad.sum(0, dtype=wide)

    if not keep_float32:
        d_weight = None if d_weight is None else d_weight.to(linear_weight.dtype)
        d_bias = None if d_bias is None else d_bias.to(linear_bias.dtype)
    return *results, d_input, d_weight, d_bias


def _product(grad, weight, out):
    """``out = grad @ weight``, (R, V) by (V, D).

    Of few rows, libraries add up all V terms in one running float32 sum, which at V = 262,144 costs two digits: sums
    over blocks of the vocabulary, added up, do not. (``addmm`` onto ``out`` would go on with the running sum.) A 16-bit
    ``out`` would round every block, and the sums behind it are wider anyway.
    """
    if out.dtype.itemsize == 2:
        return torch.mm(grad, weight, out=out)
    torch.mm(grad[:, :SUM_LENGTH], weight[:SUM_LENGTH], out=out)
    for start in range(SUM_LENGTH, len(weight), SUM_LENGTH):
        part = slice(start, start + SUM_LENGTH)
        out += grad[:, part] @ weight[part]
    return out


def linear_cross_entropy_cpu(*args, **options):
    """Backend "cpu": the same chunks, with the compiled row pass."""
    from ssd_core import native

    return linear_cross_entropy(*args, row_pass=native.cross_entropy_rows_, **options)
