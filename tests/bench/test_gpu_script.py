"""bench/gpu.sh does its parts one by one, keeps what ended and goes on where it stopped."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (shutil.which("bash") and shutil.which("timeout")), reason="no bash or timeout")

# in Python's place: notes each call, and writes what the bench would
STUB = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in *"$FAIL"*) exit "$CODE" ;; esac
while [ $# -gt 0 ]; do
    case $1 in --out) mkdir -p "$(dirname "$2")"; case $2 in *plots) ;; *) echo '{}' >"$2" ;; esac ;; esac
    shift
done
"""


@pytest.fixture
def script(tmp_path):
    """Runs it on a copy whose set-up and Python are stubs; returns (exit code, the calls that were made)."""
    copy = tmp_path / "repository"
    (copy / "bench").mkdir(parents=True)
    (copy / ".ci").mkdir()
    shutil.copy(ROOT / "bench/gpu.sh", copy / "bench")
    for name in ("setup", "peers"):
        (copy / ".ci" / name).write_text(f'echo {name} >>"$CALLS"\n')
    (copy / "python").write_text(STUB)
    (copy / "python").chmod(0o755)
    calls = tmp_path / "calls"

    def run(*arguments, fail="nothing", code=1):
        calls.write_text("")
        environment = {**os.environ, "PYTHON": "./python", "CALLS": str(calls), "FAIL": fail, "CODE": str(code)}
        done = subprocess.run(["bash", copy / "bench/gpu.sh", "--out", tmp_path / "out", *arguments], env=environment,
                              capture_output=True, text=True, timeout=60)
        run.output = done.stdout + done.stderr
        return done.returncode, calls.read_text().splitlines()

    run.out = tmp_path / "out"
    return run


def parts(script):
    return sorted(path.name for path in script.out.glob("[01]*.json"))


def test_every_part_once(script):
    code, calls = script()
    assert code == 0, script.output
    names = parts(script)
    assert len(names) == 16 and names[0] == "01-build.json" and names[4] == "05-cross-entropy-llama-3-8b.json"
    assert calls[:2] == ["setup", "peers"] and "run tune --device cuda" in calls[4]
    assert sum("bench.run run" in call for call in calls) == 9 and sum("-m pytest" in call for call in calls) == 3
    assert all("--devices cuda --dtypes bfloat16" in call for call in calls if "bench.run run" in call)
    assert "table.md, plots/index.html, verdict.json" in script.output
    code, calls = script()                                      # nothing but table, plots and verdict is done again
    assert code == 0 and parts(script) == names
    assert [call.split("ssd_core.bench.run ")[1].split()[0] for call in calls] == ["table", "plots", "verdict"]
    assert all(call.count(".json") >= 10 for call in calls)


def test_a_part_that_failed_is_done_again(script):
    code, _ = script(fail="--cases qwen2.5-7b")
    assert code == 1 and "06-cross-entropy-qwen2.5-7b.json" not in parts(script) and len(parts(script)) == 15
    code, calls = script()
    assert code == 0 and len(parts(script)) == 16
    assert [call for call in calls if "bench.run run" in call] == [c for c in calls if "--cases qwen2.5-7b" in c][:1]


def test_failing_tests_are_a_result_and_running_out_of_time_is_none(script):
    code, _ = script("--part", "3", fail="pytest", code=1)
    assert code == 1 and json.loads((script.out / "03-tests.json").read_text())["exit_code"] == 1
    code, _ = script("--part", "15", fail="pytest", code=124)
    assert code == 1 and parts(script) == ["03-tests.json"]


def test_one_part(script):
    code, calls = script("--part", "9")
    assert code == 0 and parts(script) == ["09-filter.json"]
    assert "--cases smollm2@4096" in calls[0] and "--resume" in calls[0]


def test_dry_run(script):
    """Prints what would be done, and does and makes nothing."""
    code, calls = script("--dry-run")
    lines = script.output.splitlines()
    assert code == 0 and calls == [] and not script.out.exists()
    assert [int(line[:2]) for line in lines] == list(range(1, 17))
    assert lines[12].startswith("13-sample: ssd_core.bench.run run --ops sample --cases qwen3-0.6b --batch 256")
    script("--dry-run", "--part", "9")
    assert script.output.startswith("09-filter: ") and script.output.count("\n") == 1


def test_no_part_goes_on_or_begins_after_the_minutes(script, monkeypatch):
    monkeypatch.setenv("BUDGET", "2")
    stub = script.out.parent / "repository/python"
    stub.write_text('#!/bin/sh\necho "$*" >>"$CALLS"\nsleep 30\n')
    code, calls = script()
    assert code == 1 and parts(script) == ["01-build.json"]
    assert len([call for call in calls if "ssd_core" in call or "pytest" in call]) == 1      # the check, which ran out
    assert "02-check: exit code 124" in script.output and "03-tests: no time left" in script.output


def test_wrong_use(script):
    code, calls = script("--nothing")
    assert code == 2 and calls == [] and "--part N" in script.output


@pytest.mark.all
def test_quick_on_the_cpu(tmp_path):
    """Really: tiny shapes from the check to the verdict. Set-up is left to `make`, tests to pytest."""
    for name in ("01-build", "03-tests", "15-tiled-tests", "16-more-tests"):
        (tmp_path / f"{name}.json").write_text("{}")
    done = subprocess.run(
        ["bash", ROOT / "bench/gpu.sh", "--device", "cpu", "--quick", "--out", tmp_path], capture_output=True,
        text=True, env={**os.environ, "PYTHON": sys.executable}, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "check.json").read_text())["bad"] == 0
    assert "linear_cross_entropy" in (tmp_path / "table.md").read_text() and (tmp_path / "plots/index.html").exists()
    assert json.loads((tmp_path / "verdict.json").read_text())["verdict"]
