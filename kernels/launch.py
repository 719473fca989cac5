"""Launch configurations: one that is known to be good for each op and chip family, or what ``ssd-core bench tune``
found to be faster on a device of this name and keeps in a file."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path

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
class Products:
    """Of a kernel of the gradient filter: warps of a program; rows, columns of a tile and coordinates of a block."""

    warps: int
    rows: int = 0
    columns: int = 0
    hidden: int = 0

    def hidden_block(self, hidden: int) -> int:
        return min(self.hidden, max(16, triton.next_power_of_2(hidden)))


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Of a kernel that computes tiles of logits: rows and columns of a tile, terms of a product at a time, how many of
    those are on their way (``stages``), warps, tiles of rows that are worked on side by side (``group``), and into how
    many work items a vocabulary is cut if there is enough of it."""

    rows: int
    columns: int
    terms: int
    stages: int
    warps: int
    group: int = 16
    items: int = 1024

    @property
    def narrow(self) -> Tiles:
        """Of half as many columns, where so much is made of each logit that registers run out; a thread has 16 of them
        or more."""
        columns = self.columns // 2
        return dataclasses.replace(self, columns=columns, warps=min(self.warps, self.rows * columns // 512))


# Of 16-bit operands, by chip family: a tile whose float32 sums, and what is made of them, fit the registers.
TILES = {
    "sm_80": Tiles(128, 128, 32, 4, 8), "sm_90": Tiles(128, 128, 64, 4, 8), "sm_100": Tiles(128, 128, 64, 4, 8),
    "gfx942": Tiles(128, 128, 64, 2, 8)}
POINTER_TILES = Tiles(128, 64, 64, 3, 8)    # of operands without descriptors, where others have them
WIDE_TILES = Tiles(64, 64, 16, 2, 8)        # of float32 operands
# of two logits at a time, a student's and a teacher's: the same, in as few registers
PAIRS = {
    "sm_80": Tiles(64, 64, 32, 3, 8), "sm_90": Tiles(128, 64, 64, 4, 8), "sm_100": Tiles(128, 64, 64, 4, 8),
    "gfx942": Tiles(128, 64, 64, 2, 8)}
POINTER_PAIRS, WIDE_PAIRS = Tiles(64, 32, 64, 3, 4), Tiles(64, 32, 32, 2, 8)
SMALL_TILES, LARGE_TILES = Tiles(16, 64, 16, 1, 1, 2, 6), Tiles(16, 8192, 64, 1, 1, 2, 6)

# Blocks are as large as leaves two programs a multiprocessor, 128 registers a thread: see bench/resources.py.
ROWS = {
    "cross_entropy": Rows(4096, 8), "class_probabilities": Rows(2048, 8), "logprob": Rows(2048, 8),
    "distill": Rows(2048, 8), "distill_dense": Rows(4096, 8), "distill_dense_labels": Rows(1024, 4),
    "softmax": Rows(4096, 8),
    "sample_look": Rows(2048, 8), "sample_threshold": Rows(1024, 8), "sample_score": Rows(1024, 8),
    "sample": Rows(1024, 8)}
FILTER = {      # products by the bits of a number
    "select": Products(4), "moments": Products(8, rows=32),
    "input16": Products(8, rows=32, hidden=64), "weight16": Products(8, rows=32, columns=128, hidden=128),
    "input32": Products(8, rows=32, hidden=32), "weight32": Products(8, rows=32, columns=64, hidden=64)}
HELD = 16384            # numbers that a program can keep, 32 a thread, of a row that it then reads once
PROGRAMS = 256          # that fill a device, if each has a part of d_input's sum
OF_A_MULTIPROCESSOR = 4     # programs, where rows are in parts
# the interpreter: small blocks, so that small vocabularies cross their edges; large ones where time counts
SMALL, LARGE = Rows(256, 1), Rows(16384, 1)


def configured(op: str, hip: bool) -> Rows | Products:
    """AMD's warps are twice as wide."""
    found = (ROWS | FILTER)[op]
    return dataclasses.replace(found, warps=found.warps // 2) if hip else found


def tuned_file() -> Path:
    """``SSD_CORE_LAUNCH``, or in the user's cache. It is read once, and written by ``ssd-core bench tune`` alone."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")      # as it is where nobody is at home
    return Path(os.environ.get("SSD_CORE_LAUNCH") or os.path.join(cache, "ssd-core", "launch.json"))


@functools.cache
def everything_tuned() -> dict[str, dict[str, dict[str, int]]]:
    """By device name and op: fields of a configuration."""
    path = tuned_file()
    if not path.exists():
        return {}
    known = ROWS | FILTER | {f"{kind}{8 * size}": POINTER_TILES for kind in ("tiles", "pairs") for size in (2, 4)}
    try:
        found = json.loads(path.read_text())
        for op, fields in ((op, fields) for ops in found.values() for op, fields in ops.items()):
            dataclasses.replace(known[op], **{name: int(value) for name, value in fields.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RuntimeError(
            f"{path}: expected a file of `ssd-core bench tune`, tune anew or remove it ({error!r})") from None
    return found


@functools.cache
def device_name(index: int | None) -> str:
    return "interpreter" if INTERPRETED else torch.cuda.get_device_name(index)


def tuned(device: torch.device | None = None) -> dict[str, dict[str, int]]:
    """Of a device; None: the current one."""
    index = None if device is None else device.index
    if index is None and not INTERPRETED:
        index = torch.cuda.current_device()
    return everything_tuned().setdefault(device_name(index), {})


def with_tuned(found, op: str, device: torch.device | None = None):
    return dataclasses.replace(found, **tuned(device).get(op, {}))


def products(op: str) -> Products:
    return with_tuned(configured(op, HIP), op)


def rows(op: str, columns: int, held: int = 0) -> Rows:
    """``held``: numbers of each column that there are at a time, if the row is kept."""
    if INTERPRETED:
        return with_tuned(SMALL if columns <= 4 * SMALL.block else LARGE, op)
    found = with_tuned(configured(op, HIP), op)
    if fits(columns, held):
        return held_rows(found, whole(columns), held, HIP)
    return dataclasses.replace(found, block=min(found.block, whole(columns)))


def whole(columns: int) -> int:
    return max(128, triton.next_power_of_2(max(1, columns)))


def fits(columns: int, held: int) -> bool:
    return held > 0 and held * whole(columns) <= HELD


def held_rows(found: Rows, block: int, held: int, hip: bool) -> Rows:
    return Rows(block, max(found.warps, held * block // (32 * (64 if hip else 32))))


def tiles_of(family: str, dtype: torch.dtype, by_descriptor: bool, pairs: bool = False) -> Tiles:
    wide, by_pointer, usual = (WIDE_PAIRS, POINTER_PAIRS, PAIRS) if pairs else (WIDE_TILES, POINTER_TILES, TILES)
    if dtype.itemsize > 2:
        return wide
    return usual[family] if by_descriptor or family not in ("sm_90", "sm_100") else by_pointer


def tiles(
    columns: int, dtype: torch.dtype, device: torch.device, by_descriptor: bool, pairs: bool = False,
) -> Tiles:
    """``pairs``: of two logits at a time."""
    if INTERPRETED:
        found = SMALL_TILES if columns <= 4 * SMALL.block else LARGE_TILES
    elif HIP:
        found = tiles_of("gfx942", dtype, by_descriptor, pairs)
    else:
        major, _ = torch.cuda.get_device_capability(device)
        found = tiles_of(f"sm_{major}0" if major in (9, 10) else "sm_80", dtype, by_descriptor, pairs)
    return with_tuned(found, f"{'pairs' if pairs else 'tiles'}{8 * dtype.itemsize}", device)


def has_tensor_memory_accelerator(device: torch.device) -> bool:
    if INTERPRETED:
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def float32_products() -> str:
    """As precise as PyTorch's own. Of the two ways to ask, the older raises where the newer has been used."""
    return "ieee" if HIP or torch.backends.cuda.matmul.fp32_precision != "tf32" else "tf32"


def multiprocessors(device: torch.device) -> int:
    """The interpreter has one program after another, and so few."""
    return 3 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def parts_of(op: str, rows_count: int, columns: int, device: torch.device, most: int) -> tuple[int, int]:
    """Columns of a part of a row, whole blocks, and parts: as many, up to ``most``, as keep the device busy."""
    block = rows(op, columns).block
    blocks = triton.cdiv(columns, block)
    parts = min(most, blocks, triton.cdiv(OF_A_MULTIPROCESSOR * multiprocessors(device), max(1, rows_count)))
    width = triton.cdiv(blocks, parts) * block
    return width, triton.cdiv(columns, width)


def unseen(*shape: int, maxima, absent, device) -> torch.Tensor:
    """The float32 state of rows, in its last dimension, before anything was seen: -inf at ``maxima``, NaN at ``absent``
    (what somebody else may have), 0 elsewhere. Filled on the device: a list of places would be copied there."""
    state = torch.zeros(shape, dtype=torch.float32, device=device)
    for place in maxima:
        state[..., place].fill_(-torch.inf)
    for place in absent:
        state[..., place].fill_(torch.nan)
    return state


def row_launch(
    kernel, op: str, count: int, like: torch.Tensor, *arguments, parts: int = 1, held: int = 0, **options,
) -> None:
    """One program for each of ``count`` rows of as many columns as ``like`` (N, C), or for each of their parts. A
    kernel that can keep a row, and then has ``held`` numbers of each column at a time, is told if it does: ``HELD``.
    """
    if count == 0:
        return
    columns = like.shape[1]
    found = rows(op, columns, held)
    if held:
        options["HELD"] = fits(columns, held) and columns <= found.block
    kernel[(count, parts)](*arguments, **options, BLOCK_V=found.block, num_warps=found.warps)
