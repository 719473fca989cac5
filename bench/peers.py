"""Who is measured: ways to take loss and gradients of a head. Each is ``(input, weight, target) -> loss``."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ssd_core import linear_cross_entropy, native

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Variant:
    name: str
    loss: Callable | None
    missing: str = ""                   # why it cannot run here
    workspace: int | None = None        # bytes that it promises to keep to


def eager(input, weight, target):
    return F.cross_entropy(F.linear(input, weight), target)


def pytorch_chunked(input, weight, target):
    return F.linear_cross_entropy(input, weight, target, options=torch.nn.LinearCrossEntropyOptions())


def cut_cross_entropy(input, weight, target):
    from cut_cross_entropy import linear_cross_entropy as cce

    return cce(input, weight, target, impl="torch_compile")


def variants(workspaces=(16, 64, 256)) -> list[Variant]:
    """The peers that are there, and those that are not with the reason."""
    found = [Variant("PyTorch eager", eager)]
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found.append(Variant("PyTorch linear_cross_entropy(options)", pytorch_chunked))
    else:
        found.append(Variant("PyTorch linear_cross_entropy(options)", None, f"torch {torch.__version__} has none"))
    absent = [name for name in ("cut_cross_entropy", "triton") if importlib.util.find_spec(name) is None]
    found.append(Variant("cut-cross-entropy torch_compile", None if absent else cut_cross_entropy,
                         f"{' and '.join(absent)} not installed" if absent else ""))
    ours = functools.partial(linear_cross_entropy, backend="torch", workspace_bytes=64 * MIB)
    found.append(Variant("ssd-core torch, 64 MiB", ours, workspace=64 * MIB))
    for mebibytes in workspaces:
        ours = functools.partial(linear_cross_entropy, backend="cpu", workspace_bytes=mebibytes * MIB)
        missing = native.missing() or ""
        found.append(Variant(f"ssd-core cpu, {mebibytes} MiB", None if missing else ours, missing, mebibytes * MIB))
    return found
