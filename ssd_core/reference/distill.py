"""Divergence between a teacher and a student given as logits, in plain PyTorch, differentiated by autograd."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ssd_core.reference.cross_entropy import cross_entropy
from ssd_core.reference.head import logits, logsumexp_off, widen


def distill(
    u, *, ids=None, probs=None, teacher_u=None, divergence, beta, temperature, temperature_squared, tail, labels=None,
    ce_weight=0.0, class_weight=None, label_smoothing=0.0, logit_scale=1.0, softcap=None, z_loss=0.0,
    teacher_logit_scale=1.0, teacher_softcap=None,
):
    """Loss, divergence, negative log-likelihood and log-sum-exp of each token, each (N,), of the outputs ``u`` (N, V).

    The teacher is ``ids`` and ``probs`` (N, K), probabilities at ``temperature``, or the outputs ``teacher_u`` (N, V')
    of another head. ``labels`` (N,) or None. Temperature is the divergence's: cross-entropy, nll and lse are at 1.
    ``loss = (1 - ce_weight) * divergence + ce_weight * cross_entropy + z_loss * lse^2``; nll is 0 without labels.
    """
    c = logits(u, logit_scale=logit_scale, softcap=softcap)
    z = c / temperature
    if teacher_u is None:
        value = sparse_divergence(z, ids, probs, divergence=divergence, beta=beta, tail=tail)
    else:
        teacher_c = logits(teacher_u.to(c.dtype), logit_scale=teacher_logit_scale, softcap=teacher_softcap)
        value = dense_divergence(z, teacher_c / temperature, divergence=divergence, beta=beta)
    if temperature_squared:
        value = temperature**2 * value

    lse = c.logsumexp(-1)
    nll = torch.zeros_like(lse)
    loss = (1 - ce_weight) * value
    if labels is not None:
        ce, nll, _ = cross_entropy(
            c, labels.unsqueeze(-1), class_weight=class_weight, label_smoothing=label_smoothing)
        loss = loss + ce_weight * ce
    if z_loss:
        loss = loss + z_loss * lse.square()
    return loss, value, nll, lse


def sparse_divergence(z, ids, probs, *, divergence, beta, tail):
    """(N,) from the teacher's ``probs`` (N, K) on ``ids`` (N, K) int64 to the student's logits ``z`` (N, V).

    Both sides are distributions over K+1 buckets: the support (the ids of positive probability, repeated ones added
    up) and everything else. ``tail`` "bucket": the teacher's last bucket is what its probabilities lack to 1.
    "renormalise": it is empty and the teacher divided by its sum. "support": so is the student's. A token whose
    probabilities are all 0 has divergence 0.
    """
    z = widen(z)
    used = (probs > 0).any(-1)
    value = _buckets(z[used], ids[used], probs[used], divergence, beta, tail)
    return z.new_zeros(len(z)).masked_scatter(used, value)


def _buckets(z, ids, probs, divergence, beta, tail):
    w = probs.detach().to(z.dtype)
    p = torch.zeros_like(z).scatter_add(-1, ids.where(w > 0, 0), w.clamp_min(0))    # repeated ids add up
    on_support = p > 0
    if tail == "support":
        log_q = z.masked_fill(~on_support, -torch.inf).log_softmax(-1)
        return _divergence((p / p.sum(-1, keepdim=True)).log(), log_q, divergence, beta)

    # the tail is summed from its own logits: 1 - sum(q) would be 0 where the truth is 1e-7
    log_q = z.log_softmax(-1).masked_fill(~on_support, -torch.inf)
    log_q_tail = logsumexp_off(z, on_support) - z.logsumexp(-1)
    if tail == "bucket":
        p_tail = (1 - p.sum(-1)).clamp_min(0).masked_fill(on_support.all(-1), 0)
    else:
        p = p / p.sum(-1, keepdim=True)
        p_tail = torch.zeros_like(log_q_tail)
    p = torch.cat((p, p_tail.unsqueeze(-1)), -1)                                    # (N, V + 1), 0 off the support
    log_q = torch.cat((log_q, log_q_tail.unsqueeze(-1)), -1)
    return _divergence(p.log(), log_q, divergence, beta)


def dense_divergence(z, teacher_z, *, divergence, beta):
    """(N,) from the teacher's logits ``teacher_z`` (N, V'), a constant, to the student's ``z`` (N, V).

    The narrower side has probability 0 on the ids that it does not know.
    """
    z = widen(z)
    teacher_z = teacher_z.detach().to(z.dtype)
    vocab = max(z.shape[-1], teacher_z.shape[-1])
    z, teacher_z = (F.pad(t, (0, vocab - t.shape[-1]), value=-torch.inf) for t in (z, teacher_z))
    return _divergence(teacher_z.log_softmax(-1), z.log_softmax(-1), divergence, beta)


def _divergence(log_p, log_q, divergence, beta):
    """(N,) from log-probabilities (N, B) of teacher and student; -inf where there is no mass."""
    if divergence == "forward_kl" or (divergence == "jsd" and beta == 0):
        return _kl(log_p, log_q)
    if divergence == "reverse_kl" or (divergence == "jsd" and beta == 1):
        return _kl(log_q, log_p)
    # J = beta KL(p|m) + (1 - beta) KL(q|m), m = beta p + (1 - beta) q
    nowhere = (log_p == -torch.inf) & (log_q == -torch.inf)     # logaddexp of two -inf has gradient NaN
    log_m = torch.logaddexp(
        math.log(beta) + log_p.masked_fill(nowhere, 0), math.log1p(-beta) + log_q.masked_fill(nowhere, 0))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _kl(log_a, log_b):
    """``sum a (log a - log b)`` with 0 log 0 = 0: +inf where a has mass and b none. An a that underflows is 0."""
    a = log_a.exp()
    empty = a == 0
    difference = log_a.masked_fill(empty, 0) - log_b.masked_fill(empty, 0)      # never 0 * inf, nor in the backward
    return (a * difference).sum(-1)
