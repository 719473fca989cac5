"""Log-probability and entropy of a linear head in chunks."""

from __future__ import annotations

from ssd_core.chunked import head as heads
from ssd_core.chunked.logits import wide_dtype
from ssd_core.chunked.logprob import LogprobRows


def linear_logprob(
    input, linear_weight, linear_bias, ids, rows, *, row_scale, needs, chunks, keep_float32, dtype, logit_scale,
    softcap, temperature, vocab_start=0, group=None,
):
    """Per-token results and gradients: ``(logprob, entropy, lse, argmax, d_input, d_weight, d_bias)``.

    ``ids`` (N,); ``row_scale`` (M, 2) or None: the gradients are those of ``(row_scale * [logprob, entropy]).sum()``.
    The rest as in ``chunked.linear_cross_entropy``; argmax is given as a float.
    """
    head = heads.Head(input, linear_weight, linear_bias, logit_scale, softcap, dtype, chunks.columns)

    def make_pass(index, part):
        return LogprobRows(
            ids[index], None if row_scale is None else row_scale[part], wide=wide_dtype(dtype), temperature=temperature)

    results, *grads = heads.run(
        head, make_pass, rows, scaled=row_scale is not None, needs=needs, chunks=chunks, keep_float32=keep_float32,
        group=group, vocab_start=vocab_start)
    return *results, *grads
