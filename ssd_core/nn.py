"""The losses as modules."""

from __future__ import annotations

import torch

from ssd_core.ops.linear_cross_entropy import linear_cross_entropy


class LinearCrossEntropyLoss(torch.nn.Module):
    """``linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias, **options)``

    The options given here hold for every call; those of a call are added to them. The head's weight stays where it
    belongs, in the model, and is passed to each call::

        loss = LinearCrossEntropyLoss(softcap=30.0)(hidden, model.lm_head.weight, labels)
    """

    def __init__(self, **options):
        super().__init__()
        known = set(linear_cross_entropy.__kwdefaults__)
        unknown = set(options) - known
        if unknown:
            raise TypeError(f"options: expected some of {sorted(known)}, got {sorted(unknown)}")
        self.options = options

    def forward(self, input, linear_weight, target, linear_bias=None, **options):
        return linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias, **self.options, **options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
