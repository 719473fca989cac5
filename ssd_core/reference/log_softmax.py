"""Log-softmax at a temperature in plain PyTorch."""

from __future__ import annotations

from ssd_core.reference.head import widen


def log_softmax(logits, *, temperature=1.0):
    """``log_softmax(logits / temperature)`` along the last axis."""
    return (widen(logits) / temperature).log_softmax(-1)
