"""Softmax and log-softmax of rows at a temperature, and their gradients, in blocks of rows that stay in cache."""

from __future__ import annotations

import torch

from ssd_core.chunked.logits import blocks, wide_dtype


def softmax(logits, *, temperature: float, log: bool = False):
    """Of ``logits / temperature`` (N, V) along the last axis, rounded once to their dtype."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for block in blocks(*logits.shape, logits):
        z = _tempered(logits[block], temperature)
        if log:
            out[block] = torch.log_softmax(z, -1)
        else:
            # the library's running sum is off by 1e-5 where V = 262,144; sum adds up in pairs
            p = torch.softmax(z, -1)
            out[block] = p.div_(p.sum(-1, keepdim=True))
    return out


def softmax_backward(grad, out, *, temperature: float, log: bool = False):
    """d logits (N, V) from ``grad`` with respect to ``out``: p (g - sum(g p)) / temperature, or of the logarithm
    (g - p sum(g)) / temperature."""
    d_logits = torch.empty_like(out)
    for block in blocks(*out.shape, out):
        g, p = grad[block].to(wide_dtype(out.dtype)), out[block].to(wide_dtype(out.dtype))
        if log:
            d = g - p.exp() * g.sum(-1, keepdim=True)
        else:
            d = p * (g - (g * p).sum(-1, keepdim=True))
        d_logits[block] = d.div_(temperature)
    return d_logits


def log_softmax(logits, *, temperature: float):
    return softmax(logits, temperature=temperature, log=True)


def log_softmax_backward(grad, out, *, temperature: float):
    return softmax_backward(grad, out, temperature=temperature, log=True)


def _tempered(logits, temperature):
    z = logits.to(wide_dtype(logits.dtype))
    return z if temperature == 1 else z / temperature
