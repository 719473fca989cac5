"""The plan's arithmetic against real numbers."""

import dataclasses
import json

import pytest
import torch
from conftest import make_model, make_tokenizer

from ssd_core import SamplingParams, TrainConfig, self_distill
from ssd_core.checks import UsageError
from ssd_core.dryrun import gemm_rate, make_plan, plan_run
from ssd_core.prompts import for_chat, load_prompts
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


def test_tied_embeddings_count_once(tmp_path):
    counts = []
    for tied in (True, False):
        model = make_model(tie_word_embeddings=tied)
        model.save_pretrained(tmp_path / str(tied))
        make_tokenizer().save_pretrained(tmp_path / str(tied))
        plan = make_plan(tmp_path / str(tied), PROMPTS, SAMPLING, TrainConfig(), batch_size=8)
        assert plan.parameters == sum(p.numel() for p in model.parameters())
        counts.append(plan.parameters)
    assert counts[1] - counts[0] == 300 * 32


def test_lengths_are_those_of_the_sampler(model_folder):
    """Cut at the context's 128 tokens; each completion has a prompt of its own."""
    from ssd_core.sampler import Sampler

    params = dataclasses.replace(SAMPLING, max_new_tokens=1000, num_return_sequences=3)
    plan = make_plan(model_folder, PROMPTS, params, TrainConfig(), batch_size=4)
    sampler = Sampler(make_model(), make_tokenizer(), params)
    requests = [r for group in sampler.plan(for_chat(PROMPTS, make_tokenizer())[0]) for r in group]
    lengths = [len(r.prompt_ids) for r in requests]
    assert (plan.sequences, plan.batch, plan.length) == (len(requests), 4, 128) == (6, 4, 128)
    assert plan.prompt_tokens == sum(lengths) and plan.completion_tokens == sum(128 - n for n in lengths)
    assert plan.new_tokens == 128 - min(lengths)


def test_disk_is_what_a_real_run_takes(model_folder, tmp_path):
    sampling = dataclasses.replace(SAMPLING, min_new_tokens=20)     # every completion has full length
    training = TrainConfig(learning_rate=1e-3, per_device_train_batch_size=2)
    result = self_distill(model_folder, [f"prompt {n}" for n in range(12)], tmp_path / "run", sampling=sampling,
                          training=training)

    def taken(name, pattern="*"):
        return sum(path.stat().st_size for path in (result.out / name).rglob(pattern) if path.is_file())

    plan = make_plan(model_folder, load_prompts([f"prompt {n}" for n in range(12)]), sampling, training, batch_size=32)
    assert plan.samples_on_disk / 2 < taken("samples") < plan.samples_on_disk
    one = plan.checkpoints_on_disk // (training.save_total_limit + 1)
    assert one == 12 * plan.parameters and taken("checkpoints", "*.safetensors") == pytest.approx(one, rel=0.1)
    assert taken("model", "*.safetensors") == pytest.approx(plan.weights, rel=0.1)
    drawn = make_plan(model_folder, None, sampling, training, batch_size=0, samples=result.out / "samples")
    assert (drawn.tokens, drawn.length, drawn.sequences) == (plan.tokens, plan.length, 12)


def test_time_follows_the_steps(model_folder):
    def flops(**options):
        return make_plan(model_folder, PROMPTS, SAMPLING, TrainConfig(**options), batch_size=8).training_flops

    plan = make_plan(model_folder, PROMPTS, SAMPLING, TrainConfig(), batch_size=8)
    assert plan.training_flops == 6 * plan.parameters * plan.tokens and plan.sampling_flops * 3 == plan.training_flops
    assert flops(num_train_epochs=3.0) == 3 * flops()
    # 5 steps of 2 x 4 sequences are 20 passes over the two that there are; steps win over epochs
    steps = {"max_steps": 5, "per_device_train_batch_size": 2, "num_train_epochs": 7.0}
    assert flops(gradient_accumulation_steps=4, **steps) == 20 * flops()
    assert flops(tokens_per_step=plan.tokens, **steps) == pytest.approx(5 * flops())
    assert flops(gradient_checkpointing=True) > flops()


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
    make_tokenizer().save_pretrained(tmp_path)
    for config in ("{", "[]", "{}", '{"model_type": "t5"}', '{"model_type": "none"}',
                   '{"model_type": "llama", "hidden_size": "x"}'):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(UsageError, match=r"model: .* cannot be loaded"):
            make_plan(str(tmp_path), PROMPTS, SAMPLING, TrainConfig(), batch_size=8)


def test_what_a_run_refuses_is_refused(model_folder, tmp_path):
    with pytest.raises(UsageError, match="batch_size: expected at least 1, got 0"):
        make_plan(model_folder, PROMPTS, SAMPLING, TrainConfig(), batch_size=0)
    with pytest.raises(UsageError, match=r"prompts\[1\]: expected less than the context's 128 tokens, got"):
        make_plan(model_folder, load_prompts(["short", "word " * 200]), SAMPLING, TrainConfig(), batch_size=8)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "settings": {}}))
    with pytest.raises(UsageError, match="samples: expected completions, got none"):
        make_plan(model_folder, None, SAMPLING, TrainConfig(), batch_size=0, samples=tmp_path)


def test_the_rate_is_a_rate():
    assert 1e8 < gemm_rate(torch.float32, seconds=0.05) < 1e16
