"""Launch configurations: one that is known to be good for each op and chip family."""

from __future__ import annotations

import dataclasses
import os

import torch
import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HIP = torch.version.hip is not None


@dataclasses.dataclass(frozen=True)
class Rows:
    """Of a kernel whose program has one row of logits: columns of a block, warps of a program."""

    block: int
    warps: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Of a kernel of the gradient filter: warps of a program; rows, columns of a tile and coordinates of a block."""

    warps: int
    rows: int = 0
    columns: int = 0
    hidden: int = 0

    def hidden_block(self, hidden: int) -> int:
        return min(self.hidden, max(16, triton.next_power_of_2(hidden)))


# Blocks are as large as leaves two programs a multiprocessor, 128 registers a thread: see bench/resources.py.
ROWS = {
    "cross_entropy": Rows(4096, 8), "class_probabilities": Rows(2048, 8), "logprob": Rows(2048, 8),
    "distill": Rows(2048, 8), "distill_dense": Rows(4096, 8), "softmax": Rows(4096, 8), "sample": Rows(2048, 8)}
FILTER = {      # products by the bits of a number
    "select": Tiles(4), "moments": Tiles(8, rows=32),
    "input16": Tiles(8, rows=32, hidden=64), "weight16": Tiles(8, rows=32, columns=128, hidden=128),
    "input32": Tiles(8, rows=32, hidden=32), "weight32": Tiles(8, rows=32, columns=64, hidden=64)}
PROGRAMS = 256          # that fill a device, if each has a part of d_input's sum
# the interpreter: small blocks, so that small vocabularies cross their edges; large ones where time counts
SMALL, LARGE = Rows(256, 1), Rows(16384, 1)


def configured(op: str, hip: bool) -> Rows | Tiles:
    """AMD's warps are twice as wide."""
    found = (ROWS | FILTER)[op]
    return dataclasses.replace(found, warps=found.warps // 2) if hip else found


def rows(op: str, columns: int) -> Rows:
    if INTERPRETED:
        return SMALL if columns <= 4 * SMALL.block else LARGE
    found = configured(op, HIP)
    return dataclasses.replace(found, block=min(found.block, max(128, triton.next_power_of_2(max(1, columns)))))


def row_launch(kernel, op: str, count: int, like: torch.Tensor, *arguments, **options) -> None:
    """One program for each of ``count`` rows of as many columns as ``like`` (N, C)."""
    if count == 0:
        return
    found = rows(op, like.shape[1])
    kernel[(count,)](*arguments, **options, BLOCK_V=found.block, num_warps=found.warps)
