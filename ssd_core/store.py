"""Sample files: the sampler writes them group by group, the trainer reads them.

A folder holds ``manifest.json`` (the settings that the samples depend on), ``completions.jsonl`` (one line a
completion, append-only, keyed by prompt and sample index) and ``targets-NNNNN.safetensors`` (soft targets and
per-token statistics, one file a group). A group's targets are on disk before its lines; a group that is not whole is
dropped on opening, to be drawn again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ssd_core.checks import UsageError
from ssd_core.files import AppendOnly, read_json, write_atomic, write_json
from ssd_core.targets import SparseTarget

FORMAT = 1
STATISTICS = ("logprob", "sampling_logprob", "kept_mass", "entropy")
FIELDS = {"prompt_index": int, "sample_index": int, "prompt_ids": list, "token_ids": list, "text": str,
          "finish_reason": str}
LINE = {**FIELDS, "group": int, "group_size": int}      # what a line must hold; it also has each statistic's mean


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
    """The samples of one folder. With ``settings`` it can be appended to, and they must equal those of samples that are
    already there; without, it is only read, also while another process appends.
    """

    def __init__(self, folder: Path, settings: dict | None = None):
        self.folder = Path(folder)
        self._lines = AppendOnly(self.folder / "completions.jsonl")
        self.settings = self._manifest(settings)
        groups, torn = self._read()
        self.groups = len(groups)       # groups are drawn in order, so a count tells which
        if torn and settings is not None:
            self._lines.keep(lambda row: row["group"] < self.groups)

    def append(self, completions: list[Completion]) -> None:
        """Add the next group; on disk when this returns. If it raises (a full disk), it can be called again."""
        width = max(c.support.ids.shape[1] for c in completions)
        tensors = {name: torch.cat([getattr(c, name) for c in completions]) for name in STATISTICS}
        tensors["support_ids"] = torch.cat([_pad(c.support.ids, width) for c in completions])
        tensors["support_probs"] = torch.cat([_pad(c.support.probs, width) for c in completions])
        write_atomic(self._targets(self.groups), save(tensors))
        self._lines.append([_line(c, self.groups, len(completions)) for c in completions])
        self.groups += 1

    def __iter__(self) -> Iterator[Completion]:
        """All completions, in the order of (prompt index, sample index)."""
        completions = []
        for group, rows in enumerate(self._read()[0]):
            tensors = self._load(group, sum(len(row["token_ids"]) for row in rows))
            start = 0
            for row in rows:
                part = slice(start, start + len(row["token_ids"]))
                start = part.stop
                completions.append(Completion(
                    **{name: row[name] for name in FIELDS}, **{name: tensors[name][part] for name in STATISTICS},
                    support=SparseTarget(tensors["support_ids"][part], tensors["support_probs"][part])))
        return iter(sorted(completions, key=lambda c: (c.prompt_index, c.sample_index)))

    def _manifest(self, settings: dict | None) -> dict:
        """Write the manifest of a new folder, or check that of an old one; its settings."""
        path = self.folder / "manifest.json"
        if not path.exists():
            if self._lines.path.exists():
                raise UsageError(f"{path}: missing, though completions.jsonl is there")
            if settings is None:
                raise UsageError(f"{self.folder}: no samples there (manifest.json is missing)")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, {"format": FORMAT, "settings": settings})
            return settings
        manifest = read_json(path)
        if not (isinstance(manifest, dict) and isinstance(manifest.get("settings"), dict)):
            raise UsageError(f"{path}: expected an object with 'format' and 'settings', got {manifest!r:.80}")
        if manifest.get("format") != FORMAT:
            raise UsageError(f"{path}: expected format {FORMAT}, got {manifest.get('format')!r}")
        if settings is not None:
            there, now = manifest["settings"], json.loads(json.dumps(settings))     # tuples become lists
            names = sorted(name for name in {*there, *now} if there.get(name) != now.get(name))
            if names:
                raise UsageError(f"{self.folder}: holds samples drawn with other settings: {', '.join(names)}")
        return manifest["settings"]

    def _read(self) -> tuple[list[list[dict]], bool]:
        """The lines of each group, and whether lines of a group that is not whole follow them."""
        groups: list[list[dict]] = []
        for number, row in self._lines.numbered():
            where = f"{self._lines.path}:{number}"
            if not (isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in LINE.items())):
                raise UsageError(f"{where}: expected an object with {', '.join(LINE)}, got {json.dumps(row):.80}")
            if not groups or len(groups[-1]) == groups[-1][0]["group_size"]:
                groups.append([])
            if row["group"] != len(groups) - 1:
                raise UsageError(f"{where}: expected a line of group {len(groups) - 1}, got group {row['group']}")
            groups[-1].append(row)
        torn = bool(groups) and len(groups[-1]) < groups[-1][0]["group_size"]
        return groups[:-1] if torn else groups, torn

    def _load(self, group: int, tokens: int) -> dict[str, torch.Tensor]:
        path = self._targets(group)
        if not path.exists():
            raise UsageError(f"{path}: missing, though completions.jsonl lists its group")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise UsageError(f"{path}: damaged: {error}") from None
        expected = {*STATISTICS, "support_ids", "support_probs"}
        if tensors.keys() != expected or any(len(tensor) != tokens for tensor in tensors.values()):
            found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise UsageError(f"{path}: expected {sorted(expected)} of {tokens} tokens each, got {found}")
        return tensors

    def _targets(self, group: int) -> Path:
        return self.folder / f"targets-{group:05d}.safetensors"


def _pad(tensor: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))


def _line(c: Completion, group: int, size: int) -> dict:
    means = {name: round(getattr(c, name).mean().item(), 6) if c.token_ids else None for name in STATISTICS}
    return {
        "prompt_index": c.prompt_index, "sample_index": c.sample_index, "finish_reason": c.finish_reason,
        "text": c.text, "prompt_ids": c.prompt_ids, "token_ids": c.token_ids, **means,
        "group": group, "group_size": size,
    }
