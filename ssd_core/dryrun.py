"""What a run will need, before anything is loaded: ``--dry-run``."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch
from rich.table import Table

from ssd_core import models
from ssd_core.checks import UsageError
from ssd_core.plan import ACCELERATOR_WORKSPACE, DEFAULT_WORKSPACE
from ssd_core.prompts import Prompts, for_chat
from ssd_core.sampling_params import SUPPORT_LIMIT, SamplingParams
from ssd_core.store import SampleStore
from ssd_core.train.config import TrainConfig

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes and operations of a run, by arithmetic from the model's shape; activations and times are estimates."""

    parameters: int         # tied ones counted once
    layers: int
    hidden: int
    kv_width: int           # key/value heads times their size
    bytes_per_weight: int   # 2 or 4
    batch: int              # sequences decoded together
    length: int             # of the longest prompt and its completion
    sequences: int          # completions to draw, or to train on
    new_tokens: int         # of a completion, at most
    prompt_tokens: int      # of all sequences
    completion_tokens: int  # of all sequences, at most
    epochs: float           # also a part of one, if the steps are limited
    micro_batch: int
    top_k: int
    workspace: int
    checkpoints: int
    recompute: bool         # activations

    @property
    def weights(self) -> int:
        return self.parameters * self.bytes_per_weight

    @property
    def cache(self) -> int:
        """Keys and values of every layer, for a batch of the longest sequences."""
        return self.batch * self.length * self.layers * 2 * self.kv_width * self.bytes_per_weight

    @property
    def masters(self) -> int:
        """float32 copies beside 16-bit weights."""
        return 4 * self.parameters if self.bytes_per_weight == 2 else 0

    @property
    def gradients(self) -> int:
        """Of the weights, and beside 16-bit ones the float32 sums of the micro-batches."""
        return self.parameters * (self.bytes_per_weight + (4 if self.bytes_per_weight == 2 else 0))

    @property
    def adam(self) -> int:
        return 8 * self.parameters

    @property
    def activations(self) -> int:
        """An estimate: some 20 hidden vectors a token and layer, or one if they are recomputed."""
        vectors = self.layers + 20 if self.recompute else 20 * self.layers
        return self.micro_batch * self.length * vectors * self.hidden * self.bytes_per_weight

    @property
    def sampling(self) -> int:
        return self.weights + self.cache

    @property
    def training(self) -> int:
        return self.weights + self.masters + self.gradients + self.adam + self.activations + self.workspace

    @property
    def samples_on_disk(self) -> int:
        """Ids and probabilities of the support, statistics, and the text line, of completions of full length."""
        support = min(self.top_k or SUPPORT_LIMIT, SUPPORT_LIMIT)
        ids_and_text = 8 * self.prompt_tokens + 16 * self.completion_tokens
        return self.completion_tokens * (8 * support + 4 * 4) + ids_and_text + 1024 * self.sequences

    @property
    def checkpoints_on_disk(self) -> int:
        """float32 weights and AdamW's two moments; the newest is written before an old one goes."""
        return 12 * self.parameters * (self.checkpoints + 1)

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def sampling_flops(self) -> float:
        return 2.0 * self.parameters * self.tokens

    @property
    def training_flops(self) -> float:
        return (8.0 if self.recompute else 6.0) * self.parameters * self.epochs * self.tokens


def make_plan(
    model: str, prompts: Prompts | None, sampling: SamplingParams, training: TrainConfig, *, batch_size: int,
    samples: Path | None = None,
) -> Plan:
    """From the model's config and tokenizer, and the prompts or the samples that are there."""
    config, tokenizer, network = _shapes(model)
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if samples is not None:
        lengths = _drawn_lengths(samples)
    else:
        if batch_size < 1:
            raise UsageError(f"batch_size: expected at least 1, got {batch_size}")
        lengths = _lengths_to_draw(prompts, tokenizer, models.context_length(network), sampling)
    prompt_tokens, completion_tokens = (sum(column) for column in zip(*lengths, strict=True))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Plan(
        parameters=sum(p.numel() for p in network.parameters()), layers=text.num_hidden_layers,
        hidden=text.hidden_size, kv_width=heads * head_size, bytes_per_weight=2 if training.bf16 else 4,
        batch=min(batch_size, len(lengths)), length=max(map(sum, lengths)), sequences=len(lengths),
        new_tokens=max(new for _, new in lengths), prompt_tokens=prompt_tokens, completion_tokens=completion_tokens,
        epochs=_epochs(training, len(lengths), prompt_tokens + completion_tokens),
        micro_batch=min(training.per_device_train_batch_size, len(lengths)), top_k=sampling.top_k,
        workspace=DEFAULT_WORKSPACE.get(device, ACCELERATOR_WORKSPACE), checkpoints=training.save_total_limit,
        recompute=training.gradient_checkpointing)


def _shapes(model: str):
    """``(config, tokenizer, network without weights)``."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = models.local_folder(model) or model
    try:
        config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
        network.tie_weights()       # early releases of transformers 5 leave it out on the meta device
        return config, tokenizer, network
    except Exception as error:      # whatever a wrong config meets first: transformers checks little of it
        raise UsageError(f"model: {model} cannot be loaded: {error}") from error


def _lengths_to_draw(
    prompts: Prompts, tokenizer, context: int | None, sampling: SamplingParams,
) -> list[tuple[int, int]]:
    """Tokens of the prompt, and of the completion at most, of each sequence: those of the Sampler."""
    found = []
    for index, prompt in enumerate(for_chat(prompts, tokenizer)[0]):
        if isinstance(prompt, str):
            ids = tokenizer(prompt).input_ids
        else:
            ids = tokenizer.apply_chat_template(prompt, tokenize=True, add_generation_prompt=True, return_dict=False)
        if context is not None and len(ids) >= context:
            raise UsageError(f"prompts[{index}]: expected less than the context's {context} tokens, got {len(ids)}")
        new = sampling.max_new_tokens if context is None else min(sampling.max_new_tokens, context - len(ids))
        found += [(len(ids), new)] * sampling.num_return_sequences
    return found


def _drawn_lengths(samples: Path) -> list[tuple[int, int]]:
    """Tokens of the prompt and of the completion of each sample that is there."""
    found = [(len(c.prompt_ids), len(c.token_ids)) for c in SampleStore(samples)]
    if not found:
        raise UsageError(f"samples: expected completions, got none in {samples}")
    return found


def _epochs(training: TrainConfig, sequences: int, tokens: int) -> float:
    if training.max_steps <= 0:
        return training.num_train_epochs
    if training.tokens_per_step:
        return training.max_steps * training.tokens_per_step / tokens
    return (training.max_steps * training.per_device_train_batch_size * training.gradient_accumulation_steps
            / sequences)


def plan_run(
    model: str, prompts: Prompts | None, sampling: SamplingParams, training: TrainConfig, *, batch_size: int,
    train: bool, samples: Path | None = None,
) -> Table:
    """The plan as a table for the terminal. Nothing is loaded or written; a GEMM is timed for half a second at most."""
    plan = make_plan(model, prompts, sampling, training, batch_size=batch_size, samples=samples)
    table = Table("", "", box=None, pad_edge=False, show_header=False)

    def row(name, value):
        table.add_row(name, value)

    row("model", f"{plan.parameters / 1e6:.1f} M parameters")
    row("completions", f"{plan.sequences}, at most {plan.new_tokens} tokens each")
    rate = gemm_rate(torch.bfloat16 if training.bf16 else torch.float32)
    if samples is None:
        row("memory to sample", _size(plan.sampling))
        row("  weights", _size(plan.weights))
        row(f"  KV cache, {plan.batch} sequences of {plan.length}", _size(plan.cache))
        row("disk for samples, at most", _size(plan.samples_on_disk))
        row("time to sample full completions (rough)", _time(plan.sampling_flops / rate / 0.3))
    if train:
        row("memory to train", _size(plan.training))
        for name in ("weights", "masters", "gradients", "adam", "activations", "workspace"):
            about = {"masters": "float32 master weights", "adam": "AdamW", "activations": "activations (estimate)",
                     "workspace": "loss workspace"}.get(name, name)
            row(f"  {about}", _size(getattr(plan, name)))
        row("disk for checkpoints", _size(plan.checkpoints_on_disk))
        row("disk for the model", _size(plan.weights))
        row("time to train (rough)", _time(plan.training_flops / rate / 0.5))
    row("measured for the times", f"{rate / 1e9:.0f} GFLOP/s")
    return table


def gemm_rate(dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a product of medium size, here and now."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(1024, 1024, device=device).to(dtype)
    (a @ a).sum().item()        # warm-up; the sum waits for an accelerator
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        (a @ a).sum().item()
        done += 1
    return done * 2 * 1024**3 / (time.perf_counter() - start)


def _size(number: int) -> str:
    return f"{number / GIB:.2f} GiB" if number >= GIB / 10 else f"{number / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 7200 else f"{seconds / 60:.1f} min"
