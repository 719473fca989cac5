"""Log-probability and entropy of a linear head in plain PyTorch: the (N, V) logits are there."""

from __future__ import annotations

from ssd_core.reference.head import outputs
from ssd_core.reference.logprob import logprob


def linear_logprob(input, linear_weight, ids, *, linear_bias=None, **options):
    """Log-probability, entropy, log-sum-exp and likeliest id of each token, each (N,), of ``input`` (N, D)."""
    return logprob(outputs(input, linear_weight, linear_bias), ids, **options)
