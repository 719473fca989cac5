"""With ``SSD_CORE_TEST_DEVICE=cuda`` the ops' tests run on that device: problems, truths and what is compared stay on
the CPU, and each call of an op takes its tensors there and its results back. Gradients pass through both copies."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os

import torch
from torch.utils._pytree import tree_map

import ssd_core

DEVICE = os.environ.get("SSD_CORE_TEST_DEVICE", "cpu")
OPS = ("cross_entropy", "distill", "linear_cross_entropy", "linear_distill", "linear_logprob", "log_softmax", "logprob",
       "sample", "softmax")


def moved(value, device):
    """Tensors, targets and teachers, also inside of tuples."""
    def one(leaf):
        if isinstance(leaf, torch.Tensor):
            return leaf.to(device)
        if dataclasses.is_dataclass(leaf):
            return dataclasses.replace(leaf, **{f.name: one(getattr(leaf, f.name)) for f in dataclasses.fields(leaf)})
        return leaf

    return tree_map(one, value)


def run_on(function, device):
    """``function``, on copies of its arguments."""
    @functools.wraps(function)
    def call(*arguments, **options):
        return moved(function(*moved(arguments, device), **moved(options, device)), "cpu")

    return call


def move_ops(device) -> None:
    """Before a test imports them."""
    for name in OPS:
        module = importlib.import_module(f"ssd_core.ops.{name}")
        setattr(module, name, run_on(getattr(module, name), device))
        setattr(ssd_core, name, getattr(module, name))
