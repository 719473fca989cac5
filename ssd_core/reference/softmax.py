"""Softmax at a temperature in plain PyTorch."""

from __future__ import annotations

from ssd_core.reference.head import widen


def softmax(logits, *, temperature=1.0):
    """``softmax(logits / temperature)`` along the last axis."""
    return (widen(logits) / temperature).softmax(-1)
