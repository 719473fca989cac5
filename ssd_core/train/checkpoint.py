"""Checkpoints that are whole or not there: everything that the next step depends on."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ssd_core.files import publish_folder, read_json, temporary_folder

STATE = "state.json"    # written last: a folder without it is not a checkpoint


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], limit: int) -> None:
    """Write ``folder/step-N`` and drop all but the newest ``limit``."""
    with whole_folder(folder / f"step-{step:07d}") as path:
        save_file(tensors, path / "state.safetensors")
        (path / STATE).write_text(json.dumps({"step": step}) + "\n")
    for old in _complete(folder)[:-limit]:
        (old / STATE).unlink()      # first, so that a kill leaves no checkpoint that only looks complete
        shutil.rmtree(old)


def latest(folder: Path) -> tuple[int, dict[str, torch.Tensor]] | None:
    """Step and tensors of the newest complete checkpoint; what a killed run left half-written is removed."""
    found = _complete(folder)
    for leftover in {*folder.glob(".step-*"), *folder.glob("step-*")}.difference(found):
        shutil.rmtree(leftover)
    if not found:
        return None
    return read_json(found[-1] / STATE)["step"], load_file(found[-1] / "state.safetensors")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name at the end. If filling it fails it goes: a full disk needs the room."""
    temporary = temporary_folder(path)
    try:
        yield temporary
        publish_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / STATE).exists())
