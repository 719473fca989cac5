"""The command line: exit codes, and clear errors for what a tired user feeds it."""

import json
import shutil
import subprocess
import sys

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


def process(*arguments, **options):
    return subprocess.run([sys.executable, "-P", "-m", "ssd_core.cli", *map(str, arguments)], capture_output=True,
                          text=True, **options)


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
    (None, "no such file"), ("", "expected at least one"), ('{"prompt": "a"}\n{"prompt"\n', ":2: not valid JSON"),
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
    (["--grad-filter", "0.01"], "grad_filter: expected 0"), (["--targets", "both"], "targets: expected"),
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


def test_real_processes_exit_with_the_same_codes(tmp_path):
    """A traceback only with --debug."""
    plain = process("report", "--out", tmp_path)
    assert plain.returncode == 2 and plain.stderr.startswith("error: out:") and "Traceback" not in plain.stderr
    debug = process("report", "--out", tmp_path, "--debug")
    assert debug.returncode == 2 and "Traceback" in debug.stderr
