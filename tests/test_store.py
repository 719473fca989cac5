"""Sample files: what goes in comes out; a kill or a full disk at any moment loses at most the group being written."""

import dataclasses
import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssd_core.checks import UsageError
from ssd_core.store import STATISTICS, Completion, SampleStore
from ssd_core.targets import SparseTarget

SETTINGS = {"seed": 0, "stop_strings": ("a", "b"), "model": "x", "top_p": 0.8}


def completion(prompt, sample=0, length=3, width=2):
    generator = torch.Generator().manual_seed(1000 * prompt + sample)
    statistics = {name: torch.randn(length, generator=generator) for name in STATISTICS}
    ids = torch.randint(0, 300, (length, width), generator=generator, dtype=torch.int32)
    probs = torch.rand(length, width, generator=generator)
    return Completion(
        prompt_index=prompt, sample_index=sample, prompt_ids=[1, 2, prompt], token_ids=list(range(length)),
        text=f"té\u2028xt {prompt}\n", finish_reason="stop", support=SparseTarget(ids, probs), **statistics)


def group(*prompts):
    return [completion(prompt, length=1 + prompt % 4, width=1 + prompt % 3) for prompt in prompts]


def same(found, expected):
    found, expected = list(found), sorted(expected, key=lambda c: (c.prompt_index, c.sample_index))
    assert len(found) == len(expected)
    for c, other in zip(found, expected, strict=True):
        for field in dataclasses.fields(Completion):
            mine, theirs = getattr(c, field.name), getattr(other, field.name)
            if field.name == "support":
                width = theirs.ids.shape[1]         # a group has the width of its widest
                assert torch.equal(mine.ids[:, :width], theirs.ids) and torch.equal(mine.probs[:, :width], theirs.probs)
                assert mine.probs[:, width:].eq(0).all()
            elif isinstance(mine, torch.Tensor):
                assert torch.equal(mine, theirs) and mine.dtype == torch.float32
            else:
                assert mine == theirs and type(mine) is type(theirs)


@pytest.fixture
def folder(tmp_path):
    """Two groups."""
    store = SampleStore(tmp_path / "samples", SETTINGS)
    store.append(group(4, 1))
    store.append(group(0, 3, 2))
    return tmp_path / "samples"


ALL = group(0, 1, 2, 3, 4)


def test_round_trip_in_the_order_of_prompts_and_samples(tmp_path):
    store = SampleStore(tmp_path / "new" / "samples", SETTINGS)
    assert store.groups == 0 and list(store) == []
    groups = [[completion(2, 1, width=3), completion(0, 0, length=5)], [completion(2, 0, width=64), completion(1, 0)]]
    for count, part in enumerate(groups, 1):
        store.append(part)
        assert store.groups == count
    for reader in (store, store, SampleStore(store.folder), SampleStore(store.folder, SETTINGS)):
        same(reader, groups[0] + groups[1])


def test_lines_can_be_read_without_us(folder):
    lines = [json.loads(line) for line in (folder / "completions.jsonl").read_text().split("\n")[:-1]]
    assert [line["prompt_index"] for line in lines] == [4, 1, 0, 3, 2]
    c = completion(4, length=1, width=2)
    assert lines[0]["text"] == c.text and lines[0]["token_ids"] == c.token_ids
    assert lines[0]["entropy"] == pytest.approx(c.entropy.mean().item(), abs=1e-6)
    tensors = load_file(folder / "targets-00001.safetensors")
    assert set(tensors) == {*STATISTICS, "support_ids", "support_probs"}
    assert sorted(path.name for path in folder.iterdir()) == [
        "completions.jsonl", "manifest.json", "targets-00000.safetensors", "targets-00001.safetensors"]


def test_killed_at_every_byte_of_the_last_group(folder):
    """It is dropped whole and drawn again; the groups before it are untouched."""
    path = folder / "completions.jsonl"
    data = path.read_bytes()
    start = sum(len(line) + 1 for line in data.split(b"\n")[:2])
    for cut in [*range(start, len(data), 7), len(data) - 1]:
        path.write_bytes(data[:cut])
        reader = SampleStore(folder)
        assert reader.groups == 1
        same(reader, group(4, 1))
        assert path.read_bytes() == data[:cut]                  # a reader changes nothing
        store = SampleStore(folder, SETTINGS)
        assert store.groups == 1
        store.append(group(0, 3, 2))
        assert path.read_bytes() == data
        same(store, ALL)


def test_killed_between_targets_and_lines(folder):
    """The targets are there, the lines are not: they are written again."""
    path = folder / "targets-00002.safetensors"
    path.write_bytes(b"of the killed run")
    store = SampleStore(folder, SETTINGS)
    assert store.groups == 2
    store.append(group(5))
    same(SampleStore(folder), ALL + group(5))


def test_killed_while_writing_targets(folder):
    (folder / ".targets-00002.safetensors.tmp").write_bytes(b"half")
    store = SampleStore(folder, SETTINGS)
    same(store, ALL)
    store.append(group(5))
    same(SampleStore(folder), ALL + group(5))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="tells a descriptor's name on Linux only")
def test_targets_are_on_disk_before_their_lines(folder, monkeypatch):
    store, order = SampleStore(folder, SETTINGS), []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (
        order.append(os.readlink(f"/proc/self/fd/{descriptor}").rsplit("/", 1)[1]), fsync(descriptor)))
    store.append(group(5))
    assert order == [".targets-00002.safetensors.tmp", "samples", "completions.jsonl"]


@pytest.mark.parametrize("call", range(1, 4))
def test_a_full_disk_loses_nothing_and_a_retry_succeeds(call, folder, monkeypatch):
    """The disk is full at the first, second or third fsync of an append: targets, folder, lines."""
    store = SampleStore(folder, SETTINGS)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left") as raised:
        fsync, calls = os.fsync, iter(range(1, 100))

        def full(descriptor):
            if next(calls) >= call:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        patch.setattr(os, "fsync", full)
        store.append(group(5, 6))
    assert raised.value.errno == errno.ENOSPC
    same(SampleStore(folder), ALL)                              # in another process
    same(store, ALL)
    store.append(group(5, 6))                                   # in the same process
    same(store, ALL + group(5, 6))
    same(SampleStore(folder), ALL + group(5, 6))


def test_other_settings_are_named(folder):
    for changed in ({"seed": 1, "top_p": 0.9}, {"seed": 1, "top_p": 0.9, "new": 3}):
        with pytest.raises(UsageError, match=f"other settings: {', '.join(sorted(changed))}$"):
            SampleStore(folder, {**SETTINGS, **changed})
    with pytest.raises(UsageError, match="other settings: top_p"):
        SampleStore(folder, {name: value for name, value in SETTINGS.items() if name != "top_p"})
    same(SampleStore(folder), ALL)


def test_no_samples(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError, match=r"no samples there \(manifest.json is missing\)"):
            SampleStore(path)
    assert not (tmp_path / "none").exists()


def test_samples_without_their_manifest_are_not_taken_for_others(folder):
    (folder / "manifest.json").unlink()
    for settings in (None, SETTINGS):
        with pytest.raises(UsageError, match=r"manifest\.json: missing, though completions\.jsonl is there"):
            SampleStore(folder, settings)


@pytest.mark.parametrize(("text", "message"), [
    ('{\n"format": 1,\n"sett', r"manifest\.json:3: not valid JSON"), ("", r"manifest\.json:1: not valid JSON"),
    ("[]", r"manifest\.json: expected an object with 'format' and 'settings', got \[\]"),
    ('{"format": 1}', r"manifest\.json: expected an object"),
    ('{"format": 2, "settings": {}}', r"manifest\.json: expected format 1, got 2"),
])
@pytest.mark.parametrize("settings", [None, SETTINGS])
def test_a_damaged_manifest_is_named(text, message, settings, folder):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        SampleStore(folder, settings)


@pytest.mark.parametrize(("line", "message"), [
    (b'{"prompt_index": 1, "tok', r"completions\.jsonl:3: not valid JSON"),
    (b"\xff\xfe", r"completions\.jsonl:3: not UTF-8"), (b"\x00" * 30, r"completions\.jsonl:3: not "),
    (b"[1]", r"completions\.jsonl:3: expected an object with prompt_index, .* got \[1\]"),
    (b'{"group": 1}', r"completions\.jsonl:3: expected an object with prompt_index"), (None, r"completions\.jsonl:5: "),
])
@pytest.mark.parametrize("settings", [None, SETTINGS])
def test_a_damaged_line_is_named_and_nothing_is_dropped(line, message, settings, folder):
    """In the middle of the file it is no torn end; a missing line (None) shows where the next group begins."""
    store = SampleStore(folder, SETTINGS)
    store.append(group(5))
    path = folder / "completions.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[2:3] = [line] if line is not None else []
    path.write_bytes(b"\n".join(lines))
    before = path.read_bytes()
    with pytest.raises(UsageError, match=message):
        list(SampleStore(folder, settings))
    assert path.read_bytes() == before


def test_missing_targets_are_named(folder):
    (folder / "targets-00001.safetensors").unlink()
    with pytest.raises(UsageError, match=r"targets-00001\.safetensors: missing, though completions\.jsonl lists"):
        list(SampleStore(folder))


def test_damaged_targets_are_named(folder):
    path = folder / "targets-00001.safetensors"
    whole = path.read_bytes()
    for part in (b"", whole[:100], whole[:-4]):
        path.write_bytes(part)
        with pytest.raises(UsageError, match=r"targets-00001\.safetensors: damaged: "):
            list(SampleStore(folder))
    tensors = load_file(folder / "targets-00000.safetensors")
    save_file(tensors, path)                                    # those of another group
    with pytest.raises(UsageError, match=r"targets-00001\.safetensors: expected .* of 8 tokens each, got "):
        list(SampleStore(folder))
    del tensors["entropy"]
    save_file(tensors, path)
    with pytest.raises(UsageError, match=r"targets-00001\.safetensors: expected "):
        list(SampleStore(folder))
