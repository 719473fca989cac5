"""The main job end to end on the tiny model, and its run directory."""

import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file

from ssd_core import SamplingParams, TrainConfig, self_distill
from ssd_core.checks import UsageError
from ssd_core.pipeline import Run
from ssd_core.prompts import load_prompts

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
    del summary["seconds"]["train"]
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


def test_problems_added_later_are_evaluated_on_the_right_models(model_folder, tmp_path, problems):
    """before: the base model; after: the trained one, from disk."""
    self_distill(model_folder, PROMPTS, tmp_path / "run", **SETTINGS)
    self_distill(model_folder, PROMPTS, tmp_path / "run", problems=problems, resume=True, **SETTINGS)
    manifests = [json.loads((tmp_path / f"run/evaluation/{when}/manifest.json").read_text())["settings"]["model"]
                 for when in ("before", "after")]
    samples = json.loads((tmp_path / "run/samples/manifest.json").read_text())["settings"]["model"]
    assert manifests[0] == samples != manifests[1]


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


def test_a_run_that_failed_before_it_began_binds_nobody(model_folder, tmp_path):
    long = ["word " * 200]
    run = Run(tmp_path / "run", model_folder, load_prompts(long), **SETTINGS)
    with pytest.raises(UsageError, match=r"prompts\[0\]: expected less than the context's 128 tokens"):
        run.sample()
    self_distill(model_folder, PROMPTS, tmp_path / "run", **SETTINGS)


def test_training_wants_finished_samples_of_the_same_model(model_folder, tmp_path):
    with pytest.raises(UsageError, match="no samples there"):
        Run(tmp_path / "none", model_folder, None, sections=("training",), **SETTINGS).train()
    start(model_folder, tmp_path / "run", sections=("sampling",)).sample()
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
