"""Problems in HumanEval's format: files, prompts, and the program that grades a completion."""

import gzip
import json
import os
import re
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ssd_core.checks import UsageError

FENCE = "```"


@dataclass(frozen=True)
class Problem:
    """One problem: complete ``prompt`` so that ``check(entry_point)``, defined by ``test``, raises nothing.

    ``entry_point`` is the expression handed to ``check``: a function's name, or ``Solution().method``.
    """

    task_id: str
    prompt: str
    entry_point: str
    test: str


def load_problems(path: str | os.PathLike) -> list[Problem]:
    """Read the problems of a ``.jsonl`` or ``.jsonl.gz`` file, in the order of the file.

    Each line is an object with the string fields of :class:`Problem`; other keys are ignored, blank lines skipped.
    Raises :class:`UsageError`, naming file and line, for a line that is not such an object and for a repeated
    ``task_id``; naming the file when it cannot be read or holds no problem.
    """
    path = Path(path)
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                problem = _parse(line, f"{path}, line {number}")
                if problem.task_id in seen:
                    raise UsageError(
                        f"{path}, line {number}: expected a new task_id, got {problem.task_id!r} "
                        f"of line {seen[problem.task_id]} again"
                    )
                seen[problem.task_id] = number
                problems.append(problem)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: expected a readable .jsonl or .jsonl.gz file, got {error}") from error
    if not problems:
        raise UsageError(f"{path}: expected at least one problem, got an empty file")
    return problems


def _parse(line: bytes, where: str) -> Problem:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
        raise UsageError(f"{where}: expected a JSON object, got text that does not parse ({error})") from error
    if not isinstance(record, dict):
        raise UsageError(f"{where}: expected a JSON object, got {type(record).__name__}")
    for field in fields(Problem):
        if field.name not in record:
            raise UsageError(f"{where}: expected the key {field.name!r}, got only {sorted(record)}")
        value = record[field.name]
        if not isinstance(value, str) or not value.strip():
            raise UsageError(f"{where}: {field.name}: expected a string that is not empty, got {value!r:.80}")
    if not re.match(r"[^\W\d]\w*\S*\Z", record["entry_point"]):
        raise UsageError(f"{where}: entry_point: expected a name, got {record['entry_point']!r:.80}")
    return Problem(**{field.name: record[field.name] for field in fields(Problem)})


def problem_prompt(problem: Problem, tokenizer: Any) -> str:
    """The text to sample from.

    With a chat template: one user message that holds the function, and an answer that already began with a code
    fence and the function, so that the completion is the body. Without: the prompt itself. Either way it ends without
    the prompt's trailing newlines: "\\n" and the indentation after it are one token for most tokenizers, and a model
    that is shown the newline alone is off its training distribution.
    """
    prompt = problem.prompt.rstrip("\n")
    if not getattr(tokenizer, "chat_template", None):
        return prompt
    message = {"role": "user", "content": f"Complete this Python function:\n\n{FENCE}python\n{prompt}\n{FENCE}"}
    head = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    return f"{head}{FENCE}python\n{prompt}"


def problem_stop_strings(tokenizer: Any) -> list[str]:
    """Where sampling from :func:`problem_prompt` may stop: the body's end.

    With a chat template that is the closing fence. Without, the first line that begins something else, as in Chen
    et al., 2021.
    """
    if getattr(tokenizer, "chat_template", None):
        return [FENCE]
    return ["\nclass ", "\ndef ", "\nif ", "\nprint(", "\n#", FENCE]


def program(problem: Problem, completion: str) -> str:
    """The source that grades ``completion``: the solution, the test, and the call of ``check``.

    The solution is the prompt continued by the completion up to its first code fence. When the completion goes on to
    restate the function in a code fence of its own, the last such fence is the solution, after what stands before
    the function in the prompt (imports, helpers); a fence that was never closed counts only when no closed one does.
    """
    solution = _restated(problem, completion)
    if solution is None:
        body = completion.split(FENCE, 1)[0]
        # The model was shown the prompt without its last newline: it begins with one.
        prompt = problem.prompt.rstrip("\n") if body.startswith("\n") else problem.prompt
        solution = prompt + body
    return f"{solution}\n\n{problem.test}\n\ncheck({problem.entry_point})\n"


def _restated(problem: Problem, completion: str) -> str | None:
    name = re.match(r"\w+", problem.entry_point).group()
    defines = re.compile(rf"^(?:async[ \t]+def|def|class)[ \t]+{name}\b", re.MULTILINE)
    # Which fences open and which close is unknown (the prompt may have opened one): look between any two.
    parts = completion.split(FENCE)[1:]
    closed, cut_off = parts[:-1], parts[-1:]
    for part in [*reversed(closed), *cut_off]:
        _, newline, code = part.partition("\n")  # the rest of the fence's line names the language
        if newline and defines.search(code):
            start = defines.search(problem.prompt)
            return problem.prompt[: start.start() if start else 0] + code
    return None
