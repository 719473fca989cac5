"""Distillation into a linear head in plain PyTorch: the (N, V) logits are there, and autograd does the rest."""

from __future__ import annotations

from ssd_core.reference.distill import distill
from ssd_core.reference.head import outputs


def linear_distill(
    input, linear_weight, *, linear_bias=None, ids=None, probs=None, teacher_logits=None, teacher_input=None,
    teacher_weight=None, teacher_bias=None, teacher_logit_scale=1.0, teacher_softcap=None, **options,
):
    """Loss, divergence, nll and log-sum-exp of each token, each (N,): ``distill`` of ``input`` (N, D) times the head.

    One teacher: ``ids`` and ``probs`` (N, K), or ``teacher_logits`` (N, V'), or ``teacher_input`` (N, D') with a
    head of its own, ``teacher_weight`` (V', D') and ``teacher_bias`` (V',) or None.
    """
    u = outputs(input, linear_weight, linear_bias)
    teacher_u = teacher_logits
    if teacher_input is not None:
        teacher_u = outputs(teacher_input.to(u.dtype), teacher_weight, teacher_bias)
    return distill(
        u, ids=ids, probs=probs, teacher_u=teacher_u, teacher_logit_scale=teacher_logit_scale,
        teacher_softcap=teacher_softcap, **options)
