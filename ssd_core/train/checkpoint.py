"""Checkpoints that are whole or not there: everything that the next step depends on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ssd_core.files import publish_folder, read_json, temporary_folder

STATE = "state.json"    # written last: a folder without it is not a checkpoint


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], limit: int) -> None:
    """Write ``folder/step-N`` and drop all but the newest ``limit``."""
    path = folder / f"step-{step:07d}"
    temporary = temporary_folder(path)
    save_file(tensors, temporary / "state.safetensors")
    (temporary / STATE).write_text(json.dumps({"step": step}) + "\n")
    publish_folder(temporary, path)
    for old in _complete(folder)[:-limit]:
        shutil.rmtree(old)


def latest(folder: Path) -> tuple[int, dict[str, torch.Tensor]] | None:
    """Step and tensors of the newest complete checkpoint; what a killed run left half-written is removed."""
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover)
    found = _complete(folder)
    if not found:
        return None
    return read_json(found[-1] / STATE)["step"], load_file(found[-1] / "state.safetensors")


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / STATE).exists())
