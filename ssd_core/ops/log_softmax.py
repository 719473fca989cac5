"""``log_softmax`` of logits at a temperature."""

from __future__ import annotations

from torch import Tensor

from ssd_core.ops.softmax import of_rows


def log_softmax(logits: Tensor, temperature: float = 1.0, *, backend: str = "auto") -> Tensor:
    """It equals::

        F.log_softmax(logits.float() / temperature, -1).to(logits.dtype)

    and rounds once, without float32 copies. ``logits`` (..., V), any floating dtype; -inf stays -inf; a row of -inf
    alone, or with a NaN or +inf, gives NaN.

    Raises:
        ValueError, TypeError: an argument does not fit. RuntimeError: ``create_graph=True``.
    """
    return of_rows(logits, temperature, True, backend)
