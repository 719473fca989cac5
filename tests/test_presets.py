"""Presets hold the paper's numbers (arXiv 2604.01193), and options win over them."""

import pytest

from ssd_core.checks import UsageError
from ssd_core.presets import PRESETS, resolve

PAPER = {   # train temperature, top-k, top-p; evaluation temperature; iterations, warm-up
    "llama-3.1-8b-instruct": (0.8, 20, 0.8, 0.7, 2500, 250),
    "qwen3-4b-instruct": (1.6, 20, 0.8, 1.1, 2500, 250),
    "qwen3-4b-thinking": (1.1, 20, 0.95, 0.7, 300, 50),
    "qwen3-30b-a3b-instruct": (1.6, 20, 0.8, 0.9, 2500, 250),
    "qwen3-30b-a3b-thinking": (1.2, 20, 0.95, 0.7, 300, 50),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models(name):
    sampling, training, decoding = resolve(name, {}, {}, {})
    assert (sampling.temperature, sampling.top_k, sampling.top_p, decoding.temperature, training.max_steps,
            training.warmup_steps) == PAPER[name]
    assert (decoding.top_k, decoding.top_p) == (sampling.top_k, sampling.top_p)
    assert training.targets == "hard" and training.loss_temperature == 1
    assert (training.learning_rate, training.min_lr, training.weight_decay) == (5e-6, 1e-6, 0.1)
    assert (training.adam_beta1, training.adam_beta2) == (0.9, 0.95)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 32


def test_the_article():
    sampling, training, _ = resolve("article", {}, {}, {})
    assert sampling.temperature == 0.8 and training.targets == "hard" and training.loss_temperature == 0.8
    assert 1 <= training.num_train_epochs <= 2


def test_options_win():
    sampling, training, decoding = resolve("demo", {"top_k": 7}, {"learning_rate": 1e-3}, {"temperature": 0.1})
    assert (sampling.top_k, training.learning_rate, decoding.temperature) == (7, 1e-3, 0.1)
    assert sampling.top_p == PRESETS["demo"].sampling["top_p"]


def test_every_preset_resolves_and_unknown_ones_are_named():
    for name in PRESETS:
        resolve(name, {}, {}, {})
    with pytest.raises(UsageError, match=r"preset: expected one of .*'demo'.*, got 'paper'"):
        resolve("paper", {}, {}, {})
    with pytest.raises(UsageError, match="top_p: expected"):
        resolve("demo", {"top_p": 2.0}, {}, {})
