"""From hidden states to logits: what every op of a linear head begins with."""

from __future__ import annotations

import torch


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """float64 stays, everything else is computed in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def outputs(input, linear_weight, linear_bias=None):
    """``u = input @ linear_weight.T + linear_bias`` (N, V) of ``input`` (N, D), in the wide dtype of ``input``."""
    x = widen(input)
    u = x @ linear_weight.to(x.dtype).T
    return u if linear_bias is None else u + linear_bias.to(x.dtype)


def logits(u, *, logit_scale=1.0, softcap=None):
    """``c = softcap * tanh(logit_scale * u / softcap)``, or ``logit_scale * u`` without a softcap."""
    c = logit_scale * widen(u)
    return c if softcap is None else softcap * torch.tanh(c / softcap)


def logsumexp_off(z, on):
    """(N,) log-sum-exp of ``z`` (N, V) where ``on`` (N, V) is False; -inf, with gradient 0, if nothing is there."""
    off = z.masked_fill(on, -torch.inf)
    nothing = off.amax(-1) == -torch.inf
    return off.masked_fill(nothing.unsqueeze(-1), 0).logsumexp(-1).masked_fill(nothing, -torch.inf)
