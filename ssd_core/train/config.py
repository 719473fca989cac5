"""How to train; names and meanings are those of ``transformers.TrainingArguments`` where it has them."""

from __future__ import annotations

import dataclasses
import math
import numbers

from ssd_core.checks import expect, expect_type, finite_positive, in_range

_KINDS = {"int": (numbers.Integral, "a whole number"), "float": (numbers.Real, "a number"),
          "bool": (bool, "True or False"), "str": (str, "a text")}


def _option(default, help: str):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    learning_rate: float = _option(5e-6, "peak learning rate of AdamW")
    lr_scheduler_type: str = _option("cosine", "cosine, linear or constant, after the warm-up")
    min_lr: float = _option(0.0, "learning rate at the last step")
    num_train_epochs: float = _option(1.0, "passes over the samples")
    max_steps: int = _option(-1, "optimizer steps; overrides the epochs if above 0")
    warmup_steps: int = _option(0, "steps of linear warm-up")
    weight_decay: float = _option(0.1, "decoupled weight decay of matrices")
    adam_beta1: float = _option(0.9, "AdamW's beta1")
    adam_beta2: float = _option(0.95, "AdamW's beta2")
    adam_epsilon: float = _option(1e-8, "AdamW's epsilon")
    max_grad_norm: float = _option(1.0, "clip gradients to this norm; 0 does not clip")
    per_device_train_batch_size: int = _option(8, "sequences of a micro-batch")
    gradient_accumulation_steps: int = _option(1, "micro-batches of an optimizer step")
    tokens_per_step: int = _option(0, "fill a step up to this many tokens instead; 0 counts sequences")
    save_steps: int = _option(50, "optimizer steps between checkpoints")
    save_total_limit: int = _option(1, "checkpoints to keep")
    eval_steps: int = _option(0, "steps between evaluations on held-out samples; 0: before and after only")
    eval_fraction: float = _option(0.1, "share of the prompts whose samples are held out")
    seed: int = _option(0, "seed of the order of samples and of dropout")
    bf16: bool = _option(True, "bfloat16 weights, from the start, with float32 master weights; else float32")
    gradient_checkpointing: bool = _option(False, "recompute activations in the backward to save memory")
    targets: str = _option("soft", "soft: the recorded distributions; hard: the drawn tokens (the paper's recipe)")
    loss_temperature: float = _option(1.0, "temperature of the student in the loss, for hard targets")
    drop_truncated: bool = _option(False, "leave out completions that the length limit cut")
    grad_filter: float = _option(0.0, "bound of the certified gradient filter; 0: exact; above 0.001 training is worse")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            expect_type(getattr(self, field.name), field.name, *_KINDS[field.type])
        for name in ("learning_rate", "num_train_epochs", "adam_epsilon", "loss_temperature"):
            finite_positive(getattr(self, name), name)
        for name in ("min_lr", "weight_decay", "max_grad_norm", "grad_filter"):
            value = getattr(self, name)
            expect(math.isfinite(value) and value >= 0, name, "a finite number, at least 0", value)
        most = self.learning_rate
        expect(self.min_lr <= most, "min_lr", f"at most the learning rate, {most}", self.min_lr)
        for name in ("adam_beta1", "adam_beta2"):
            in_range(getattr(self, name), name, 0, 1)
        counts = ("per_device_train_batch_size", "gradient_accumulation_steps", "save_steps", "save_total_limit")
        for name in counts:
            expect(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("warmup_steps", "tokens_per_step", "eval_steps"):
            expect(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        expect(0 <= self.eval_fraction < 1, "eval_fraction", "a number in [0, 1)", self.eval_fraction)
        schedules = ("cosine", "linear", "constant")
        expect(self.lr_scheduler_type in schedules, "lr_scheduler_type", f"one of {schedules}", self.lr_scheduler_type)
        expect(self.targets in ("soft", "hard"), "targets", "'soft' or 'hard'", repr(self.targets))
        expect(self.grad_filter < 1, "grad_filter", "a number in [0, 1)", self.grad_filter)
        # a temperature on both sides has no gradient at the start of self-distillation
        both = self.targets == "soft" and self.loss_temperature != 1
        expect(not both, "loss_temperature", "1 with soft targets (use targets='hard')", self.loss_temperature)

    def learning_rate_at(self, step: int, total: int) -> float:
        """Of step 0 .. total - 1: linear warm-up, then the schedule from ``learning_rate`` down to ``min_lr``."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, total - 1 - self.warmup_steps)
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return self.min_lr + (self.learning_rate - self.min_lr) * shape[self.lr_scheduler_type]
