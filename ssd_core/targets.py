"""What a loss is computed against, when it is more than one label."""

from __future__ import annotations

import dataclasses

import torch

from ssd_core.checks import describe, expect, expect_type


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
        expect(self.ids.dtype in integers and self.ids.ndim > 0, "ids", "int32 or int64 (..., K)", describe(self.ids))
        floats = self.probs.is_floating_point() and self.probs.shape == self.ids.shape
        expect(floats, "probs", f"floating point {tuple(self.ids.shape)}", describe(self.probs))
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
