import json
import os
import sys
import threading

import pytest

from ssd_core.checks import UsageError
from ssd_core.evaluate import Evaluation, Outcome, Problem, grade, wilson_interval

RIGHT, WRONG, LOOP = "    return x + 1\n", "    return x\n", "    while True: pass\n"


def problems(count):
    test = "def check(candidate):\n    assert candidate(1) == 2"
    return [Problem(f"T/{i}", f'def f{i}(x):\n    """x + 1"""\n', f"f{i}", test) for i in range(count)]


def test_one_sample():
    seen = []
    main = threading.get_ident()
    samples = {"T/0": [RIGHT], "T/1": [WRONG], "T/2": [LOOP], "T/3": ["\n" + RIGHT]}

    def on_result(result):
        assert threading.get_ident() == main
        seen.append(result["task_id"])

    evaluation = grade(problems(4), samples, timeout=1, workers=3, on_result=on_result)
    assert [r["status"] for r in evaluation.results] == ["passed", "failed", "timeout", "passed"]
    assert [r["task_id"] for r in evaluation.results] == list(samples) and sorted(seen) == list(samples)
    assert (evaluation.problems, evaluation.samples_per_problem, evaluation.pass_at_1) == (4, 1, 0.5)
    assert evaluation.interval == wilson_interval(2, 4)
    assert evaluation.statuses == {"passed": 2, "failed": 1, "timeout": 1}
    assert evaluation.passed == {"T/0": 1, "T/1": 0, "T/2": 0, "T/3": 1}


@pytest.fixture
def fake(monkeypatch):
    """Programs are not run: one with the right body passes."""

    module = sys.modules["ssd_core.evaluate.grade"]
    outcome = {True: Outcome("passed", "", 0.1), False: Outcome("failed", "wrong" * 1000, 0.1)}
    monkeypatch.setattr(module, "run_program", lambda source, timeout: outcome["x + 1\n\n" in source])


def test_several_samples(fake):
    two = {f"T/{i}": [RIGHT, RIGHT] if i % 2 else [WRONG, WRONG] for i in range(10)}
    agree = grade(problems(10), two)
    assert agree.pass_at_1 == 0.5 and agree.pass_at(2) == 0.5
    assert agree.interval == pytest.approx(wilson_interval(5, 10))  # the second sample told nothing
    spread = grade(problems(10), {f"T/{i}": [RIGHT, WRONG] for i in range(10)})
    assert spread.pass_at_1 == 0.5 and spread.pass_at(2) == 1.0
    assert spread.interval == pytest.approx(wilson_interval(10, 20))
    none = grade(problems(10), {f"T/{i}": [WRONG, WRONG] for i in range(10)})
    assert none.interval == pytest.approx(wilson_interval(0, 10))
    assert max(len(r["detail"]) for r in none.results) == 2000
    mixed = grade(problems(3), {"T/0": [RIGHT] * 4, "T/1": [RIGHT, WRONG, WRONG, WRONG], "T/2": [WRONG] * 4})
    # p = 5/12, v = 0.18056: 3 p (1 - p) / v = 4.04 trials
    assert mixed.interval == pytest.approx(wilson_interval(5 / 12 * 4.03846, 4.03846), abs=1e-4)
    assert [r["sample_index"] for r in mixed.results] == [0, 1, 2, 3] * 3


def test_save_and_load(fake, tmp_path):
    evaluation = grade(problems(2), {"T/0": [RIGHT], "T/1": [WRONG]})
    path = tmp_path / "before.json"
    path.write_text("old")
    evaluation.save(path)
    assert Evaluation.load(path) == evaluation and os.listdir(tmp_path) == ["before.json"]
    assert json.loads(evaluation.to_json())["pass_at_1"] == 0.5


def test_a_failed_save_keeps_the_old_file(fake, tmp_path, monkeypatch):
    evaluation = grade(problems(1), {"T/0": [RIGHT]})
    evaluation.save(tmp_path / "e.json")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        evaluation.save(tmp_path / "e.json")
    assert os.listdir(tmp_path) == ["e.json"] and Evaluation.load(tmp_path / "e.json") == evaluation


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"problems": 1}', None])
def test_load_refuses(tmp_path, text):
    path = tmp_path / "e.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=r"e\.json"):
        Evaluation.load(path)


def test_load_refuses_wrong_kinds(fake, tmp_path):
    record = json.loads(grade(problems(1), {"T/0": [RIGHT]}).to_json())
    for change in ({"interval": 1}, {"results": [{}]}, {"results": 3}, {"pass_at_1": None}):
        (tmp_path / "e.json").write_text(json.dumps(record | change))
        with pytest.raises(UsageError, match=r"e\.json"):
            Evaluation.load(tmp_path / "e.json")


@pytest.mark.parametrize(
    ("count", "completions", "message"),
    [
        (0, {}, "problems: expected at least one"),
        (2, {"T/0": [RIGHT]}, "got none for 1, first 'T/1'"),
        (1, {"T/0": [RIGHT], "X": [RIGHT]}, "got 'X' too"),
        (2, {"T/0": [RIGHT], "T/1": [RIGHT] * 2}, "got 1 for 'T/0' and 2 for 'T/1'"),
        (1, {"T/0": []}, "equally many"),
        (1, {"T/0": RIGHT}, "got one string"),
    ],
)
def test_arguments(fake, count, completions, message):
    with pytest.raises(UsageError, match=message):
        grade(problems(count), completions)


def test_more_arguments(fake):
    with pytest.raises(UsageError, match="workers"):
        grade(problems(1), {"T/0": [RIGHT]}, workers=0)
    with pytest.raises(UsageError, match="every task_id once"):
        grade(problems(1) * 2, {"T/0": [RIGHT]})


def test_an_exception_stops_the_rest(fake):
    def on_result(result):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grade(problems(50), {p.task_id: [RIGHT] for p in problems(50)}, on_result=on_result)
