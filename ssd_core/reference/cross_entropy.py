"""Cross-entropy of logits in plain PyTorch, differentiated by autograd."""

from __future__ import annotations

import torch

from ssd_core.reference.head import logits, logsumexp_off


def cross_entropy(
    u, ids=None, probs=None, *, dense=None, class_weight=None, label_smoothing=0.0, temperature=1.0, logit_scale=1.0,
    softcap=None, z_loss=0.0, bucket=False,
):
    """Loss, negative log-likelihood and log-sum-exp of each token, each (N,), of the head's outputs ``u`` (N, V).

    The target is ``ids`` (N, K) int64 with ``probs`` (N, K), or None (one label of weight 1), or ``dense`` (N, V) class
    probabilities, which are weighted and smoothed as those of ``torch.nn.functional.cross_entropy``. ``class_weight``
    (V,) or None.
    """
    z = logits(u, logit_scale=logit_scale, softcap=softcap) / temperature
    log_q = z.log_softmax(-1)
    lse = z.logsumexp(-1)
    if dense is None:
        loss, nll = _of_ids(z, log_q, ids, probs, class_weight, label_smoothing, bucket)
    else:
        loss, nll = _of_dense(log_q, dense.to(z.dtype), class_weight, label_smoothing)
    if z_loss:
        loss = loss + z_loss * lse.square()
    return loss, nll, lse


def _of_ids(z, log_q, ids, probs, class_weight, label_smoothing, bucket):
    vocab = z.shape[-1]
    w = torch.ones_like(ids, dtype=z.dtype) if probs is None else probs.to(z.dtype)     # (N, K)
    used = w > 0
    safe_ids = ids.where(used, 0)
    terms = torch.where(used, w * log_q.gather(-1, safe_ids), 0)
    nll = -terms.sum(-1)
    if bucket:
        # the teacher's mass on everything else meets the student's: -p_tail * log q_tail
        on_support = torch.zeros_like(z).scatter_add(-1, safe_ids, used.to(z.dtype)) > 0
        p_tail = (1 - w.sum(-1)).clamp_min(0).masked_fill(on_support.all(-1), 0)
        log_q_tail = logsumexp_off(log_q, on_support)
        nll = nll - torch.where(p_tail > 0, p_tail * log_q_tail, 0)

    c = torch.ones(vocab, dtype=z.dtype, device=z.device) if class_weight is None else class_weight.to(z.dtype)
    c_y = 1.0 if class_weight is None else c[ids[:, 0]]
    loss = c_y * (1 - label_smoothing) * nll
    if label_smoothing:
        loss = loss - label_smoothing / vocab * (c * log_q).sum(-1)
    return loss, nll


def _of_dense(log_q, dense, class_weight, label_smoothing):
    def against(target):
        return -torch.where(target != 0, target * log_q, 0).sum(-1)

    target = (1 - label_smoothing) * dense + label_smoothing / log_q.shape[-1]
    if class_weight is not None:
        target = class_weight.to(log_q.dtype) * target
    return against(target), against(dense)
