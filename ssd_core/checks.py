"""Argument checks and their wording: which argument, what was expected, what was given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class UsageError(ValueError):
    """What was asked for cannot be done as asked: a wrong path, option, file, value. The command line then exits 2."""


def expect(condition: bool, argument: str, expected: str | Callable[[], str], given: object) -> None:
    """Raise ``ValueError("argument: expected ..., got ...")`` unless the condition holds. A tensor is described.
    ``expected`` is a function where it prints numbers of tokens: torch.compile makes constants of printed sizes."""
    if not condition:
        expected = expected() if callable(expected) else expected
        given = describe(given) if hasattr(given, "dtype") else given
        raise ValueError(f"{argument}: expected {expected}, got {given}")


def expect_type(value: object, argument: str, types: type | tuple[type, ...], expected: str) -> None:
    if not isinstance(value, types):
        raise TypeError(f"{argument}: expected {expected}, got {type(value).__name__}")


def describe(tensor: torch.Tensor) -> str:
    """``float32 (3, 4) on cpu``"""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}"


def finite_positive(value: float, argument: str) -> None:
    expect(0 < value < math.inf, argument, "a finite number above 0", value)


def finite_not_negative(value: float, argument: str) -> None:
    expect(0 <= value < math.inf, argument, "a finite number, at least 0", value)


def in_range(value: float, argument: str, low: float, high: float) -> None:
    expect(low <= value <= high, argument, f"a number in [{low}, {high}]", value)


def one_of(value: str, argument: str, choices: tuple[str, ...]) -> None:
    *others, last = map(repr, choices)
    expect(value in choices, argument, f"{', '.join(others)} or {last}", repr(value))


def labels_in_range(labels: torch.Tensor, used: torch.Tensor, vocab: int, argument: str) -> None:
    """On CPU, name the first label outside [0, V) of those that are used. On an accelerator that would cost a
    synchronisation: there the loss of such a token is NaN."""
    if labels.device.type != "cpu":
        return
    bad = ((labels < 0) | (labels >= vocab)) & used
    if bad.any():
        label = labels[bad].flatten()[0].item()
        raise IndexError(f"{argument}: expected labels in [0, {vocab}) or ignore_index, got {label}")


def permutation(order: torch.Tensor, argument: str) -> None:
    """Of 0 ... V - 1, for ``order`` (V,) int64. On CPU; on an accelerator it would cost a synchronisation."""
    if order.device.type == "cpu" and order.numel():
        within = order.min() >= 0 and order.max() < len(order)
        holds = within and order.new_zeros(len(order)).index_fill_(0, order, 1).all()
        expect(holds, argument, f"a permutation of 0 ... {len(order) - 1}", "ids that repeat or are out of range")


def not_negative(weights: torch.Tensor, argument: str) -> None:
    """On CPU; on an accelerator it would cost a synchronisation."""
    if weights.device.type == "cpu":
        expect(not (weights < 0).any(), argument, "weights of at least 0", "a negative one")
