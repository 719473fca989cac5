"""Prompt files: JSONL, JSON or text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path

from ssd_core import data
from ssd_core.checks import UsageError
from ssd_core.files import read_json, read_jsonl

log = logging.getLogger("ssd_core")

Prompt = str | list  # a text, or chat messages

# what ends a completion of code by a model that has no chat template, and so no end of turn
CODE_STOP_STRINGS = ("\nclass ", "\ndef ", "\n#", "\nif __name__", "\nprint(", "\n```")


@dataclasses.dataclass(frozen=True)
class Prompts:
    items: tuple[Prompt, ...]   # distinct
    duplicates: int             # dropped; compared with white space normalised
    source: str                 # a path, or "given"

    @property
    def digest(self) -> str:
        return hashlib.blake2b(json.dumps(self.items, sort_keys=True).encode(), digest_size=8).hexdigest()


def load_prompts(source: str | Path | Iterable[Prompt]) -> Prompts:
    """Prompts from a file (or "demo": those that ship with the package), or from strings and message lists.

    ``.jsonl``: an object a line with ``prompt`` (a string) or ``messages`` (chat messages with role and content), or a
    string. ``.json``: a list of such. ``.txt``: a prompt a line.
    """
    if isinstance(source, (str, Path)):
        path = data.demo_prompts() if str(source) == "demo" else Path(source).expanduser()
        found, name = _read(path), str(source)
    else:
        found = [(f"prompts[{i}]", _prompt(value, f"prompts[{i}]")) for i, value in enumerate(source)]
        name = "given"
    if not found:
        raise UsageError(f"prompts: expected at least one, got none in {name}")
    distinct = {}
    for where, prompt in found:
        parts = [("", prompt)] if isinstance(prompt, str) else [(m["role"], str(m["content"])) for m in prompt]
        if not any(text.strip() for _, text in parts):
            raise UsageError(f"{where}: expected a prompt, got an empty one")
        distinct.setdefault(tuple((role, " ".join(text.split())) for role, text in parts), prompt)
    return Prompts(tuple(distinct.values()), len(found) - len(distinct), name)


def _read(path: Path) -> list[tuple[str, Prompt]]:
    try:
        if path.is_dir() or not path.exists():
            raise UsageError(f"prompts: expected a .jsonl, .json or .txt file, got {path} ({_state(path)})")
        return [(where, _prompt(value, where)) for where, value in _values(path)]
    except OSError as error:
        raise UsageError(f"prompts: cannot read {path}: {error.strerror or error}") from None


def _values(path: Path) -> list[tuple[str, object]]:
    """Each prompt of a file and where it is."""
    if path.suffix == ".jsonl":
        return [(f"{path}:{line}", value) for line, value in read_jsonl(path)]
    if path.suffix == ".json":
        values = read_json(path)
        if not isinstance(values, list):
            raise UsageError(f"{path}: expected a list of prompts, got {type(values).__name__}")
        return [(f"{path}[{i}]", value) for i, value in enumerate(values)]
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")    # not splitlines, which splits at form feeds too
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
        return [(f"{path}:{number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    raise UsageError(f"prompts: expected a .jsonl, .json or .txt file, got {path}")


def _state(path: Path) -> str:
    return "a folder" if path.is_dir() else "no such file"


def _prompt(value: object, where: str) -> Prompt:
    if isinstance(value, dict) and "messages" in value:
        value = value["messages"]
        if not isinstance(value, list):
            raise UsageError(f"{where}: expected a list of messages, got {value!r:.80}")
    elif isinstance(value, dict):
        if not isinstance(value.get("prompt"), str):
            raise UsageError(f"{where}: expected a 'prompt' string or 'messages', got keys {sorted(value)}")
        value = value["prompt"]
    if not isinstance(value, (str, list)):
        raise UsageError(f"{where}: expected a string, 'prompt' or 'messages', got {value!r:.80}")
    for message in value if isinstance(value, list) else ():
        fields = message if isinstance(message, dict) else {}
        if not (isinstance(fields.get("role"), str) and isinstance(fields.get("content"), (str, list))):
            raise UsageError(f"{where}: expected messages with 'role' and 'content', got {message!r:.80}")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:      # JSON's \ud800: no tokenizer takes it
        raise UsageError(f"{where}: expected text, got half of a surrogate pair") from None
    return value


def for_chat(prompts: Prompts, tokenizer) -> tuple[list[Prompt], tuple[str, ...]]:
    """``(prompts for the Sampler, stop strings)``: a text becomes a user's message if the model has a chat template;
    a model without one gets the text as it is and stop strings."""
    if tokenizer.chat_template:
        return [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts.items], ()
    log.warning(
        "the model has no chat template: prompts are used as they are, and completions end at %s", CODE_STOP_STRINGS)
    for index, prompt in enumerate(prompts.items):
        if not isinstance(prompt, str):
            raise UsageError(f"prompts[{index}]: expected a text, as the model has no chat template, got messages")
    return list(prompts.items), CODE_STOP_STRINGS
