"""From completions to the micro-batches of every optimizer step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch

from ssd_core.checks import UsageError
from ssd_core.store import Completion
from ssd_core.targets import SparseTarget
from ssd_core.train.config import TrainConfig

IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of the completions."""

    completions: int
    empty: int          # nothing but white space: dropped
    truncated: int      # cut by the length limit
    dropped: int        # empty ones, and truncated ones if so configured
    trained: int
    held_out: int


def select(completions: Iterable[Completion], config: TrainConfig) -> tuple[list[Completion], list[Completion], Counts]:
    """``(train, held out, counts)``. Prompts are held out whole, evenly spread over their order."""
    completions = list(completions)
    empty = [c for c in completions if not c.text.strip()]
    truncated = [c for c in completions if c.finish_reason == "length"]
    keep = [c for c in completions if c.text.strip() and not (config.drop_truncated and c.finish_reason == "length")]
    if not keep:
        raise UsageError(
            f"samples: none left to train on, of {len(completions)}: {len(empty)} empty, {len(truncated)} truncated")
    prompts = sorted({c.prompt_index for c in keep})
    count = math.ceil(config.eval_fraction * len(prompts)) if len(prompts) > 1 else 0
    held = {prompts[(2 * i + 1) * len(prompts) // (2 * count)] for i in range(count)}
    train = [c for c in keep if c.prompt_index not in held]
    held_out = [c for c in keep if c.prompt_index in held]
    dropped = len(completions) - len(keep)
    return train, held_out, Counts(
        len(completions), len(empty), len(truncated), dropped, len(train), len(held_out))


def plan_steps(completions: list[Completion], config: TrainConfig) -> list[list[list[int]]]:
    """For each optimizer step its micro-batches, as indices into ``completions``: a pure function of its arguments.

    Every epoch has an order of its own. Within a step, sequences are sorted by length so that little is padded.
    """
    lengths = [len(c.prompt_ids) + len(c.token_ids) for c in completions]
    generator = torch.Generator().manual_seed(config.seed)
    steps: list[list[list[int]]] = []
    total = None
    epoch_steps = 0
    while total is None or len(steps) < total:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        for chosen in _fill(order, lengths, config):
            chosen.sort(key=lambda i: -lengths[i])
            size = config.per_device_train_batch_size
            steps.append([chosen[i : i + size] for i in range(0, len(chosen), size)])
        epoch_steps = epoch_steps or len(steps)
        total = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * epoch_steps)
    return steps[:total]


def _fill(order: list[int], lengths: list[int], config: TrainConfig) -> list[list[int]]:
    if not config.tokens_per_step:
        size = config.per_device_train_batch_size * config.gradient_accumulation_steps
        return [order[i : i + size] for i in range(0, len(order), size)]
    steps, tokens = [[]], 0
    for i in order:
        if steps[-1] and tokens + lengths[i] > config.tokens_per_step:
            steps.append([])
            tokens = 0
        steps[-1].append(i)
        tokens += lengths[i]
    return steps


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """B sequences of T tokens, padded on the right. Position t predicts token t + 1; only completion tokens count."""

    input_ids: torch.Tensor                 # (B, T) int64
    target: torch.Tensor | SparseTarget     # (B, T)
    tokens: int                             # that count


def collate(completions: list[Completion], targets: str, device: torch.device) -> Batch:
    """Padding is told by position, never by id, so that the end-of-sequence token is trained even where it pads.

    No attention mask is needed: a causal model's outputs at real tokens do not see padding to their right.
    """
    length = max(len(c.prompt_ids) + len(c.token_ids) for c in completions)
    ids = torch.zeros(len(completions), length, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for row, c in enumerate(completions):
        start, stop = len(c.prompt_ids), len(c.prompt_ids) + len(c.token_ids)
        ids[row, :stop] = torch.tensor(c.prompt_ids + c.token_ids)
        labels[row, start - 1 : stop - 1] = ids[row, start:stop]
    target: torch.Tensor | SparseTarget = labels
    if targets == "soft":
        width = max(c.support.ids.shape[1] for c in completions)
        support = torch.zeros(*ids.shape, width, dtype=torch.int32)
        probs = torch.zeros(*ids.shape, width)
        for row, c in enumerate(completions):
            part = slice(len(c.prompt_ids) - 1, len(c.prompt_ids) + len(c.token_ids) - 1)
            support[row, part, : c.support.ids.shape[1]] = c.support.ids
            probs[row, part, : c.support.ids.shape[1]] = c.support.probs
        target = SparseTarget(support, probs)
    tokens = sum(len(c.token_ids) for c in completions)
    return Batch(ids.to(device), target.to(device), tokens)
