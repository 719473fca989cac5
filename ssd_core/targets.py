"""What a loss is computed against, when it is more than one label."""

from __future__ import annotations

import dataclasses

import torch

from ssd_core.checks import expect, expect_type, finite_positive


@dataclasses.dataclass(frozen=True, eq=False)
class SparseTarget:
    """Weights on a few of the V vocabulary ids, for each token.

    ``ids`` (..., K) int32 or int64 and ``probs`` (..., K) float, non-negative. Unused places have probability 0 and any
    id; a token whose probabilities are all 0 is ignored. Ids may repeat and weights need not sum to 1 (importance
    weights are such a target).
    """

    ids: torch.Tensor
    probs: torch.Tensor

    def __post_init__(self) -> None:
        expect_type(self.ids, "ids", torch.Tensor, "a tensor")
        expect_type(self.probs, "probs", torch.Tensor, "a tensor")
        integers = (torch.int32, torch.int64)
        expect(self.ids.dtype in integers and self.ids.ndim > 0, "ids", "int32 or int64 (..., K)", self.ids)
        floats = self.probs.is_floating_point() and self.probs.shape == self.ids.shape
        expect(floats, "probs", lambda: f"floating point {tuple(self.ids.shape)}", self.probs)
        expect(not self.probs.requires_grad, "probs", "a constant target", "a tensor that requires grad")

    @property
    def shape(self) -> torch.Size:
        """The shape of the tokens: without K."""
        return self.ids.shape[:-1]

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def __getitem__(self, index) -> SparseTarget:
        """Tokens by index, mask or slice along the leading dimensions."""
        return SparseTarget(self.ids[index], self.probs[index])

    def to(self, device) -> SparseTarget:
        return SparseTarget(self.ids.to(device), self.probs.to(device))


@dataclasses.dataclass(frozen=True, eq=False)
class TeacherLogits:
    """A teacher's logits (..., V') for each token, before the temperature: constants, read chunk by chunk."""

    logits: torch.Tensor

    def __post_init__(self) -> None:
        expect_type(self.logits, "logits", torch.Tensor, "a tensor")
        floats = self.logits.is_floating_point() and self.logits.ndim > 0 and self.logits.shape[-1] > 0
        expect(floats, "logits", "floating point (..., V)", self.logits)
        expect(not self.logits.requires_grad, "logits", "a constant teacher", "a tensor that requires grad")

    @property
    def shape(self) -> torch.Size:
        """The shape of the tokens: without V'."""
        return self.logits.shape[:-1]

    @property
    def device(self) -> torch.device:
        return self.logits.device


@dataclasses.dataclass(frozen=True, eq=False)
class TeacherHidden:
    """A teacher's hidden states (..., D') and its head (V', D'): logits ``softcap * tanh(logit_scale * linear(input) /
    softcap)``, computed chunk by chunk and never kept. Any gradient to them is cut off."""

    input: torch.Tensor
    linear_weight: torch.Tensor
    linear_bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        for name in ("input", "linear_weight"):
            expect_type(getattr(self, name), name, torch.Tensor, "a tensor")
        expect(self.input.is_floating_point() and self.input.ndim > 0, "input", "floating point (..., D)", self.input)
        hidden = self.input.shape[-1]
        matrix = self.linear_weight.ndim == 2 and self.linear_weight.shape[1] == hidden and len(self.linear_weight) > 0
        expect(matrix, "linear_weight", f"(V, {hidden})", self.linear_weight)
        same = self.linear_weight.dtype == self.input.dtype
        expect(same, "linear_weight", f"{self.input.dtype} like input", self.linear_weight.dtype)
        if self.linear_bias is not None:
            vector = self.linear_bias.shape == self.linear_weight.shape[:1] and self.linear_bias.is_floating_point()
            expect(vector, "linear_bias", f"floating point ({len(self.linear_weight)},)", self.linear_bias)
        finite_positive(self.logit_scale, "logit_scale")
        if self.softcap is not None:
            finite_positive(self.softcap, "softcap")

    @property
    def shape(self) -> torch.Size:
        """The shape of the tokens: without D'."""
        return self.input.shape[:-1]

    @property
    def device(self) -> torch.device:
        return self.input.device
