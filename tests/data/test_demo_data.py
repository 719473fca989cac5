"""Checks of the demonstration prompts and problems."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ssd_core.data import demo_problems, demo_prompts

PROBLEM_KEYS = {"task_id", "prompt", "entry_point", "canonical_solution", "test"}


def read_lines(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


PROMPTS = [row["prompt"] for row in read_lines(demo_prompts())]
PROBLEMS = read_lines(demo_problems())
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=[p["entry_point"] for p in PROBLEMS])


def run_program(problem: dict, body: str, folder: Path) -> subprocess.CompletedProcess:
    program = folder / "program.py"
    program.write_text(
        problem["prompt"] + body + "\n" + problem["test"] + "\n" + f"check({problem['entry_point']})\n",
        encoding="utf-8",
    )
    return subprocess.run(
        [sys.executable, "-I", str(program)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=20,
    )


def plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def description(problem: dict) -> str:
    """The docstring of a problem up to its first example."""
    function = ast.parse(problem["prompt"] + "    pass\n").body[0]
    return ast.get_docstring(function).split(">>>")[0]


def test_prompts_are_64_distinct_texts():
    assert len(PROMPTS) == 64
    assert all(set(row) == {"prompt"} for row in read_lines(demo_prompts()))
    assert all(text == text.strip() and len(text) > 30 for text in PROMPTS)
    assert len({plain(text) for text in PROMPTS}) == 64


def test_problems_are_20_distinct_problems():
    assert len(PROBLEMS) == 20
    assert all(set(p) == PROBLEM_KEYS for p in PROBLEMS)
    assert [p["task_id"] for p in PROBLEMS] == [f"demo/{i}" for i in range(20)]
    assert len({p["entry_point"] for p in PROBLEMS}) == 20
    assert len({plain(description(p)) for p in PROBLEMS}) == 20


@each_problem
def test_problem_has_the_humaneval_shape(problem):
    assert problem["prompt"].startswith(f"def {problem['entry_point']}(")
    assert problem["prompt"].endswith('"""\n')
    assert 1 <= problem["prompt"].count(">>> ") <= 2
    assert all(line.startswith("    ") for line in problem["canonical_solution"].splitlines())
    check = ast.parse(problem["test"]).body[0]
    assert isinstance(check, ast.FunctionDef) and check.name == "check"
    assert [argument.arg for argument in check.args.args] == ["candidate"]
    asserts = [node for node in ast.walk(check) if isinstance(node, ast.Assert)]
    assert len({ast.dump(node) for node in asserts}) >= 6


@each_problem
def test_canonical_solution_passes(problem, tmp_path):
    done = run_program(problem, problem["canonical_solution"], tmp_path)
    assert done.returncode == 0, done.stderr


@each_problem
def test_docstring_examples_are_true(problem, tmp_path):
    module = tmp_path / "examples.py"
    module.write_text(problem["prompt"] + problem["canonical_solution"], encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "doctest", str(module)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@each_problem
@pytest.mark.parametrize("body", ["    return None\n", "    pass\n"])
def test_stub_fails(problem, body, tmp_path):
    done = run_program(problem, body, tmp_path)
    assert done.returncode != 0
    assert "AssertionError" in done.stderr or "TypeError" in done.stderr


def test_prompts_and_problems_share_nothing():
    names = {p["entry_point"] for p in PROBLEMS}
    texts = [plain(description(p)) for p in PROBLEMS]
    for prompt in PROMPTS:
        assert not names & set(re.findall(r"\w+", prompt)), prompt
        for text in texts:
            assert text not in plain(prompt) and plain(prompt) not in text


def test_no_prompt_repeats_most_words_of_a_problem():
    """A reworded copy of a problem would have most of its telling words."""
    common = set("return list number numbers function text with that given the and are how many otherwise for".split())
    for problem in PROBLEMS:
        words = plain(description(problem)).split()
        telling = {word for word in words if len(word) > 2} - common
        for prompt in PROMPTS:
            shared = telling & set(plain(prompt).split())
            assert len(shared) < max(2, 0.5 * len(telling)), (problem, prompt, shared)
