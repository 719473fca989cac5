"""The plan's arithmetic against real numbers."""

import pytest
import torch
from conftest import make_model

from ssd_core import SamplingParams, TrainConfig
from ssd_core.checks import UsageError
from ssd_core.dryrun import gemm_rate, make_plan, plan_run
from ssd_core.prompts import load_prompts
from ssd_core.sampler.cache import new_cache

PROMPTS = load_prompts(["one", "a longer second prompt"])
SAMPLING = SamplingParams(max_new_tokens=20, top_k=5)


def test_parameters_and_cache_are_those_of_the_real_model(model_folder):
    plan = make_plan(model_folder, PROMPTS, SAMPLING, TrainConfig(bf16=False), batch_size=8)
    model = make_model()
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert plan.weights == sum(p.numel() * p.element_size() for p in model.parameters())
    cache = new_cache(model.config, 0)
    ids = torch.zeros(plan.batch, plan.length, dtype=torch.int64)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    real = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert plan.cache == real and plan.batch == 2


def test_training_memory_adds_up(model_folder):
    plan = make_plan(model_folder, PROMPTS, SAMPLING, TrainConfig(), batch_size=8)
    p = plan.parameters
    assert (plan.weights, plan.masters, plan.gradients, plan.adam) == (2 * p, 4 * p, 6 * p, 8 * p)
    assert plan.training == 20 * p + plan.activations + plan.workspace
    less = make_plan(model_folder, PROMPTS, SAMPLING, TrainConfig(gradient_checkpointing=True), batch_size=8)
    assert less.activations < plan.activations


def test_the_table_writes_and_loads_nothing(model_folder, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(plan_run(model_folder, PROMPTS, SAMPLING, TrainConfig(), batch_size=8, train=True))
    text = console.export_text()
    assert "KV cache, 2 sequences of" in text and "activations (estimate)" in text and "GFLOP/s" in text
    assert list(tmp_path.iterdir()) == []


def test_wrong_models(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        make_plan(str(tmp_path / "none"), PROMPTS, SAMPLING, TrainConfig(), batch_size=8)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="cannot be loaded"):
        make_plan(str(tmp_path), PROMPTS, SAMPLING, TrainConfig(), batch_size=8)


def test_the_rate_is_a_rate():
    assert 1e8 < gemm_rate(torch.float32, seconds=0.05) < 1e16
