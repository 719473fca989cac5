"""Files that are either whole or not there, and JSON lines with line numbers in their errors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ssd_core.checks import UsageError


def fsync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: str | bytes) -> None:
    """After a crash at any moment the file holds the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        fsync(temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)   # a full disk needs the room
        raise
    fsync(path.parent)


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def temporary_folder(path: Path) -> Path:
    """An empty folder beside ``path``, for ``publish_folder``; what a killed run left there is removed."""
    temporary = path.with_name(f".{path.name}.tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    return temporary


def publish_folder(temporary: Path, path: Path) -> None:
    """Give a finished temporary folder its name, with everything in it on disk. What had the name is replaced: a kill
    may leave the name without a folder, but never with a part of one."""
    for file in temporary.rglob("*"):
        fsync(file)
    fsync(temporary)
    old = path.with_name(f".{path.name}.old")
    if old.exists():                # of a killed run
        shutil.rmtree(old)
    if path.exists():
        os.replace(path, old)
    os.replace(temporary, path)
    fsync(path.parent)
    if old.exists():
        shutil.rmtree(old)


def read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def read_jsonl(path: Path, *, torn_end: bool = False, opener=open) -> Iterator[tuple[int, object]]:
    """Line number and value of each line that is not blank. ``torn_end``: a last line without its newline is skipped
    (a writer was killed there); any other malformed line is an error that names file and line."""
    with opener(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if torn_end and not line.endswith(b"\n"):
                return
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}") from None
            except UnicodeDecodeError as error:
                raise UsageError(f"{path}:{number}: not UTF-8 text: {error.reason}") from None


class AppendOnly:
    """JSON lines that are appended and survive a kill or a full disk: a last line without its end was never written.

    Reading changes nothing, so that others may read while one process appends.
    """

    def __init__(self, path: Path):
        self.path = path

    def append(self, values: list[dict]) -> None:
        """Add lines; on disk when this returns. If it raises, none was added, and it can be called again."""
        data = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()
        is_new = not self.path.exists()
        whole = 0 if is_new else self._whole()
        with open(self.path, "ab", buffering=0) as file:    # a buffer would write what is left when it is closed
            try:
                file.truncate(whole)
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(whole)
                raise
        if is_new:
            fsync(self.path.parent)

    def read(self) -> list[dict]:
        return [value for _, value in self.numbered()]

    def numbered(self) -> list[tuple[int, dict]]:
        """Line number and value of each line."""
        return list(read_jsonl(self.path, torn_end=True)) if self.path.exists() else []

    def keep(self, condition) -> None:
        """Drop the lines for which ``condition(value)`` is false."""
        if self.path.exists():
            kept = [value for value in self.read() if condition(value)]
            write_atomic(self.path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in kept))

    def _whole(self) -> int:
        """Bytes up to the end of the last whole line."""
        with open(self.path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            while end > 0:
                start = max(0, end - 65536)
                file.seek(start)
                found = file.read(end - start).rfind(b"\n")
                if found >= 0:
                    return start + found + 1
                end = start
        return 0
