"""Files survive a kill and a full disk at any moment: old content, new content, never a part."""

import errno
import json
import os

import pytest

from ssd_core import files
from ssd_core.checks import UsageError
from ssd_core.files import (
    AppendOnly,
    publish_folder,
    read_json,
    read_jsonl,
    temporary_folder,
    write_atomic,
    write_json,
)


class Killed(BaseException):
    """A kill: no handler of the code under test may tidy up after it."""


def kill_at(monkeypatch, name, call):
    """The process dies when it calls ``os.<name>`` for the ``call``-th time."""
    original, count = getattr(os, name), iter(range(1, 1000))

    def dying(*args, **options):
        if next(count) == call:
            raise Killed
        return original(*args, **options)

    monkeypatch.setattr(os, name, dying)


def full_disk(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


# -- write_atomic -----------------------------------------------------------------------------------------------------


def test_write_atomic_replaces_text_and_bytes(tmp_path):
    path = tmp_path / "file"
    for data in ("old", "é", b"\x00\xff"):
        write_atomic(path, data)
        assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("name", "call"), [("fsync", 1), ("replace", 1)])
def test_a_kill_leaves_the_old_file(name, call, tmp_path, monkeypatch):
    write_atomic(tmp_path / "file", "old")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, name, call)
        write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    write_atomic(tmp_path / "file", "newer")
    assert (tmp_path / "file").read_text() == "newer"


def test_the_data_is_on_disk_before_the_name_and_the_name_before_it_returns(tmp_path, monkeypatch):
    order = []
    fsync, replace = files.fsync, os.replace
    monkeypatch.setattr(files, "fsync", lambda path: (order.append(("fsync", path.name)), fsync(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(("replace", b.name)), replace(a, b)))
    write_atomic(tmp_path / "file", "x")
    assert order == [("fsync", ".file.tmp"), ("replace", "file"), ("fsync", tmp_path.name)]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_atomic(tmp_path / "file", "old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", full_disk)
        write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_write_json_is_read_back(tmp_path):
    value = {"a": [1, 2.5, None, "é\u2028"]}
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json") == value


# -- folders ----------------------------------------------------------------------------------------------------------


def make_folder(path, content):
    temporary = temporary_folder(path)
    (temporary / "inner").mkdir()
    for name in ("a", "b", "inner/c"):
        (temporary / name).write_text(content)
    return temporary


def whole(path):
    return {(path / name).read_text() for name in ("a", "b", "inner/c")}


def test_a_folder_is_published_and_replaced(tmp_path):
    path = tmp_path / "model"
    for content in ("old", "new"):
        publish_folder(make_folder(path, content), path)
        assert whole(path) == {content}
        assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(("name", "call"), [
    ("fsync", 1), ("fsync", 5), ("fsync", 6), ("replace", 1), ("replace", 2), ("unlink", 1), ("unlink", 2),
    ("rmdir", 1)])
def test_a_kill_never_leaves_a_part_of_a_folder(name, call, tmp_path, monkeypatch):
    path = tmp_path / "model"
    publish_folder(make_folder(path, "old"), path)
    temporary = make_folder(path, "new")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, name, call)
        publish_folder(temporary, path)
    assert not path.exists() or whole(path) in ({"old"}, {"new"})
    publish_folder(make_folder(path, "newer"), path)            # and the next attempt succeeds
    assert whole(path) == {"newer"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_temporary_folder_is_empty(tmp_path):
    (make_folder(tmp_path / "model", "left") / "more").write_text("left")
    assert list(temporary_folder(tmp_path / "model").iterdir()) == []


# -- reading ----------------------------------------------------------------------------------------------------------


def test_read_json_names_file_and_line(tmp_path):
    path = tmp_path / "file.json"
    path.write_text('{\n"a": 1,\n"b" 2}')
    with pytest.raises(UsageError, match=r"file\.json:3: not valid JSON"):
        read_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UsageError, match=r"file\.json: not UTF-8 text: invalid start byte at byte 7"):
        read_json(path)


@pytest.mark.parametrize(("line", "message"), [
    (b'{"a": 1', r":2: not valid JSON: .* at column \d"), (b'{"a": "\xff"}', r":2: not UTF-8 text"),
    (b"\x00" * 20, r":2: not "), (b"{} {}", r":2: not valid JSON"),
])
def test_read_jsonl_names_file_and_line(line, message, tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_bytes(b"{}\n" + line + b"\n{}\n")
    with pytest.raises(UsageError, match=r"file\.jsonl" + message):
        list(read_jsonl(path))
    with pytest.raises(UsageError, match=r"file\.jsonl" + message):
        list(read_jsonl(path, torn_end=True))


def test_read_jsonl_skips_blank_lines_but_counts_them(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_bytes(b'{"a": 1}\n\n  \n[2]')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (4, [2])]
    assert list(read_jsonl(path, torn_end=True)) == [(1, {"a": 1})]


# -- AppendOnly -------------------------------------------------------------------------------------------------------


def test_lines_are_appended_and_read_back(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert AppendOnly(path).read() == [] and not path.exists()
    values = [{"a": "é\u2028\n"}, {"b": [1.5, None]}, {"c": "x" * 200_000}]
    AppendOnly(path).append(values[:2])
    AppendOnly(path).append(values[2:])
    AppendOnly(path).append([])
    assert AppendOnly(path).read() == values
    assert AppendOnly(path).numbered() == list(enumerate(values, 1))


@pytest.mark.parametrize("long", [False, True])
def test_killed_at_every_byte_of_the_last_line(long, tmp_path):
    """What is left of it is not read, and the next line does not stick to it."""
    path = tmp_path / "lines.jsonl"
    first, last = {"a": 1}, {"b": "é" * (80_000 if long else 3)}
    AppendOnly(path).append([first, last])
    data = path.read_bytes()
    start = data.index(b"\n") + 1
    for cut in range(start, len(data), 40_000 if long else 1):
        path.write_bytes(data[:cut])
        lines = AppendOnly(path)
        assert lines.read() == [first]
        assert path.read_bytes() == data[:cut]                  # reading changes nothing
        lines.append([{"c": 2}])
        assert lines.read() == [first, {"c": 2}]


def test_killed_in_the_first_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a"')
    assert AppendOnly(path).read() == []
    AppendOnly(path).append([{"b": 1}])
    assert AppendOnly(path).read() == [{"b": 1}]


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_full_disk_adds_nothing_and_a_retry_adds_once(where, tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    lines = AppendOnly(path)
    lines.append([{"a": 1}])
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        if where == "fsync":
            patch.setattr(os, "fsync", full_disk)
        else:
            patch.setattr("builtins.open", lambda path, mode, **options: Full(path, mode, options))
        lines.append([{"b": 2}, {"c": 3}])
    assert lines.read() == [{"a": 1}]
    assert path.read_bytes() == b'{"a": 1}\n'
    lines.append([{"b": 2}, {"c": 3}])
    assert lines.read() == [{"a": 1}, {"b": 2}, {"c": 3}]


class Full:
    """A file on a disk with room for five bytes more."""

    def __init__(self, path, mode, options, real=open):
        assert "a" not in mode or options == {"buffering": 0}       # a buffer would be written again on closing
        self.file, self.room = real(path, mode, **options), 5

    def write(self, data):
        if not self.room:
            full_disk()
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def test_keep_drops_lines_and_a_torn_end(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = AppendOnly(path)
    lines.keep(lambda value: True)
    assert not path.exists()
    lines.append([{"step": step} for step in range(5)])
    with open(path, "a") as file:
        file.write('{"step": 9')
    lines.keep(lambda value: value["step"] < 3)
    assert path.read_text() == "".join(json.dumps({"step": step}) + "\n" for step in range(3))
