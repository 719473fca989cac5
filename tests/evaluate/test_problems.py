import gzip
import json

import pytest

from ssd_core.checks import UsageError
from ssd_core.evaluate import Problem, load_problems, problem_prompt, problem_stop_strings, program, run_program

PROMPT = 'from math import floor\n\n\ndef half(x):\n    """Half of x, rounded down."""\n'
PROBLEM = Problem("T/0", PROMPT, "half", "def check(candidate):\n    assert candidate(5) == 2")
BODY = "    return floor(x / 2)\n"


class Tokenizer:
    def __init__(self, chat_template=None):
        self.chat_template = chat_template

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "".join(f"<{m['role']}>{m['content']}</>" for m in messages) + "<assistant>"


def record(**changes):
    return {"task_id": "T/0", "prompt": PROMPT, "entry_point": "half", "test": PROBLEM.test, **changes}


def lines(*records):
    return "".join(json.dumps(r) + "\n" for r in records)


def test_load(tmp_path):
    text = lines(record(canonical_solution=BODY), record(task_id="T/1", entry_point="Solution().run"))
    (tmp_path / "p.jsonl").write_text("\ufeff" + text.replace("\n", "\n\n"), encoding="utf-8")
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    problems = load_problems(tmp_path / "p.jsonl")
    assert problems[0] == PROBLEM and [p.task_id for p in problems] == ["T/0", "T/1"]
    assert load_problems(str(tmp_path / "p.jsonl.gz")) == problems


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines(record()) + "{oops\n", "line 2: expected a JSON object, got text that does not parse"),
        (lines(record()) + "[1]\n", "line 2: expected a JSON object, got list"),
        (lines({"task_id": "T/0"}), "line 1: expected the key 'prompt'"),
        (lines(record(test=None)), "line 1: test: expected a string that is not empty, got None"),
        (lines(record(prompt="")), "line 1: prompt: expected a string"),
        (lines(record(entry_point="1 + 1")), "line 1: entry_point: expected a name"),
        (lines(record(), record()), "line 2: expected a new task_id, got 'T/0' of line 1 again"),
        ("", "expected at least one problem"),
        ("\n\n", "expected at least one problem"),
        (b"\xff\xfe\n", "line 1: expected a JSON object"),
    ],
)
def test_load_refuses(tmp_path, text, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as caught:
        load_problems(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_load_refuses_files(tmp_path):
    with pytest.raises(UsageError, match=r"none\.jsonl"):
        load_problems(tmp_path / "none.jsonl")
    packed = gzip.compress(lines(record()).encode())
    for content in (b"plain text", packed[:-9]):
        (tmp_path / "p.jsonl.gz").write_bytes(content)
        with pytest.raises(UsageError, match=r"p\.jsonl\.gz: expected a readable"):
            load_problems(tmp_path / "p.jsonl.gz")


def test_prompt_and_stop_strings():
    assert problem_prompt(PROBLEM, Tokenizer()) == PROMPT[:-1]
    assert problem_prompt(PROBLEM, Tokenizer("template")) == (
        f"<user>Complete this Python function:\n\n```python\n{PROMPT}```</><assistant>```python\n{PROMPT[:-1]}"
    )
    assert problem_stop_strings(Tokenizer("template")) == ["```"]
    assert "\ndef " in problem_stop_strings(Tokenizer()) and "```" in problem_stop_strings(Tokenizer())


RESTATED = "```python\ndef half(x):\n    return floor(x / 2)\n```"


@pytest.mark.parametrize(
    "completion",
    [
        BODY,
        BODY.rstrip("\n"),
        "\n" + BODY,  # the prompt is shown without its last newline
        BODY + "```\nThat is it.",
        BODY + "```\n\n```text\ndefinitely not code\n```",
        "    return 0\n```\nBetter:\n" + RESTATED + "\nDone.",
        "    return 0\n```\nBetter:\n" + RESTATED[:-3],  # cut off, but whole
        BODY + "```\n```\ndef half(x):\n    return 0\n```\nor rather\n" + RESTATED,
        "Sure:\n" + RESTATED + "\nand to use it\n```\nprint(half(3))\n```",
        BODY + "```\nNote `half` and def half(x) in prose.",
        "    return 0\n```\n" + RESTATED + "\n```python\ndef half(x):\n    return (",  # the closed one wins
    ],
)
def test_program_passes(completion):
    assert run_program(program(PROBLEM, completion)).status == "passed"


@pytest.mark.parametrize("completion", ["", "    return x\n", BODY + "    )", "```\n" + BODY])
def test_program_fails(completion):
    assert run_program(program(PROBLEM, completion)).status == "failed"


def test_program_continues_the_line():
    problem = Problem("T/1", "def half(x): return x", "half", PROBLEM.test)
    assert run_program(program(problem, " // 2")).status == "passed"


def test_program_of_a_method():
    prompt = "class Solution:\n    def half(self, x):\n"
    problem = Problem("T/2", prompt, "Solution().half", PROBLEM.test)
    assert run_program(program(problem, "        return x // 2")).status == "passed"
    whole = f"        pass\n```\n```python\n{prompt}        return x // 2\n```"
    assert run_program(program(problem, whole)).status == "passed"
