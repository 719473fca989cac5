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
    temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


def write_json(path: Path, value: object) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def temporary_folder(path: Path) -> Path:
    """An empty folder beside ``path``, for ``publish_folder``; what a killed run left there is removed."""
    temporary = path.with_name(f".{path.name}.tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    return temporary


def publish_folder(temporary: Path, path: Path) -> None:
    """Give a finished temporary folder its name, in one step, with everything in it on disk."""
    for file in temporary.rglob("*"):
        fsync(file)
    fsync(temporary)
    if path.exists():
        shutil.rmtree(path)
    os.replace(temporary, path)
    fsync(path.parent)


def read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
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
    """JSON lines that are appended and survive a kill: what follows the last whole line is cut off on opening."""

    def __init__(self, path: Path):
        self.path = path
        if path.exists():
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(path, whole)

    def append(self, values: list[dict]) -> None:
        """All lines in one write, on disk when this returns."""
        data = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
        with open(self.path, "ab") as file:
            file.write(data.encode())
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict]:
        return [value for _, value in read_jsonl(self.path)] if self.path.exists() else []

    def keep(self, condition) -> None:
        """Drop the lines for which ``condition(value)`` is false."""
        if self.path.exists():
            kept = [value for value in self.read() if condition(value)]
            write_atomic(self.path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in kept))
