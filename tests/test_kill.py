"""Killed anywhere and continued, a run ends in the same files, byte for byte."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
from test_pipeline import files

KILLS = 20


@pytest.fixture
def command(model_folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Write a function that adds {n}."}) + "\n" for n in range(48)))

    def make(out):
        return [sys.executable, "-P", "-m", "ssd_core.cli", "run", "--model", str(model_folder), "--prompts",
                str(prompts), "--out", str(out), "--resume", "--batch-size", "4", "--max-new-tokens", "64",
                "--save-steps", "2", "--per-device-train-batch-size", "2", "--learning-rate", "1e-3",
                "--num-train-epochs", "3", "--seed", "3"]

    return make


def started(out, process):
    """Waits for the run's first file: what comes before is Python's own start."""
    while not (out / "samples/manifest.json").exists() and process.poll() is None:
        time.sleep(0.01)


def weights(out):
    return {name: data for name, data in files(out).items() if name.startswith("model/")}


@pytest.mark.all
def test_killed_at_random_moments(command, tmp_path):
    begin = time.perf_counter()
    process = subprocess.Popen(command(tmp_path / "whole"), stdout=subprocess.DEVNULL)
    started(tmp_path / "whole", process)
    work = time.perf_counter()
    assert process.wait() == 0
    duration = time.perf_counter() - work
    moments = random.Random(7)
    out, kills, starts = tmp_path / "parts", 0, 0
    while kills < KILLS:
        process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL)
        starts += 1
        if starts == 1:
            started(out, process)
            wait = moments.uniform(0, 0.1) * duration
        else:   # once a run has begun, its manifest is there: wait as long as Python's start takes, then a little more
            wait = (work - begin) * moments.uniform(0.8, 1.0) + moments.uniform(0, 0.15) * duration
        try:
            process.wait(wait)
            break                   # done: the rest of the kills would meet a finished run
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert subprocess.run(command(out), stdout=subprocess.DEVNULL).returncode == 0
    print(f"{kills} kills over a run of {duration:.1f} s")
    assert kills >= KILLS // 2      # a run may finish early, when few moments fell into its start
    assert weights(out) and files(out) == files(tmp_path / "whole")


@pytest.mark.all
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_is_130_and_keeps_what_was_done(command, tmp_path, number):
    process = subprocess.Popen(command(tmp_path / "run"), stderr=subprocess.PIPE, text=True)
    started(tmp_path / "run", process)
    time.sleep(1)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 130 and "continue with --resume" in errors and "Traceback" not in errors
    assert (tmp_path / "run/samples").exists()
    assert subprocess.run(command(tmp_path / "run"), stdout=subprocess.DEVNULL).returncode == 0
