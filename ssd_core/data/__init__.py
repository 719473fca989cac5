"""Small demonstration data that comes with the package.

``demo_prompts.jsonl`` holds coding prompts, one ``{"prompt": ...}`` a line.
``demo_problems.jsonl`` holds very easy problems with tests, one JSON object
a line with the keys ``task_id``, ``prompt``, ``entry_point``,
``canonical_solution`` and ``test``. Both were written for this package; the
problems are not among the prompts.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["demo_problems", "demo_prompts"]

_FOLDER = Path(__file__).resolve().parent


def demo_prompts() -> Path:
    """Return the path of the demonstration prompts (JSON lines)."""
    return _FOLDER / "demo_prompts.jsonl"


def demo_problems() -> Path:
    """Return the path of the demonstration problems (JSON lines)."""
    return _FOLDER / "demo_problems.jsonl"
