"""Sample files: the sampler writes them group by group, the trainer reads them.

A folder holds ``manifest.json`` (the settings that the samples depend on), ``completions.jsonl`` (one line a
completion, append-only, keyed by prompt and sample index) and ``targets-NNNNN.safetensors`` (soft targets and
per-token statistics, one file a group). A group's targets are on disk before its lines; a group that is not whole is
dropped on opening, to be drawn again.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ssd_core.checks import UsageError
from ssd_core.files import AppendOnly, fsync, read_json, write_json
from ssd_core.targets import SparseTarget

STATISTICS = ("logprob", "sampling_logprob", "kept_mass", "entropy")


@dataclasses.dataclass(frozen=True, eq=False)
class Completion:
    """One completion of T tokens. Log-probabilities and entropies in nats, (T,) float32."""

    prompt_index: int
    sample_index: int
    prompt_ids: list[int]
    token_ids: list[int]            # as drawn, the end-of-sequence token included
    text: str                       # without special tokens and stop string
    finish_reason: str              # "stop": end-of-sequence or a stop string; "length": the limit was reached
    logprob: torch.Tensor           # of each token at temperature 1
    sampling_logprob: torch.Tensor  # of each token in the distribution that it was drawn from
    kept_mass: torch.Tensor         # of the kept tokens at the sampling temperature
    entropy: torch.Tensor           # of the model's distribution at temperature 1
    support: SparseTarget           # (T, K): the soft targets


class SampleStore:
    """The samples of one folder. ``settings`` must equal those of samples that are already there."""

    def __init__(self, folder: Path, settings: dict | None = None):
        self.folder = Path(folder)
        manifest = self.folder / "manifest.json"
        if settings is not None and not manifest.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(manifest, {"format": 1, "settings": settings})
        if not manifest.exists():
            raise UsageError(f"{self.folder}: no samples there (manifest.json is missing)")
        stored = read_json(manifest)["settings"]
        if settings is not None and stored != settings:
            names = sorted(name for name in {*stored, *settings} if stored.get(name) != settings.get(name))
            raise UsageError(f"{self.folder}: holds samples drawn with other settings: {', '.join(names)}")
        self._lines = AppendOnly(self.folder / "completions.jsonl")
        rows = self._lines.read()
        whole = {row["group"] for row in rows}
        if rows and sum(row["group"] == rows[-1]["group"] for row in rows) < rows[-1]["group_size"]:
            torn = rows[-1]["group"]
            self._lines.keep(lambda row: row["group"] != torn)
            whole.discard(torn)
        self.groups = len(whole)    # groups are drawn in order, so a count tells which

    def append(self, completions: list[Completion]) -> None:
        """Add the next group; on disk when this returns."""
        group = self.groups
        width = max((c.support.ids.shape[1] for c in completions), default=1)
        pad = lambda t: torch.nn.functional.pad(t, (0, width - t.shape[1]))  # noqa: E731
        tensors = {name: torch.cat([getattr(c, name) for c in completions]) for name in STATISTICS}
        tensors["support_ids"] = torch.cat([pad(c.support.ids) for c in completions])
        tensors["support_probs"] = torch.cat([pad(c.support.probs) for c in completions])
        path = self._targets(group)
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary)
        fsync(temporary)
        os.replace(temporary, path)
        fsync(self.folder)
        self._lines.append([self._line(c, group, len(completions)) for c in completions])
        self.groups += 1

    @staticmethod
    def _line(c: Completion, group: int, size: int) -> dict:
        means = {name: round(getattr(c, name).mean().item(), 6) if c.token_ids else None for name in STATISTICS}
        return {
            "prompt_index": c.prompt_index, "sample_index": c.sample_index, "finish_reason": c.finish_reason,
            "text": c.text, "prompt_ids": c.prompt_ids, "token_ids": c.token_ids, **means,
            "group": group, "group_size": size,
        }

    def __iter__(self) -> Iterator[Completion]:
        """All completions, in the order of (prompt index, sample index)."""
        completions, group, start = [], None, 0
        for row in self._lines.read():
            if row["group"] != group:
                group, start = row["group"], 0
                path = self._targets(group)
                if not path.exists():
                    raise UsageError(f"{path}: missing, though completions.jsonl lists its group")
                tensors = load_file(path)
            part = slice(start, start + len(row["token_ids"]))
            start = part.stop
            completions.append(Completion(
                **{name: row[name] for name in ("prompt_index", "sample_index", "prompt_ids", "token_ids", "text",
                                                "finish_reason")},
                **{name: tensors[name][part] for name in STATISTICS},
                support=SparseTarget(tensors["support_ids"][part], tensors["support_probs"][part])))
        return iter(sorted(completions, key=lambda c: (c.prompt_index, c.sample_index)))

    def _targets(self, group: int) -> Path:
        return self.folder / f"targets-{group:05d}.safetensors"
