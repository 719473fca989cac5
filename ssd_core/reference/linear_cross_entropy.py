"""Cross-entropy of a linear head in plain PyTorch: the (N, V) logits are there, and autograd does the rest."""

from __future__ import annotations

import torch


def linear_cross_entropy(
    input, linear_weight, ids, probs=None, *, linear_bias=None, class_weight=None, label_smoothing=0.0,
    temperature=1.0, logit_scale=1.0, softcap=None, z_loss=0.0, bucket=False,
):
    """Loss, negative log-likelihood and log-sum-exp of each token, each (N,), differentiable.

    ``input`` (N, D), ``linear_weight`` (V, D), ``ids`` (N, K) int64, ``probs`` (N, K) or None (one label of weight 1),
    ``linear_bias`` and ``class_weight`` (V,) or None. Computed in float64 when given float64, else in float32.
    """
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    u = input.to(wide) @ linear_weight.to(wide).T                                   # (N, V)
    if linear_bias is not None:
        u = u + linear_bias.to(wide)
    return cross_entropy(
        u, ids, probs, class_weight=class_weight, label_smoothing=label_smoothing, temperature=temperature,
        logit_scale=logit_scale, softcap=softcap, z_loss=z_loss, bucket=bucket)


def cross_entropy(
    u, ids, probs, *, class_weight=None, label_smoothing=0.0, temperature=1.0, logit_scale=1.0, softcap=None,
    z_loss=0.0, bucket=False,
):
    """The same of the head's outputs ``u`` (N, V) float32 or float64."""
    wide = u.dtype
    z = logit_scale * u
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    vocab = z.shape[-1]
    log_q = z.log_softmax(-1)
    lse = z.logsumexp(-1)

    w = torch.ones_like(ids, dtype=wide) if probs is None else probs.to(wide)       # (N, K)
    used = w > 0
    safe_ids = ids.where(used, 0)
    terms = torch.where(used, w * log_q.gather(-1, safe_ids), 0)
    nll = -terms.sum(-1)
    if bucket:
        # the teacher's mass on everything else meets the student's: -p_tail * log q_tail
        on_support = torch.zeros_like(z).scatter_add(-1, safe_ids, used.to(wide)) > 0
        p_tail = (1 - w.sum(-1)).clamp_min(0).masked_fill(on_support.all(-1), 0)
        log_q_tail = log_q.masked_fill(on_support, -torch.inf).logsumexp(-1)
        nll = nll - torch.where(p_tail > 0, p_tail * log_q_tail, 0)

    c = torch.ones(vocab, dtype=wide, device=z.device) if class_weight is None else class_weight.to(wide)
    c_y = 1.0 if class_weight is None else c[ids[:, 0]]
    loss = c_y * (1 - label_smoothing) * nll
    if label_smoothing:
        loss = loss - label_smoothing / vocab * (c * log_q).sum(-1)
    if z_loss:
        loss = loss + z_loss * lse.square()
    return loss, nll, lse


def run(
    input, linear_weight, linear_bias, ids, probs, rows, *, class_weight, row_scale, needs, chunks, keep_float32,
    **options,
):
    """The definition behind the interface that every backend of this op has: see ``chunked.linear_cross_entropy``."""
    if rows is not None:
        ids, probs = ids[rows], None if probs is None else probs[rows]
    leaves = [None if t is None else t.detach().requires_grad_() for t in (input, linear_weight, linear_bias)]
    with torch.enable_grad():
        x = leaves[0] if rows is None else leaves[0][rows]
        outputs = linear_cross_entropy(
            x, leaves[1], ids.long(), probs, linear_bias=leaves[2], class_weight=class_weight, **options)
        grads = [None] * 3
        wanted = [i for i, need in enumerate(needs) if need]
        if row_scale is not None and wanted:
            found = torch.autograd.grad((outputs[0] * row_scale).sum(), [leaves[i] for i in wanted])
            for i, grad in zip(wanted, found, strict=True):
                grads[i] = grad.float() if keep_float32 and i > 0 else grad
    return *(output.detach() for output in outputs), *grads
