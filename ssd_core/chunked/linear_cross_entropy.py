"""Cross-entropy of a linear head in chunks."""

from __future__ import annotations

from ssd_core.chunked import head as heads
from ssd_core.chunked.cross_entropy import cross_entropy_rows
from ssd_core.chunked.grad_filter import GradFilter, default_order
from ssd_core.chunked.logits import wide_dtype


def linear_cross_entropy(
    input, linear_weight, linear_bias, ids, probs, dense, rows, *, class_weight, label_weight, row_scale, needs, chunks,
    keep_float32, dtype, logit_scale, softcap, temperature, vocab, vocab_start=0, group=None, grad_filter=0.0,
    grad_filter_weight=0.0, one_sign=False, vocab_order=None, **options,
):
    """Per-token results and gradients: ``(loss, nll, lse, certificate, d_input, d_weight, d_bias)``.

    ``input`` (N, D), ``linear_weight`` (V, D), ``linear_bias`` (V,) or None; ``ids`` (N, K) with ``probs`` (N, K), or
    None for hard labels; or ``dense`` (N, V); ``label_weight`` (N,). ``rows`` (M,) int64 names the rows that count, or
    None for all: the others meet no product. Results are (M,) float32 (float64 for float64). ``row_scale`` (M,): the
    gradients are those of ``(row_scale * loss).sum()``, for input, weight and bias as ``needs`` says; None: no
    gradients. ``keep_float32`` leaves those of weight and bias in float32. Products are taken in ``dtype``. ``vocab``
    counts the ids of all ranks of ``group``. ``certificate``: None, or (3,) of the gradient filter, which looks at the
    weights' signs unless ``one_sign`` says that they cannot differ.
    """
    head = heads.Head(input, linear_weight, linear_bias, logit_scale, softcap, dtype, chunks.columns)

    def make_pass(index, part):
        return cross_entropy_rows(
            ids, probs, dense, label_weight, index, None if row_scale is None else row_scale[part],
            class_weight=class_weight, wide=wide_dtype(dtype), vocab=vocab, vocab_start=vocab_start,
            temperature=temperature, **options)

    filtered = None
    if grad_filter or grad_filter_weight:
        order = default_order(head, rows, temperature, chunks) if vocab_order is None else vocab_order
        count = len(input) if rows is None else len(rows)
        filtered = GradFilter(head, order, grad_filter, grad_filter_weight, count, group, vocab_start, one_sign)
    results, *grads = heads.run(
        head, make_pass, rows, scaled=row_scale is not None, needs=needs, chunks=chunks, keep_float32=keep_float32,
        group=group, vocab_start=vocab_start, grad_filter=filtered)
    return *results, None if filtered is None else filtered.certificate(), *grads
