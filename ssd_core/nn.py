"""The losses as modules."""

from __future__ import annotations

import torch

from ssd_core.ops.linear_cross_entropy import linear_cross_entropy
from ssd_core.ops.linear_distill import linear_distill


class _Loss(torch.nn.Module):
    """Holds options of a loss for every call."""

    function: staticmethod

    def __init__(self, **options):
        super().__init__()
        known = set(self.function.__kwdefaults__)
        unknown = set(options) - known
        if unknown:
            raise TypeError(f"options: expected some of {sorted(known)}, got {sorted(unknown)}")
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearCrossEntropyLoss(_Loss):
    """``linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias, **options)``

    The options given here hold for every call; those of a call override them. The head's weight stays where it
    belongs, in the model, and is passed to each call::

        loss = LinearCrossEntropyLoss(softcap=30.0)(hidden, model.lm_head.weight, labels)
    """

    function = staticmethod(linear_cross_entropy)

    def forward(self, input, linear_weight, target, linear_bias=None, **options):
        return linear_cross_entropy(
            input, linear_weight, target, **{"linear_bias": linear_bias, **self.options, **options})


class LinearDistillLoss(_Loss):
    """``linear_distill(input, linear_weight, teacher, target=target, linear_bias=linear_bias, **options)``, as
    ``LinearCrossEntropyLoss``::

        teacher = TeacherHidden(teacher_hidden, teacher_model.lm_head.weight)
        loss = LinearDistillLoss(divergence="reverse_kl")(hidden, model.lm_head.weight, teacher)
    """

    function = staticmethod(linear_distill)

    def forward(self, input, linear_weight, teacher, target=None, linear_bias=None, **options):
        return linear_distill(
            input, linear_weight, teacher, **{"target": target, "linear_bias": linear_bias, **self.options, **options})
