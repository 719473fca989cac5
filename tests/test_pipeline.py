"""The main job end to end on the tiny model, and its run directory."""

import contextlib
import errno
import json
import pkgutil
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors import SafetensorError
from safetensors.torch import load_file

from ssd_core import SamplingParams, TrainConfig, self_distill
from ssd_core.checks import UsageError
from ssd_core.models import fingerprint
from ssd_core.pipeline import Reporter, Run
from ssd_core.prompts import load_prompts

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [f"Write a function that adds {n}." for n in range(10)]
SAMPLING = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, max_new_tokens=16, seed=1)
TRAINING = TrainConfig(learning_rate=1e-3, per_device_train_batch_size=2, save_steps=2, seed=1)
DECODING = SamplingParams(temperature=0, max_new_tokens=8)
SETTINGS = {"sampling": SAMPLING, "training": TRAINING, "decoding": DECODING, "batch_size": 4}


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    lines = [{"task_id": f"t/{n}", "prompt": f"def f{n}():\n    \"\"\"Returns {n}.\"\"\"\n", "entry_point": f"f{n}",
              "test": f"def check(c):\n    assert c() == {n}\n"} for n in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def files(out):
    """What must be the same, byte for byte, in two runs of the same settings."""
    names = [p for p in sorted(out.rglob("*"))
             if p.suffix in (".safetensors", ".jsonl") and "checkpoints" not in p.parts]
    return {str(p.relative_to(out)): p.read_bytes() for p in names if p.name != "metrics.jsonl"}


def test_self_distill_writes_a_model_that_plain_transformers_loads(model_folder, tmp_path, problems):
    result = self_distill(model_folder, PROMPTS, tmp_path / "run", problems=problems, **SETTINGS)
    names = {path.name for path in result.out.iterdir()}
    assert {"config.json", "samples", "checkpoints", "model", "metrics.jsonl", "summary.json", "report.html",
            "evaluation"} <= names
    before, after = load_file(model_folder / "model.safetensors"), load_file(result.model / "model.safetensors")
    assert any(not torch.equal(before[k].bfloat16(), after[k].bfloat16()) for k in after)
    assert len(result.held_out_loss) == 2 and result.pass_at_1 == (0.0, 0.0)
    assert result.summary["counts"]["completions"] == 10
    code = ("import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T;"
            "m = M.from_pretrained(sys.argv[1]); t = T.from_pretrained(sys.argv[1]);"
            "print(m.generate(**t('def', return_tensors='pt'), max_new_tokens=4).shape)")
    done = subprocess.run([sys.executable, "-P", "-c", code, str(result.model)], capture_output=True, text=True)
    assert "torch.Size" in done.stdout, done.stderr


def test_a_finished_run_is_quick_and_changes_nothing(model_folder, tmp_path, problems):
    result = self_distill(model_folder, PROMPTS, tmp_path / "run", problems=problems, **SETTINGS)
    there = files(result.out)
    start = time.perf_counter()
    again = self_distill(model_folder, PROMPTS, tmp_path / "run", problems=problems, resume=True, **SETTINGS)
    assert files(again.out) == there and again.held_out_loss == result.held_out_loss
    assert time.perf_counter() - start < 3


def test_stages_one_by_one_equal_one_call(model_folder, tmp_path):
    whole = self_distill(model_folder, PROMPTS, tmp_path / "whole", **SETTINGS)
    common = {"sampling": SAMPLING, "training": TRAINING, "decoding": DECODING, "batch_size": 4}
    Run(tmp_path / "parts", model_folder, load_prompts(PROMPTS), sections=("sampling",), **common).sample()
    Run(tmp_path / "parts", model_folder, None, sections=("training",), **common).train()
    assert files(whole.out) == files(tmp_path / "parts")


@pytest.mark.parametrize("dtype", ["--bf16", "--no-bf16"])
def test_commands_one_by_one_equal_one_command(model_folder, tmp_path, dtype):
    from typer.testing import CliRunner

    from ssd_core.cli import app

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))

    def cli(command, out, *options):
        found = CliRunner().invoke(app, [command, "--out", str(tmp_path / out), *options])
        assert found.exit_code == 0, found.output

    both = ["--model", str(model_folder), dtype, "--seed", "5"]
    sampling = ["--prompts", str(prompts), "--max-new-tokens", "16", "--batch-size", "4"]
    training = ["--learning-rate", "1e-3", "--per-device-train-batch-size", "2"]
    cli("run", "whole", *both, *sampling, *training)
    cli("sample", "parts", *both, *sampling)
    cli("train", "parts", *both, *training)
    (tmp_path / "parts/report.html").unlink()
    cli("report", "parts")
    assert files(tmp_path / "whole") == files(tmp_path / "parts") and (tmp_path / "parts/report.html").exists()
    width = {"--bf16": torch.bfloat16, "--no-bf16": torch.float32}[dtype]
    assert {t.dtype for t in load_file(tmp_path / "parts/model/model.safetensors").values()} == {width}


def test_an_interrupted_run_continues_to_the_same_files(model_folder, tmp_path, monkeypatch):
    whole = self_distill(model_folder, PROMPTS, tmp_path / "whole", **SETTINGS)
    from ssd_core.store import SampleStore
    from ssd_core.train import checkpoint

    class Killed(Exception):
        pass

    for place, name, calls in ((SampleStore, "append", 2), (checkpoint, "save", 2), (checkpoint, "save", 1)):
        original, left = getattr(place, name), [calls]

        def failing(*args, original=original, left=left, **options):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return original(*args, **options)

        monkeypatch.setattr(place, name, failing)
        with pytest.raises(Killed):
            self_distill(model_folder, PROMPTS, tmp_path / "parts", resume=True, **SETTINGS)
        monkeypatch.undo()
    result = self_distill(model_folder, PROMPTS, tmp_path / "parts", resume=True, **SETTINGS)
    assert files(whole.out) == files(result.out)


def test_killed_while_saving_the_model(model_folder, tmp_path):
    """A model folder that is not whole is written again."""
    whole = self_distill(model_folder, PROMPTS, tmp_path / "run", **SETTINGS)
    there = files(whole.out)
    shutil.rmtree(whole.model)
    half = tmp_path / "run/.model.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    summary = json.loads((whole.out / "summary.json").read_text())
    del summary["done"]["train"]
    (whole.out / "summary.json").write_text(json.dumps(summary))
    self_distill(model_folder, PROMPTS, tmp_path / "run", resume=True, **SETTINGS)
    assert files(whole.out) == there and not half.exists()


def test_a_model_object_is_trained_in_place(tmp_path):
    model, tokenizer = make_model().bfloat16(), make_tokenizer()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = self_distill(model, PROMPTS, tmp_path / "run", tokenizer=tokenizer, **SETTINGS)
    saved = load_file(result.model / "model.safetensors")
    for name, p in model.named_parameters():
        assert torch.equal(p, saved[name])
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(UsageError, match="tokenizer: expected the model's tokenizer beside a model object"):
        self_distill(model, PROMPTS, tmp_path / "other")


def test_a_float32_model_object_equals_its_folder(model_folder, tmp_path):
    """Sampled from and trained in the dtype of the training, from the start."""
    folder = self_distill(model_folder, PROMPTS, tmp_path / "folder", **SETTINGS)
    model = make_model()
    result = self_distill(model, PROMPTS, tmp_path / "object", tokenizer=make_tokenizer(), **SETTINGS)
    assert files(folder.out) == files(result.out)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_resuming_a_finished_run_trains_the_object_too(tmp_path, problems):
    trained, again = make_model(), make_model()
    self_distill(trained, PROMPTS, tmp_path / "run", tokenizer=make_tokenizer(), **SETTINGS)
    self_distill(again, PROMPTS, tmp_path / "run", tokenizer=make_tokenizer(), problems=problems, resume=True,
                 **SETTINGS)
    for (name, a), b in zip(trained.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    before, after = (json.loads((tmp_path / f"run/evaluation/{when}/manifest.json").read_text())["settings"]["model"]
                     for when in ("before", "after"))
    assert before != after == fingerprint(trained)


def test_the_same_draws_before_and_after(model_folder, tmp_path, problems):
    """A model that did not change completes the problems as before: the seeds do not depend on the stage."""
    still = {**SETTINGS, "training": TrainConfig(learning_rate=1e-12), "decoding": SamplingParams(max_new_tokens=8)}
    self_distill(model_folder, PROMPTS, tmp_path / "run", problems=problems, **still)
    before, after = (tmp_path / f"run/evaluation/{when}/completions.jsonl" for when in ("before", "after"))
    assert before.read_bytes() == after.read_bytes()


def test_problems_added_later_are_evaluated_on_the_right_models(model_folder, tmp_path, problems):
    """before: the base model; after: the trained one, from disk."""
    self_distill(model_folder, PROMPTS, tmp_path / "run", **SETTINGS)
    self_distill(model_folder, PROMPTS, tmp_path / "run", problems=problems, resume=True, **SETTINGS)
    manifests = [json.loads((tmp_path / f"run/evaluation/{when}/manifest.json").read_text())["settings"]["model"]
                 for when in ("before", "after")]
    samples = json.loads((tmp_path / "run/samples/manifest.json").read_text())["settings"]["model"]
    assert manifests[0] == samples != manifests[1]


# -- interruptions ----------------------------------------------------------------------------------------------------


def test_killed_while_grading(model_folder, tmp_path, problems, monkeypatch):
    """An evaluation is done when its result is on disk, not when the last completion is."""
    from ssd_core import evaluate

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "grade", killed)
    with pytest.raises(KeyboardInterrupt):
        self_distill(model_folder, PROMPTS, tmp_path / "run", problems=problems, **SETTINGS)
    monkeypatch.undo()
    result = self_distill(model_folder, PROMPTS, tmp_path / "run", problems=problems, resume=True, **SETTINGS)
    assert result.pass_at_1 == (0.0, 0.0)


def test_seconds_and_tokens_are_sums_over_the_attempts(model_folder, tmp_path, monkeypatch):
    from ssd_core.store import SampleStore
    from ssd_core.train import checkpoint

    whole = self_distill(model_folder, PROMPTS, tmp_path / "whole", **SETTINGS).summary
    for place, name in ((SampleStore, "append"), (checkpoint, "save")):
        original, calls = getattr(place, name), []

        def failing(*args, original=original, calls=calls):
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(place, name, failing)
        with pytest.raises(KeyboardInterrupt):
            self_distill(model_folder, PROMPTS, tmp_path / "parts", resume=True, **SETTINGS)
        monkeypatch.undo()
    before = json.loads((tmp_path / "parts/summary.json").read_text())
    assert before["done"] == {"sample": True} and 0 < before["tokens"]["train"] < whole["tokens"]["train"]
    parts = self_distill(model_folder, PROMPTS, tmp_path / "parts", resume=True, **SETTINGS).summary
    assert parts["tokens"] == whole["tokens"] and parts["counts"] == whole["counts"]
    assert parts["seconds"]["train"] > before["seconds"]["train"]
    for stage, tokens in parts["tokens"].items():
        assert parts["tokens_per_second"][stage] == pytest.approx(tokens / parts["seconds"][stage])


@pytest.mark.parametrize(("place", "call"), [
    ("ssd_core.store.write_atomic", 2), ("ssd_core.files.AppendOnly.append", 1),        # samples
    ("ssd_core.files.AppendOnly.append", 5), ("ssd_core.train.checkpoint.save_file", 2),    # metrics, checkpoints
    ("transformers.PreTrainedModel.save_pretrained", 1), ("ssd_core.evaluate.Evaluation.save", 2),
    ("ssd_core.report.write_report", 1),
])
def test_a_full_disk_names_the_run_and_the_run_continues(model_folder, tmp_path, problems, monkeypatch, place, call):
    count = 0
    module, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(module)
    original = getattr(owner, name)

    def full(*args, **options):
        nonlocal count
        count += 1
        if count == call and name in ("save_file", "save_pretrained"):
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        if count == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **options)

    monkeypatch.setattr(owner, name, full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        self_distill(model_folder, PROMPTS, tmp_path / "run", problems=problems, **SETTINGS)
    assert str(tmp_path / "run") in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.undo()
    result = self_distill(model_folder, PROMPTS, tmp_path / "run", problems=problems, resume=True, **SETTINGS)
    assert not list(result.out.rglob(".*")) and len(result.held_out_loss) == len(result.pass_at_1) == 2


def test_a_prompt_that_is_too_long_is_told_before_the_evaluation(model_folder, tmp_path, problems, monkeypatch):
    monkeypatch.setattr(Run, "evaluate", lambda run, when: pytest.fail("evaluated first"))
    with pytest.raises(UsageError, match=r"prompts\[1\]: expected less than the context's 128 tokens"):
        self_distill(model_folder, ["short", "word " * 200], tmp_path / "run", problems=problems, **SETTINGS)


def test_a_head_that_cannot_be_trained_is_told_before_the_sampling(model_folder, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    original = LlamaForCausalLM.forward

    def doubled(self, *args, **options):
        output = original(self, *args, **options)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
    with pytest.raises(UsageError, match="its loss cannot be fused"):
        self_distill(model_folder, PROMPTS, tmp_path / "run", **SETTINGS)
    assert not list((tmp_path / "run").iterdir())


# -- run directories --------------------------------------------------------------------------------------------------


def start(model_folder, out, **changes):
    settings = {"sampling": SAMPLING, "training": TRAINING, "decoding": DECODING, "batch_size": 4, **changes}
    return Run(out, model_folder, load_prompts(PROMPTS), **settings)


def test_an_existing_run_needs_resume_and_equal_settings(model_folder, tmp_path):
    start(model_folder, tmp_path / "run").sample()
    with pytest.raises(UsageError, match=r"holds a run already: continue it with --resume"):
        start(model_folder, tmp_path / "run")
    hotter = SamplingParams(temperature=1.5, top_k=20, top_p=0.9, max_new_tokens=16, seed=1)
    with pytest.raises(UsageError, match=r"other settings:\n  sampling.temperature: 0.8 there, 1.5 now"):
        start(model_folder, tmp_path / "run", sampling=hotter, resume=True)
    slower = TrainConfig(learning_rate=1e-4, per_device_train_batch_size=2, save_steps=2, seed=1)
    with pytest.raises(UsageError, match=r"training.learning_rate: 0.001 there, 0.0001 now"):
        start(model_folder, tmp_path / "run", training=slower, resume=True)
    with pytest.raises(UsageError, match=r"prompts\.digest"):
        Run(tmp_path / "run", model_folder, load_prompts(PROMPTS[:3]), resume=True, **SETTINGS)
    start(model_folder, tmp_path / "run", resume=True)


def test_a_training_with_nothing_to_train_on_binds_nobody(model_folder, tmp_path):
    endless = SamplingParams(max_new_tokens=8, min_new_tokens=8, seed=1)
    start(model_folder, tmp_path / "run", sections=("sampling",), sampling=endless).sample()
    whole = TrainConfig(drop_truncated=True)
    with pytest.raises(UsageError, match="none left to train on, of 10: 0 empty, 10 truncated"):
        Run(tmp_path / "run", model_folder, None, sections=("training",), **{**SETTINGS, "training": whole}).train()
    Run(tmp_path / "run", model_folder, None, sections=("training",), **SETTINGS).train()


def test_stages_with_other_dtypes_or_batches_are_refused(model_folder, tmp_path):
    start(model_folder, tmp_path / "run", sections=("sampling",)).sample()
    wide = TrainConfig(bf16=False)
    with pytest.raises(UsageError, match=r"model\.dtype: 'bfloat16' there, 'float32' now"):
        Run(tmp_path / "run", model_folder, None, sections=("training",), **{**SETTINGS, "training": wide})
    with pytest.raises(UsageError, match="batch_size: expected at least 1, got 0"):
        start(model_folder, tmp_path / "none", batch_size=0)
    assert not (tmp_path / "none").exists()


def test_the_trained_model_is_evaluated_in_its_run_directory(model_folder, tmp_path, problems):
    result = self_distill(model_folder, PROMPTS, tmp_path / "run", **SETTINGS)
    run = Run(result.out, result.model, None, problems=problems, sections=("evaluation",), **SETTINGS)
    run.evaluate("result")
    config = json.loads((result.out / "config.json").read_text())
    assert config["model"]["path"] == str(model_folder)
    assert config["evaluation"]["model"]["path"] == str(result.model)
    assert (result.out / "evaluation/result.json").exists()
    with pytest.raises(UsageError, match=r"evaluation\.model"):
        Run(result.out, model_folder, None, problems=problems, sections=("evaluation",), resume=True, **SETTINGS)


def test_killed_at_its_very_first_file(model_folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.config.json.tmp").write_text("{")
    start(model_folder, tmp_path / "run").sample()


def test_a_run_that_failed_before_it_began_binds_nobody(model_folder, tmp_path):
    long = ["word " * 200]
    run = Run(tmp_path / "run", model_folder, load_prompts(long), **SETTINGS)
    with pytest.raises(UsageError, match=r"prompts\[0\]: expected less than the context's 128 tokens"):
        run.sample()
    self_distill(model_folder, PROMPTS, tmp_path / "run", **SETTINGS)


class Stopping(Reporter):
    """Ctrl-C in the second group."""

    @contextlib.contextmanager
    def stage(self, title, total, unit):
        finished = 0

        def advance(done, tokens=0, **values):
            nonlocal finished
            finished += done
            if finished > 4:
                raise KeyboardInterrupt

        yield advance


def test_training_wants_finished_samples_of_the_same_model(model_folder, tmp_path):
    with pytest.raises(UsageError, match="no samples there"):
        Run(tmp_path / "none", model_folder, None, sections=("training",), **SETTINGS).train()
    half = start(model_folder, tmp_path / "run", sections=("sampling",), reporter=Stopping())
    with pytest.raises(KeyboardInterrupt):
        half.sample()
    with pytest.raises(UsageError, match="is not finished: continue sampling with --resume first"):
        Run(tmp_path / "run", model_folder, None, sections=("training",), **SETTINGS).train()
    # what was refused binds nobody: other settings, without resume
    start(model_folder, tmp_path / "run", sections=("sampling",), resume=True).sample()
    Run(tmp_path / "run", model_folder, None, sections=("training",), **{**SETTINGS, "training": TrainConfig()})
    other = tmp_path / "other"
    make_model(seed=5).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    with pytest.raises(UsageError, match=r"model\.path"):
        Run(tmp_path / "run", other, None, sections=("training",), **SETTINGS)
    shutil.copytree(model_folder, tmp_path / "moved")
    shutil.copy(other / "model.safetensors", tmp_path / "moved/model.safetensors")
    Run(tmp_path / "run2", tmp_path / "moved", load_prompts(PROMPTS), sections=("sampling",), **SETTINGS).sample()
    shutil.copy(model_folder / "model.safetensors", tmp_path / "moved/model.safetensors")
    with pytest.raises(UsageError, match="model: expected the one that drew"):
        Run(tmp_path / "run2", tmp_path / "moved", None, sections=("training",), **SETTINGS).train()


@pytest.mark.parametrize("kind", ["file", "below a file", "other folder"])
def test_places_that_cannot_hold_a_run(model_folder, tmp_path, kind):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/thesis.txt").write_text("")
    out = {"file": tmp_path / "file", "below a file": tmp_path / "file/run", "other folder": tmp_path / "folder"}[kind]
    with pytest.raises(UsageError, match="out: "):
        start(model_folder, out)


def test_a_wrong_model_leaves_nothing_behind(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        self_distill(str(tmp_path / "missing"), PROMPTS, tmp_path / "run")
    assert not (tmp_path / "run").exists()
