"""Settings by name: the paper's five models (arXiv 2604.01193), the popular article's, and the demo's.

A preset says how to sample, how to train, and how to decode afterwards; options given beside it win.
"""

from __future__ import annotations

import dataclasses

from ssd_core.checks import UsageError
from ssd_core.sampling_params import SamplingParams
from ssd_core.train.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Preset:
    about: str
    sampling: dict      # fields of SamplingParams
    training: dict      # fields of TrainConfig
    decoding: dict      # fields of SamplingParams, for evaluation


def _draw(temperature: float, top_k: int, top_p: float, **more) -> dict:
    return {"temperature": temperature, "top_k": top_k, "top_p": top_p, **more}


# AdamW (0.9, 0.95), decay 0.1, cosine 5e-6 to 1e-6, 32 sequences a step, cross-entropy on the drawn tokens
_PAPER = {"targets": "hard", "learning_rate": 5e-6, "min_lr": 1e-6, "weight_decay": 0.1, "adam_beta2": 0.95,
          "per_device_train_batch_size": 1, "gradient_accumulation_steps": 32}
_INSTRUCT = {**_PAPER, "max_steps": 2500, "warmup_steps": 250}
_THINKING = {**_PAPER, "max_steps": 300, "warmup_steps": 50}
_LONG = {"max_new_tokens": 65536}

PRESETS = {
    "default": Preset("a small instruct model, soft targets", _draw(0.8, 20, 0.8), {}, _draw(0.7, 20, 0.8)),
    "llama-3.1-8b-instruct": Preset(
        "the paper's Llama-3.1-8B-Instruct", _draw(0.8, 20, 0.8, **_LONG), _INSTRUCT, _draw(0.7, 20, 0.8)),
    "qwen3-4b-instruct": Preset(
        "the paper's Qwen3-4B-Instruct-2507", _draw(1.6, 20, 0.8, **_LONG), _INSTRUCT, _draw(1.1, 20, 0.8)),
    "qwen3-4b-thinking": Preset(
        "the paper's Qwen3-4B-Thinking-2507", _draw(1.1, 20, 0.95, **_LONG), _THINKING, _draw(0.7, 20, 0.95)),
    "qwen3-30b-a3b-instruct": Preset(
        "the paper's Qwen3-30B-A3B-Instruct", _draw(1.6, 20, 0.8, **_LONG), _INSTRUCT, _draw(0.9, 20, 0.8)),
    "qwen3-30b-a3b-thinking": Preset(
        "the paper's Qwen3-30B-A3B-Thinking", _draw(1.2, 20, 0.95, **_LONG), _THINKING, _draw(0.7, 20, 0.95)),
    "article": Preset(
        "the popular article's reading: a temperature in the loss, 1 - 2 epochs",
        _draw(0.8, 20, 0.8), {"targets": "hard", "loss_temperature": 0.8, "num_train_epochs": 2.0},
        _draw(0.8, 20, 0.8)),
    "demo": Preset(
        "SmolLM2-135M in a few minutes on two cores", _draw(0.8, 20, 0.8, max_new_tokens=256),
        {"learning_rate": 1e-4, "min_lr": 1e-5, "num_train_epochs": 2.0, "per_device_train_batch_size": 4,
         "warmup_steps": 2, "save_steps": 10, "eval_fraction": 0.125},
        _draw(0.6, 20, 0.9, max_new_tokens=96, num_return_sequences=4)),
}


def preset(name: str) -> Preset:
    if name not in PRESETS:
        raise UsageError(f"preset: expected one of {sorted(PRESETS)}, got {name!r}")
    return PRESETS[name]


def resolve(
    name: str, sampling: dict, training: dict, decoding: dict,
) -> tuple[SamplingParams, TrainConfig, SamplingParams]:
    """Sampling, training and decoding settings: the preset's, with the given fields over them."""
    chosen = preset(name)
    try:
        return (SamplingParams(**{**chosen.sampling, **sampling}), TrainConfig(**{**chosen.training, **training}),
                SamplingParams(**{**chosen.decoding, **decoding}))
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from None
