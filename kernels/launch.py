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


# Blocks are as large as leaves two programs a multiprocessor, 128 registers a thread: see bench/resources.py.
ROWS = {
    "cross_entropy": Rows(4096, 8), "class_probabilities": Rows(2048, 8), "logprob": Rows(2048, 8),
    "distill": Rows(2048, 8), "distill_dense": Rows(4096, 8), "softmax": Rows(4096, 8),
    "sample_look": Rows(2048, 8), "sample_threshold": Rows(1024, 8), "sample_score": Rows(1024, 8),
    "sample": Rows(1024, 8)}
PROGRAMS = 4            # for each multiprocessor, where rows are in parts
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


def parts_of(op: str, rows_count: int, columns: int, device: torch.device, most: int) -> tuple[int, int]:
    """Columns of a part of a row, whole blocks, and parts: as many, up to ``most``, as keep the device busy."""
    block = rows(op, columns).block
    blocks = triton.cdiv(columns, block)
    parts = min(most, blocks, triton.cdiv(PROGRAMS * multiprocessors(device), max(1, rows_count)))
    width = triton.cdiv(blocks, parts) * block
    return width, triton.cdiv(columns, width)


def multiprocessors(device: torch.device) -> int:
    return 2 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def row_launch(kernel, op: str, count: int, like: torch.Tensor, *arguments, parts: int = 1, **options) -> None:
    """One program for each of ``count`` rows of as many columns as ``like`` (N, C), or for each of their parts."""
    if count == 0:
        return
    found = rows(op, like.shape[1])
    kernel[(count, parts)](*arguments, **options, BLOCK_V=found.block, num_warps=found.warps)
