"""Log-probability of given tokens and entropy of logits in plain PyTorch, differentiated by autograd."""

from __future__ import annotations

import torch

from ssd_core.reference.head import logits


def logprob(u, ids, *, temperature=1.0, logit_scale=1.0, softcap=None):
    """Log-probability of ``ids`` (N,), entropy, log-sum-exp and likeliest id, each (N,), of the outputs ``u`` (N, V).

    All of them at ``temperature``, in nats. Of tied ids the lowest is the likeliest.
    """
    z = logits(u, logit_scale=logit_scale, softcap=softcap) / temperature
    log_q = z.log_softmax(-1)
    q = log_q.exp()
    entropy = -(q * log_q.masked_fill(q == 0, 0)).sum(-1)       # 0 log 0 = 0, and so its gradient
    largest = (z == z.amax(-1, keepdim=True)) | z.isnan()
    vocabulary = torch.arange(z.shape[-1], device=z.device)
    argmax = torch.where(largest, vocabulary, z.shape[-1]).amin(-1)
    return log_q.gather(-1, ids.unsqueeze(-1)).squeeze(-1), entropy, z.logsumexp(-1), argmax
