"""Launch configurations: one that is known to be good for each op and chip family."""

from __future__ import annotations

import dataclasses
import os

import torch
import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclasses.dataclass(frozen=True)
class Rows:
    """Of a kernel whose program has one row of logits: columns of a block, warps of a program."""

    block: int
    warps: int


@dataclasses.dataclass(frozen=True)
class Product:
    """Of a product with what the gradient filter left of a tile: rows, columns and coordinates of a block, warps."""

    rows: int
    columns: int
    hidden: int
    warps: int

    def hidden_block(self, hidden: int) -> int:
        return min(self.hidden, max(16, triton.next_power_of_2(hidden)))


# Blocks are as large as leaves two programs a multiprocessor, 128 registers a thread: see bench/resources.py.
ROWS = {
    "cross_entropy": Rows(4096, 8), "class_probabilities": Rows(2048, 8), "logprob": Rows(2048, 8),
    "distill": Rows(2048, 8), "distill_dense": Rows(4096, 8), "softmax": Rows(4096, 8), "sample": Rows(2048, 8)}
TILE_ROWS, TILE_WARPS = 32, 8       # of a program that looks at the gradient of a tile
PRODUCTS = {    # by the bytes of a number
    ("input", 2): Product(32, 256, 128, 8), ("weight", 2): Product(32, 128, 128, 8),
    ("input", 4): Product(32, 256, 64, 8), ("weight", 4): Product(32, 64, 64, 8)}
PROGRAMS = 256          # that fill a device, if each has a part of d_input's sum
# the interpreter: small blocks, so that small vocabularies cross their edges; large ones where time counts
SMALL, LARGE = Rows(256, 1), Rows(16384, 1)


def configured(op: str, hip: bool) -> Rows:
    """AMD's warps are twice as wide."""
    found = ROWS[op]
    return dataclasses.replace(found, warps=found.warps // 2) if hip else found


def rows(op: str, columns: int) -> Rows:
    if INTERPRETED:
        return SMALL if columns <= 4 * SMALL.block else LARGE
    found = configured(op, torch.version.hip is not None)
    return dataclasses.replace(found, block=min(found.block, max(128, triton.next_power_of_2(max(1, columns)))))


def row_launch(kernel, op: str, count: int, like: torch.Tensor, *arguments, **options) -> None:
    """One program for each of ``count`` rows of as many columns as ``like`` (N, C)."""
    if count == 0:
        return
    found = rows(op, like.shape[1])
    kernel[(count,)](*arguments, **options, BLOCK_V=found.block, num_warps=found.warps)
