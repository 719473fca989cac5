"""Read a run directory, whatever of it exists."""

import json
import math
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssd_core.checks import UsageError
from ssd_core.evaluate import Evaluation

SAMPLES_SHOWN = 3


@dataclass
class Completions:
    """Numbers of every completion (NaN: not recorded) and a few of the texts."""

    lengths: array = field(default_factory=lambda: array("q"))
    stopped: array = field(default_factory=lambda: array("b"))  # 1: finish_reason "stop", 0: "length"
    entropy: array = field(default_factory=lambda: array("d"))
    kept_mass: array = field(default_factory=lambda: array("d"))
    shown: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass
class Run:
    """The parts of a run directory; a part that does not exist is None or empty.

    ``train`` and ``heldout`` are the records of metrics.jsonl by ascending step. ``notes`` says in words what could
    not be read.
    """

    path: Path
    config: dict[str, Any]
    train: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    completions: Completions | None
    summary: dict[str, Any]
    before: Evaluation | None
    after: Evaluation | None
    notes: list[str]

    @property
    def counts(self) -> dict[str, int]:
        """``completions empty truncated dropped trained``, as far as known."""
        counts = {}
        if self.completions is not None:
            counts = {
                "completions": len(self.completions),
                "empty": sum(length == 0 for length in self.completions.lengths),
                "truncated": len(self.completions) - sum(self.completions.stopped),
            }
        return counts | section(self.summary, "counts")


def read_run(run: str | os.PathLike) -> Run:
    """Read ``run``. Only ``config.json`` has to exist: :class:`UsageError` names it when it is missing or no object.

    Lines that do not parse (a killed run leaves half a line) are skipped and counted in ``notes``; of two records of
    the same step (a resumed run repeats some) the later one counts.
    """
    run = Path(run)
    notes: list[str] = []
    config = run / "config.json"
    if not config.is_file():
        raise UsageError(f"{run}: expected a run directory with a config.json, got none")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{config}: expected a JSON object, got {error}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{config}: expected a JSON object, got {type(settings).__name__}")

    train: dict[float, dict[str, Any]] = {}
    heldout: dict[float, dict[str, Any]] = {}
    for _, record in _records(run / "metrics.jsonl", run, notes):
        step = number(record.get("step"))
        kept = {"train": train, "eval": heldout}.get(record.get("kind"))
        if kept is not None and math.isfinite(step):
            kept[step] = record

    totals: dict[str, Any] = {}
    if (run / "summary.json").is_file():
        try:
            totals = json.loads((run / "summary.json").read_text(encoding="utf-8"))
            if not isinstance(totals, dict):
                raise ValueError(f"expected an object, got {type(totals).__name__}")
        except (OSError, ValueError) as error:
            totals = {}
            notes.append(f"summary.json could not be read: {error}")

    evaluations: dict[str, Evaluation | None] = {"before": None, "after": None}
    for name in evaluations:
        path = run / "evaluation" / f"{name}.json"
        if path.is_file():
            try:
                evaluations[name] = Evaluation.load(path)
            except UsageError as error:
                notes.append(f"evaluation/{name}.json could not be read: {str(error).removeprefix(f'{path}: ')}")

    return Run(
        path=run,
        config=settings,
        train=[train[step] for step in sorted(train)],
        heldout=[heldout[step] for step in sorted(heldout)],
        completions=_completions(run, notes),
        summary=totals,
        before=evaluations["before"],
        after=evaluations["after"],
        notes=notes,
    )


def number(value: Any) -> float:
    """``value`` as a float; NaN when it is no number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def section(record: dict[str, Any], name: str) -> dict[str, Any]:
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def _records(path: Path, run: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file with the offset of their lines; nothing when there is no file."""
    if not path.is_file():
        return
    skipped = offset = 0
    with open(path, "rb") as file:
        for line in file:
            begin, offset = offset, offset + len(line)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:  # half a line, or bytes that are not UTF-8
                record = None
            if isinstance(record, dict):
                yield begin, record
            else:
                skipped += 1
    if skipped:
        lines = "1 line" if skipped == 1 else f"{skipped} lines"
        notes.append(f"{path.relative_to(run).as_posix()}: {lines} did not parse and were left out")


def _completions(run: Path, notes: list[str]) -> Completions | None:
    path = run / "samples" / "completions.jsonl"
    if not path.is_file():
        return None
    found = Completions()
    offsets = array("q")
    for offset, record in _records(path, run, notes):
        tokens = record.get("token_ids")
        found.lengths.append(len(tokens) if isinstance(tokens, list) else 0)
        found.stopped.append(record.get("finish_reason") != "length")
        found.entropy.append(number(record.get("entropy")))
        found.kept_mass.append(number(record.get("kept_mass")))
        offsets.append(offset)
    # The first, the middle and the last of those with text: no hand-picking, and the file is never held in memory.
    filled = [place for place, length in enumerate(found.lengths) if length] or list(range(len(found)))
    places = sorted({round(part * (len(filled) - 1) / (SAMPLES_SHOWN - 1)) for part in range(SAMPLES_SHOWN)})
    with open(path, "rb") as file:
        for place in places if filled else ():
            file.seek(offsets[filled[place]])
            found.shown.append(json.loads(file.readline()))
    return found
