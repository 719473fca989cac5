"""What a GPU should need at least for each op, and what we predict of backend "triton": for a GPU run to test.

    python -P -m ssd_core.bench.roofline --tokens 8192 --workspace 1024

A prediction is arithmetic. A matrix product takes the longer of its FLOP over the rate of such a product and its bytes
over the rate of a copy, which it overlaps; a row kernel, which overlaps with nothing, its bytes: those of a further
look at a row only if the rows that are worked on side by side, two on a multiprocessor, do not fit the chip's cache.
Launches are not in it. ``grad_filter`` is the cross-entropy of which 5 % of the pairs of a tile and a token are left,
as with SmolLM2 and a bound of 0.01, over the exact products. Of an op with two routes, the tiled one is beside the
chunked one: its products for each look and for the gradient in a kernel of ours, 1.2 times as long as the library's
(a guess, in ``plan.TILED``), which move no logits but their gradient.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Optional

import typer
from ssd_core.bench.cases import HEADS, Head, head
from ssd_core.bench.verdict import TARGETS

from ssd_core.checks import UsageError
from ssd_core.plan import MIB, TILED

HEADING = """# What a GPU should need: predicted, not measured

Of backend "triton", by arithmetic from what a chip can do: floor / prediction, and their ratio; behind it that of the
tiled route. `python -P -m ssd_core.bench.roofline --out bench/ROOFLINE.md` writes this page."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """``flops`` of a bfloat16 matrix product and ``bandwidth`` of a copy, bytes read and written, a second; bytes of
    ``cache`` that ``multiprocessors`` share. Of a multiprocessor ``threads``, ``registers`` and bytes of ``shared``
    memory, 1 KiB of which each program takes besides."""

    name: str
    flops: float
    bandwidth: float
    source: str
    multiprocessors: int = 132
    cache: int = 50 << 20
    threads: int = 2048
    registers: int = 65536
    shared: int = 228 << 10

    def programs(self, warps: int, registers: int, shared: int) -> int:
        """Of a kernel side by side on one multiprocessor."""
        return min(self.threads // (32 * warps), self.registers // (32 * warps * registers),
                   self.shared // (shared + 1024))


CHIPS = (
    Chip("H100", 798e12, 3.0e12, "measured: 8192 x 8192 x 8192 on random data; a copy on the device"),
    Chip("B200", 0.8 * 2250e12, 0.9 * 8.0e12, "not measured: 0.8 and 0.9 of what the vendor says", 148, 126 << 20),
)


@dataclasses.dataclass(frozen=True)
class Work:
    """``products``: matrix products of (N, V, D). Bytes of a logit that the least possible kernel moves; and ours: so
    many ``looks`` at ``seen`` bytes, and what is written, or read besides."""

    products: int
    floor: float
    looks: int
    seen: float
    written: float
    about: str
    tiled: int = 0              # looks at tiles, the gradient's among them, if there is such a route, too
    active: float = 1.0         # of two products the share that is left, by kernels of ours

    def row_seconds(self, chip: Chip, tokens: int, vocab: int) -> float:
        held = 2 * chip.multiprocessors * self.seen * vocab <= chip.cache
        return ((1 if held else self.looks) * self.seen + self.written) * tokens * vocab / chip.bandwidth


HEAD = Work(3, 0, 2, 4, 2, "float32 outputs looked at twice, bfloat16 gradient")
TILED_HEAD = dataclasses.replace(HEAD, tiled=2)
WORK = {
    "linear_cross_entropy": TILED_HEAD,
    "linear_distill": TILED_HEAD,
    "linear_distill_hidden": Work(
        4, 0, 3, 4 + 4, 2, "JSD: both sides looked at three times (a forward KL: twice)", tiled=3),
    "linear_logprob": TILED_HEAD,
    "grad_filter": Work(3, 0, 2, 4, 2 + 2, "exact floor; the gradient read once more for its moments", active=0.05),
    "softmax": Work(0, 2 + 2, 2, 2, 2, "looked at twice"),
    "log_softmax": Work(0, 2 + 2, 2, 2, 2, "looked at twice"),
    "cross_entropy": Work(0, 2 + 2, 2, 2, 2, "looked at twice"),
    "distill": Work(0, 2 + 2 + 2, 2, 2 + 2, 2, "forward KL: both sides looked at twice"),
    "sample": Work(
        0, 2, 1, 2, 0, "looked at once, with top-k up to 512; again only what may be among the k largest"),
}


@dataclasses.dataclass(frozen=True)
class Prediction:
    op: str
    case: str
    chip: str
    floor: float            # seconds
    seconds: float
    tiled: float | None     # of the tiled route

    @property
    def over_floor(self) -> float:
        return self.seconds / self.floor


def product(chip: Chip, m: int, n: int, k: int, out_bytes: float) -> float:
    """Seconds of (m, k) times (k, n), operands of 2 bytes, ``out_bytes`` moved for each element of the result."""
    return max(2 * m * n * k / chip.flops, (2 * (m * k + k * n) + out_bytes * m * n) / chip.bandwidth)


def predict(op: str, case: str, head: Head, chip: Chip, tokens: int, workspace: int) -> Prediction:
    """``workspace`` in bytes bounds a chunk's rows, and so how often d_weight is added up in float32."""
    work, v, d = WORK[op], head.vocab, head.hidden
    floor = 2 * work.products * tokens * v * d / chip.flops + work.floor * tokens * v / chip.bandwidth
    seconds = work.row_seconds(chip, tokens, v)
    if work.products:
        teachers = work.products - 3
        chunks = -(-tokens // min(tokens, max(1, workspace // (4 * v * (1 + teachers)))))
        rows = -(-tokens // chunks)
        gradients = product(chip, rows, d, v, 2) + product(chip, v, d, rows, 8 if chunks > 1 else 2)
        if work.active < 1:
            gradients = TILED[2] * (product(chip, rows, d, round(work.active * v), 8)
                                    + product(chip, v, d, round(work.active * rows), 8))
        seconds += chunks * ((1 + teachers) * product(chip, rows, v, d, 4) + gradients)
        if chunks > 1 or work.active < 1:
            seconds += (4 + 2) * v * d / chip.bandwidth         # rounded once
    return Prediction(op, case, chip.name, floor, seconds, predict_tiled(work, head, chip, tokens, workspace)
                      if work.tiled else None)


def predict_tiled(work: Work, head: Head, chip: Chip, tokens: int, workspace: int) -> float:
    """Seconds of products of our own for each look, and two of the library for each span of a bfloat16 gradient."""
    v, d = head.vocab, head.hidden
    spans = -(-v // min(v, max(1, workspace // (2 * tokens))))
    columns = -(-v // spans)
    kept, written = product(chip, tokens, v, d, 0), product(chip, tokens, v, d, 2)
    seconds = TILED[2] * (work.tiled * (work.products - 2) * kept + written - kept)
    added = 8 if spans > 1 else 2                                # d_input is added up in float32, d_weight never
    return seconds + spans * (product(chip, tokens, d, columns, added) + product(chip, columns, d, tokens, 2))


def table(found: list[Prediction], tokens: int) -> str:
    """Markdown; a line for each op and head, floor / prediction of each chip in milliseconds, and their ratio; then the
    tiled route's."""
    chips = list(dict.fromkeys(one.chip for one in found))
    lines = [f"| N = {tokens:,}, bfloat16, predicted | " + " | ".join(chips) + " |", "|---" * (1 + len(chips)) + "|"]
    groups: dict[tuple, list[Prediction]] = {}
    for one in found:
        groups.setdefault((one.op, one.case), []).append(one)
    for (op, case), ones in groups.items():
        cells = [f"{1e3 * one.floor:.2f} / {1e3 * one.seconds:.2f} ms: {one.over_floor:.2f}"
                 + (f"; tiled {1e3 * one.tiled:.2f} ms: {one.tiled / one.floor:.2f}" if one.tiled else "")
                 for one in ones]
        lines.append(f"| {op}, {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def beside_targets(chip: Chip) -> str:
    """Markdown: what the better route is predicted to need of each target's floor, at the target's workspace."""
    lines = [f"| target | predicted, {chip.name} |", "|---|---|"]
    for target in TARGETS:
        op = "grad_filter" if target.filtered else target.op
        if target.device == "cuda" and not target.seconds:
            found = predict(op, target.case, head(target.case), chip, target.tokens, (target.workspace or 1024) * MIB)
            best = min(found.seconds, found.tiled or found.seconds) / found.floor
            lines.append(f"| {target} | {best:.2f} |")
    return "\n".join(lines)


def occupancy() -> str:
    """Markdown: programs of each kernel that share a multiprocessor, from its registers on that chip's target."""
    from ssd_core.bench.resources import everything

    target = {"sm_90": CHIPS[0], "sm_100": CHIPS[1]}
    lines = ["| kernel | " + " | ".join(chip.name for chip in target.values()) + " |", "|---" * (1 + len(target)) + "|"]
    by_variant: dict[str, list[str]] = {}
    for one in everything(tuple(target)):
        chip = target[one.target]
        programs = chip.programs(one.warps, one.registers, one.shared)
        by_variant.setdefault(one.variant, []).append(
            f"{programs} of {one.warps} warps: {100 * 32 * programs * one.warps // chip.threads} %")
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in by_variant.items())])


def main(
    ops: Annotated[str, typer.Option(help="comma-separated")] =
    "linear_cross_entropy,grad_filter,linear_distill,linear_distill_hidden,linear_logprob,softmax,cross_entropy,distill",
    cases: Annotated[str, typer.Option(help=f"comma-separated: {', '.join(HEADS)}, smollm2@D, VxD")] =
    "llama-3-8b,qwen2.5-7b,gemma-2-2b,gemma-3-1b,smollm2@4096",
    tokens: Annotated[int, typer.Option(min=1)] = 8192,
    workspace: Annotated[int, typer.Option(min=1, help="MiB")] = 1024,
    with_occupancy: Annotated[bool, typer.Option("--occupancy", help="that of each kernel, which compiles it")] = False,
    out: Annotated[Optional[Path], typer.Option(help="Markdown file to write")] = None,  # noqa: UP045
):
    """Floors and predictions of backend "triton"."""
    if unknown := set(ops.split(",")) - set(WORK):
        raise UsageError(f"ops: expected some of {', '.join(WORK)}, got {sorted(unknown)}")
    found = [predict(op, case, head(case), chip, tokens, workspace * MIB)
             for op in ops.split(",") for case in cases.split(",") for chip in CHIPS]
    parts = ["\n".join(f"- {chip.name}: {chip.flops / 1e12:.0f} TFLOP/s, {chip.bandwidth / 1e12:.1f} TB/s "
                       f"({chip.source})" for chip in CHIPS), table(found, tokens), beside_targets(CHIPS[0])]
    if with_occupancy:
        parts.append(occupancy())
    print("\n\n".join(parts))
    if out:
        out.write_text("\n\n".join([HEADING, *parts]) + "\n")


if __name__ == "__main__":
    typer.run(main)
