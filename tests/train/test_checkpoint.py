"""Checkpoints are whole or not there."""

import pytest
import torch

from ssd_core.train import checkpoint


def tensors(value):
    return {"a": torch.full((3,), float(value))}


def test_the_newest_complete_one_is_taken(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    for step in (2, 10, 9):
        checkpoint.save(tmp_path, step, tensors(step), limit=5)
    step, found = checkpoint.latest(tmp_path)
    assert step == 10 and torch.equal(found["a"], torch.full((3,), 10.0))


def test_half_written_ones_are_passed_over_and_removed(tmp_path):
    checkpoint.save(tmp_path, 5, tensors(5), limit=2)
    half = tmp_path / ".step-0000009.tmp"       # killed before the rename
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"half")
    unmarked = tmp_path / "step-0000007"        # copied by hand, in part
    unmarked.mkdir()
    (unmarked / "state.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path)[0] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000005"]


def test_killed_while_an_old_one_is_deleted(tmp_path, monkeypatch):
    """What is left of it is no checkpoint."""
    checkpoint.save(tmp_path, 1, tensors(1), limit=1)

    def killed(path):
        (path / "state.safetensors").unlink(missing_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 2, tensors(2), limit=1)
    monkeypatch.undo()
    assert (tmp_path / "step-0000001").exists() and not (tmp_path / "step-0000001/state.json").exists()
    assert checkpoint.latest(tmp_path)[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000002"]


def test_only_so_many_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, tensors(step), limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000003", "step-0000004"]


def test_a_full_disk_keeps_the_old_one(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, tensors(1), limit=1)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, tensors(2), limit=1)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]      # its room is free again
    assert checkpoint.latest(tmp_path)[0] == 1
    checkpoint.save(tmp_path, 2, tensors(2), limit=1)
    assert checkpoint.latest(tmp_path)[0] == 2
