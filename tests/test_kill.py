"""Killed anywhere and continued, a run ends in the same files, byte for byte."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
from test_pipeline import files

KILLS = 20

pytestmark = pytest.mark.all


@pytest.fixture
def start(model_folder, tmp_path):
    """Starts the run: 12 groups of samples, 66 steps with 33 checkpoints, the model, the report."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Write a function that adds {n}."}) + "\n" for n in range(48)))

    def process(out, **options):
        command = [sys.executable, "-P", "-m", "ssd_core.cli", "run", "--model", str(model_folder), "--prompts",
                   str(prompts), "--out", str(out), "--resume", "--batch-size", "4", "--max-new-tokens", "64",
                   "--save-steps", "2", "--per-device-train-batch-size", "2", "--learning-rate", "1e-3",
                   "--num-train-epochs", "3", "--seed", "3"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)

    return process


def state(out):
    """Files and their sizes. Not what a run writes before it has begun."""
    found = {}
    for path in out.rglob("*") if out.exists() else ():
        try:
            found[path] = path.stat().st_size
        except FileNotFoundError:
            pass
    return {path: size for path, size in found.items() if "config.json" not in path.name}


def working(process, out):
    """Wait for the first file that the process writes: what comes before is Python's own start."""
    before = state(out)
    while state(out) == before and process.poll() is None:
        time.sleep(0.002)


def test_killed_at_random_moments(start, tmp_path):
    process = start(tmp_path / "whole")
    working(process, tmp_path / "whole")
    begin = time.perf_counter()
    assert process.wait() == 0
    duration = time.perf_counter() - begin
    expected = files(tmp_path / "whole")
    assert "model/model.safetensors" in expected and "samples/targets-00011.safetensors" in expected

    moments, kills, finished, hit = random.Random(7), 0, 0, set()
    while kills < KILLS or not finished:
        out = tmp_path / f"parts-{finished}"
        process = start(out)
        if kills < KILLS:
            working(process, out)
            try:
                process.wait(moments.uniform(0, 2 * duration / KILLS))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                kills += 1
        if process.wait() == -signal.SIGKILL:
            hit.add("training" if (out / "metrics.jsonl").exists() else "sampling")
            continue
        assert process.returncode == 0, process.stderr.read()
        assert files(out) == expected
        finished += 1
    print(f"{kills} kills, {finished} finished runs, {duration:.1f} s each")
    assert hit == {"sampling", "training"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_is_130_and_keeps_what_was_done(start, tmp_path, number):
    out = tmp_path / "run"
    process = start(out)
    while not (out / "samples/targets-00003.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    errors = process.communicate()[1]
    assert process.returncode == 130 and "continue with --resume" in errors and "Traceback" not in errors
    kept = files(out)
    assert "samples/targets-00002.safetensors" in kept
    process = start(out)
    assert process.wait() == 0
    assert kept.items() - files(out).items() <= {("samples/completions.jsonl", kept["samples/completions.jsonl"])}


def test_a_disk_that_fills_in_every_writer(start, tmp_path):
    """The largest file may have ever more bytes: one run after the other stops a little later, with one clear line."""
    out = tmp_path / "run"
    stops = []
    for kilobytes in (0.05, 2, 30, 60, 120, 10**6):

        def limit(size=int(1024 * kilobytes)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        process = start(out, preexec_fn=limit)
        errors = process.communicate()[1]
        if process.returncode == 0:
            break
        told = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert process.returncode in (1, 2) and len(told) == 1 and str(out) in told[0], errors
        assert "File too large" in told[0] and "Traceback" not in errors, errors
        stops.append(len(files(out)))
    assert process.returncode == 0 and len(stops) >= 4 and stops == sorted(stops), stops
    process = start(tmp_path / "whole")
    assert process.wait() == 0
    assert files(out) == files(tmp_path / "whole")
