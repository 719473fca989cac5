"""The command line: exit codes, and clear errors for what a tired user feeds it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ssd_core.cli import app

QUICK = ["--max-new-tokens", "8", "--batch-size", "4", "--learning-rate", "1e-3"]


def cli(*arguments):
    """Exit code and all output, in this process."""
    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return found.exit_code, found.output


def start(*arguments):
    """A process of its own: seconds each. One thread: two of a tiny model wait for each other on a busy machine."""
    return subprocess.Popen([sys.executable, "-P", "-m", "ssd_core.cli", *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def process(*arguments):
    """Exit code and both outputs."""
    started = start(*arguments)
    output, errors = started.communicate(timeout=120)
    return started.returncode, output, errors


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Add {n}."}) + "\n" for n in range(6)))
    return path


@pytest.fixture
def copy(model_folder, tmp_path):
    """A model folder to spoil."""
    return shutil.copytree(model_folder, tmp_path / "copy")


def fails(code, text, *arguments):
    got, output = cli(*arguments)
    flat = " ".join(output.split())
    assert got == code, output
    assert text in flat, output
    assert "Traceback" not in output
    return output


# -- what works -------------------------------------------------------------------------------------------------------


def test_the_stages_one_by_one(model_folder, prompts, tmp_path):
    out = tmp_path / "run"
    code, output = cli("sample", "--model", model_folder, "--prompts", prompts, "--out", out, *QUICK[:4])
    assert code == 0 and "samples:" in output
    code, output = cli("train", "--model", model_folder, "--out", out, "--learning-rate", "1e-3")
    assert code == 0 and "held-out loss" in output and (out / "model/config.json").exists()
    code, output = cli("report", "--out", out)
    assert code == 0 and "report.html" in output
    assert json.loads((out / "config.json").read_text())["training"]["learning_rate"] == 1e-3


def test_run_and_resume(model_folder, prompts, tmp_path):
    arguments = ["run", "--model", model_folder, "--prompts", prompts, "--out", tmp_path / "run", *QUICK]
    code, output = cli(*arguments)
    assert code == 0 and "report.html" in output and "model:" in output
    fails(2, "continue it with --resume", *arguments)
    assert cli(*arguments, "--resume")[0] == 0
    fails(2, "training.learning_rate: 0.001 there, 0.002 now", *arguments[:-1], "2e-3", "--resume")


def test_eval(model_folder, tmp_path):
    problem = {"task_id": "t/0", "prompt": "def f():\n", "entry_point": "f",
               "test": "def check(c):\n    assert c() == 1\n"}
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(problem) + "\n")
    code, output = cli("eval", "--model", model_folder, "--problems", path, "--out", tmp_path / "e", *QUICK[:4])
    assert code == 0 and "pass@1 0.0%" in output


def test_options_win_over_presets(model_folder, prompts, tmp_path):
    code, _ = cli("sample", "--model", model_folder, "--prompts", prompts, "--out", tmp_path / "run", "--preset",
                  "demo", "--top-k", "3", "--seed", "9", *QUICK[:4])
    sampling = json.loads((tmp_path / "run/config.json").read_text())["sampling"]
    assert code == 0 and (sampling["top_k"], sampling["temperature"], sampling["seed"]) == (3, 0.8, 9)


@pytest.mark.parametrize("command", ["sample", "run"])
def test_dry_run_writes_nothing(model_folder, prompts, tmp_path, command):
    code, output = cli(command, "--model", model_folder, "--prompts", prompts, "--out", tmp_path / "run", "--dry-run")
    assert code == 0 and "memory to sample" in output and not (tmp_path / "run").exists()
    assert ("AdamW" in output) == (command == "run")


def test_dry_run_of_training_needs_samples(model_folder, prompts, tmp_path):
    arguments = ["train", "--model", model_folder, "--out", tmp_path / "run", "--dry-run"]
    fails(2, "no samples there", *arguments)
    assert not (tmp_path / "run").exists()
    assert cli("sample", *arguments[1:-1], "--prompts", prompts, *QUICK[:4])[0] == 0
    there = sorted(tmp_path.rglob("*"))
    code, output = cli(*arguments)
    assert code == 0 and "AdamW" in output and "6, at most" in output and "to sample" not in output
    assert sorted(tmp_path.rglob("*")) == there


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_what_cannot_be_sampled_cannot_be_planned(model_folder, prompts, tmp_path, options):
    arguments = ["sample", "--model", model_folder, "--prompts", prompts, "--out", tmp_path / "run", *options]
    fails(2, "--batch-size", *arguments, "--batch-size", "0")
    prompts.write_text(json.dumps({"prompt": "word " * 300}))
    fails(2, "expected less than the context's 128 tokens", *arguments)


def test_info():
    code, output = cli("info")
    assert code == 0
    for text in ("torch", torch.__version__, "linear_cross_entropy", "reference", "isa"):
        assert text in output


@pytest.mark.parametrize("command", ["info", "sample", "train", "run", "eval", "report"])
def test_help(command):
    code, output = cli(command, "--help")
    assert code == 0 and "--debug" in output


# -- what does not ----------------------------------------------------------------------------------------------------


def test_wrong_models(prompts, tmp_path, copy):
    def sample(model):
        return ["sample", "--model", model, "--prompts", prompts, "--out", tmp_path / "run", *QUICK[:4]]

    fails(2, "no such folder", *sample(tmp_path / "none"))
    fails(2, "holds no config.json", *sample(tmp_path))
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:1000])
    fails(2, "cannot be loaded", *sample(copy))
    (copy / "model.safetensors").write_bytes(weights)
    (copy / "config.json").write_text("{")
    fails(2, "cannot be loaded", *sample(copy))


def test_nan_weights_are_a_failure_that_names_the_tensor(prompts, tmp_path, copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    fails(1, "NaN or infinity, first in model.norm.weight", "run", "--model", copy, "--prompts", prompts, "--out",
          tmp_path / "run", *QUICK)


def test_a_tokenizer_without_end_of_sequence(prompts, tmp_path):
    model, tokenizer = make_model(eos_token_id=None), make_tokenizer()
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    fails(2, "tokenizer: expected an end-of-sequence token, got none", "sample", "--model", tmp_path / "m", "--prompts",
          prompts, "--out", tmp_path / "run")


@pytest.mark.parametrize(("data", "text"), [
    (None, "no such file"), ('{"prompt": " "}', ":1: expected a prompt, got an empty one"),
    ('"\\ud800"', ":1: expected text, got half of a surrogate pair"),
    ("", "expected at least one"), ('{"prompt": "a"}\n{"prompt"\n', ":2: not valid JSON"),
    (json.dumps({"prompt": "word " * 300}), "expected less than the context's 128 tokens"),
])
def test_wrong_prompts(model_folder, tmp_path, data, text):
    path = tmp_path / "p.jsonl"
    if data is not None:
        path.write_text(data)
    fails(2, text, "sample", "--model", model_folder, "--prompts", path, "--out", tmp_path / "run")


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_places_that_cannot_be_written(model_folder, prompts, tmp_path, place):
    (tmp_path / "file").write_text("")
    fails(2, "out: ", "sample", "--model", model_folder, "--prompts", prompts, "--out", tmp_path / place)


@pytest.mark.parametrize(("options", "text"), [
    (["--preset", "paper"], "preset: expected one of"),
    (["--top-p", "2"], "top_p: expected a number in (0, 1], got 2.0"),
    (["--temperature", "hot"], "--temperature"), (["--temprature", "1"], "--temprature"),
    (["--grad-filter", "1"], "grad_filter: expected a number in [0, 1)"), (["--targets", "both"], "targets: expected"),
    (["--problems", "none.jsonl"], "none.jsonl"),
])
def test_wrong_options(model_folder, prompts, tmp_path, options, text):
    fails(2, text, "run", "--model", model_folder, "--prompts", prompts, "--out", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_told_and_the_run_continues_later(model_folder, prompts, tmp_path, monkeypatch):
    from ssd_core.train import checkpoint

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    arguments = ["run", "--model", model_folder, "--prompts", prompts, "--out", tmp_path / "run", *QUICK]
    fails(1, "No space left on device", *arguments)
    monkeypatch.undo()
    assert cli(*arguments, "--resume")[0] == 0


def test_report_of_what_is_no_run(tmp_path):
    fails(2, "is not a run directory", "report", "--out", tmp_path)


# -- processes --------------------------------------------------------------------------------------------------------


def test_wrong_use_is_2_in_a_process(tmp_path):
    code, output, errors = process("report", "--out", tmp_path)
    assert code == 2 and output == "" and errors.startswith("error: out:") and "Traceback" not in errors


def test_a_failure_is_1_and_debug_shows_where(prompts, tmp_path, copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.inf
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    arguments = ["sample", "--model", copy, "--prompts", prompts, "--out", tmp_path / "run"]
    code, _, errors = process(*arguments, "--debug")
    assert code == 1 and "Traceback" in errors and "error: model: the weights hold NaN or infinity" in errors
    fails(1, "error: model: the weights hold NaN or infinity", *arguments, "--resume")


def test_ctrl_c_is_130_and_the_run_continues(model_folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Write {n}."}) + "\n" for n in range(24)))
    arguments = ["run", "--model", model_folder, "--prompts", prompts, "--out", tmp_path / "run", "--max-new-tokens",
                 "32", "--min-new-tokens", "32", "--batch-size", "3", "--learning-rate", "1e-3"]
    lines = tmp_path / "run/samples/completions.jsonl"
    started = start(*arguments)
    while (not lines.exists() or lines.read_bytes().count(b"\n") < 6) and started.poll() is None:
        time.sleep(0.01)    # an append that is interrupted takes back its own group of 3, not the one before
    started.send_signal(signal.SIGINT)
    output, errors = started.communicate(timeout=120)
    assert started.returncode == 130, output + errors
    assert "continue with --resume" in errors and "Traceback" not in errors
    there = lines.read_bytes()
    assert 3 <= there.count(b"\n") < 24 and not (tmp_path / "run/model").exists()
    code, output = cli(*arguments, "--resume")
    assert code == 0, output
    assert lines.read_bytes().startswith(there) and lines.read_bytes().count(b"\n") == 24
    assert (tmp_path / "run/model/config.json").exists() and (tmp_path / "run/report.html").exists()
