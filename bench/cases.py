"""What is measured on: heads by name, with as many tokens as the machine can do."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import torch
from ssd_core.bench import states

from ssd_core.checks import UsageError

SUPPORT = 20        # ids of a sparse teacher
STEP = 64           # scaled token counts are its multiples


@dataclasses.dataclass(frozen=True)
class Head:
    vocab: int
    hidden: int
    softcap: float | None = None


HEADS = {
    "smollm2": Head(49152, 576),
    "llama-3.2-1b": Head(128256, 2048),
    "llama-3-8b": Head(128256, 4096),
    "qwen3-0.6b": Head(151936, 1024),
    "qwen2.5-7b": Head(152064, 3584),
    "gemma-2-2b": Head(256000, 2304, softcap=30.0),
    "gemma-3-1b": Head(262144, 1152),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """Hidden states, a head, and what the losses are taken against."""

    name: str
    about: str                      # where the inputs come from
    scaled: str                     # what was made smaller for this machine, or ""
    softcap: float | None
    input: torch.Tensor             # (N, D)
    weight: torch.Tensor            # (V, D)
    target: torch.Tensor            # (N,)
    ids: torch.Tensor               # (N, K) int32: a sparse teacher
    probs: torch.Tensor             # (N, K) float32, each row sums to 1
    teacher_input: torch.Tensor     # (N, D): a dense teacher's states, for the same head

    @property
    def tokens(self) -> int:
        return len(self.target)

    def to(self, dtype: torch.dtype, device: str) -> Case:
        floats = {name: getattr(self, name).to(device, dtype) for name in ("input", "weight", "teacher_input")}
        others = {name: getattr(self, name).to(device) for name in ("target", "ids", "probs")}
        return dataclasses.replace(self, **floats, **others)


def head(name: str) -> Head:
    """Of a name in HEADS, of ``smollm2@D`` (real states and head, embedded in D) or ``VxD`` (random)."""
    if name in HEADS:
        return HEADS[name]
    if match := re.fullmatch(r"smollm2@(\d+)", name):
        hidden, narrow = int(match[1]), HEADS["smollm2"].hidden
        if hidden >= narrow:
            return Head(HEADS["smollm2"].vocab, hidden)
        raise UsageError(f"cases: expected at least smollm2@{narrow}, got {name!r}")
    if match := re.fullmatch(r"(\d+)x(\d+)", name):
        return Head(int(match[1]), int(match[2]))
    raise UsageError(f"cases: expected {', '.join(HEADS)}, smollm2@D or VxD, got {name!r}")


def scale(tokens: int, cost: float, limit: float | None, unit: str) -> tuple[int, str]:
    """Tokens of ``cost`` each that keep within ``limit``: a multiple of 64, at least 64; and a sentence on it."""
    if limit is None or tokens * cost <= limit:
        return tokens, ""
    fewer = min(tokens, max(STEP, int(limit / cost) // STEP * STEP))
    return fewer, f"N {tokens} -> {fewer}: at most {limit:.0e} {unit}, multiples of {STEP}; V and D as they are"


def find(name: str, tokens: int, cache: Path, scaled: str = "") -> Case:
    """The case in float32 on the CPU. Same name and tokens, same numbers."""
    found = head(name)
    if name.startswith("smollm2"):
        tensors, about = states.real(tokens, cache), states.ABOUT
        if name != "smollm2":
            tensors = states.embed(tensors, found.hidden)
            about += f", embedded in D = {found.hidden} by an orthonormal map (same logits)"
    else:
        tensors, about = _random(tokens, found), "random: normal states and weights"
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(tensors["input"].shape, generator=generator) * tensors["input"].std()
    return Case(name, about, scaled, found.softcap, teacher_input=tensors["input"] + 0.3 * noise, **tensors)


def _random(tokens: int, head: Head) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocab, hidden, support = head.vocab, head.hidden, min(SUPPORT, head.vocab)
    target = torch.randint(vocab, (tokens,), generator=generator)
    ids = (target.unsqueeze(1) + torch.arange(support) * (vocab // support)) % vocab       # distinct
    return {
        "input": torch.randn(tokens, hidden, generator=generator),
        "weight": torch.randn(vocab, hidden, generator=generator).mul_(4 / hidden**0.5),
        "target": target,
        "ids": ids.int(),
        "probs": (2 * torch.randn(tokens, support, generator=generator)).softmax(-1),
    }
