"""Cross-entropy of a linear head in plain PyTorch: the (N, V) logits are there, and autograd does the rest."""

from __future__ import annotations

from ssd_core.reference.cross_entropy import cross_entropy
from ssd_core.reference.head import outputs


def linear_cross_entropy(input, linear_weight, ids=None, probs=None, *, linear_bias=None, **options):
    """Loss, negative log-likelihood and log-sum-exp of each token, each (N,): ``cross_entropy`` of ``input`` (N, D).

    ``linear_weight`` (V, D), ``linear_bias`` (V,) or None. Computed in float64 when given float64, else in float32.
    """
    return cross_entropy(outputs(input, linear_weight, linear_bias), ids, probs, **options)
