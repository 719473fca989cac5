"""From a byte budget to chunk sizes."""

from __future__ import annotations

import dataclasses

import torch

from ssd_core.checks import expect
from ssd_core.chunked.cross_entropy_rows import block_elements

MIB = 1 << 20
DEFAULT_WORKSPACE = {"cpu": 64 * MIB}  # bytes, by device type
ACCELERATOR_WORKSPACE = 512 * MIB


@dataclasses.dataclass(frozen=True)
class ChunkPlan:
    """``rows`` of logits are held at a time; products that are added to a wider accumulator come in ``columns``."""

    rows: int
    columns: int


def plan_chunks(
    tokens: int, hidden: int, vocab: int, support: int, *, dtype: torch.dtype, device: torch.device,
    gathered: bool, workspace_bytes: int | None,
) -> ChunkPlan:
    """Rows of (tokens, vocab) logits and columns of d_weight products that fit ``workspace_bytes``.

    The workspace holds, besides the logits: the rows gathered from ``input`` and written back to its gradient when
    ignored rows are dropped, targets, per-token results, the row pass's own buffers, and (16-bit only) a product on
    its way into the float32 accumulator of d_weight.
    """
    if workspace_bytes is None:
        workspace_bytes = DEFAULT_WORKSPACE.get(device.type, ACCELERATOR_WORKSPACE)
    itemsize = dtype.itemsize
    per_token = 4 * 8  # loss, nll, lse, row scale, row index
    row_pass = 6 * max(vocab, block_elements(device)) * 4
    columns = vocab
    product = 0
    if itemsize == 2:
        # one eighth of the budget, or at least a thin slice of the vocabulary
        columns = min(vocab, max(64, workspace_bytes // 8 // (hidden * itemsize)))
        product = columns * hidden * itemsize
    fixed = tokens * per_token + row_pass + product
    vectors = (2 if gathered else 0) + (1 if itemsize > 2 else 0)     # gathered and returned rows; a partial product
    per_row = vocab * itemsize + support * 12 + vectors * hidden * itemsize
    rows = min(tokens, (workspace_bytes - fixed) // per_row)
    if tokens:
        least = fixed + per_row
        expect(rows >= 1, "workspace_bytes", f"at least {least} for one row of {vocab} logits", workspace_bytes)
    return ChunkPlan(rows=max(rows, 1), columns=columns)
