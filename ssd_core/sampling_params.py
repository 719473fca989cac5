"""How tokens are drawn."""

from __future__ import annotations

import dataclasses
import math

from ssd_core.checks import expect, in_range

SUPPORT_LIMIT = 64  # K: the most ids that a recorded soft target holds


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Temperature, then top-k, then top-p on the renormalised survivors of top-k, then min-p; then one draw.

    The defaults draw from the model's own distribution. Nothing is taken from a model's ``generation_config``.
    """

    temperature: float = dataclasses.field(default=1.0, metadata={"help": "0 is greedy: the lowest id wins ties"})
    top_k: int = dataclasses.field(default=0, metadata={"help": "keep exactly the k most likely tokens; 0 keeps all"})
    top_p: float = dataclasses.field(default=1.0, metadata={"help": "keep the fewest tokens that reach this mass"})
    min_p: float = dataclasses.field(default=0.0, metadata={"help": "drop tokens below this share of the likeliest"})
    max_new_tokens: int = dataclasses.field(default=512, metadata={"help": "length limit of a completion, in tokens"})
    min_new_tokens: int = dataclasses.field(default=0, metadata={"help": "no end-of-sequence before this many tokens"})
    num_return_sequences: int = dataclasses.field(default=1, metadata={"help": "completions per prompt"})
    stop_strings: tuple[str, ...] = dataclasses.field(default=(), metadata={"help": "end a completion at this text"})
    repetition_penalty: float = dataclasses.field(default=1.0, metadata={"help": "divide the logits of seen tokens"})
    seed: int = dataclasses.field(default=0, metadata={"help": "seed of every draw"})

    def __post_init__(self) -> None:
        stops = (self.stop_strings,) if isinstance(self.stop_strings, str) else tuple(self.stop_strings)
        object.__setattr__(self, "stop_strings", stops)
        for name in ("top_k", "max_new_tokens", "min_new_tokens", "num_return_sequences", "seed"):
            value = getattr(self, name)
            expect(isinstance(value, int), name, "a whole number", repr(value))
        finite = math.isfinite(self.temperature) and self.temperature >= 0
        expect(finite, "temperature", "a finite number, at least 0", self.temperature)
        expect(self.top_k >= 0, "top_k", "a whole number, at least 0", self.top_k)
        expect(0 < self.top_p <= 1, "top_p", "a number in (0, 1]", self.top_p)
        in_range(self.min_p, "min_p", 0, 1)
        expect(self.max_new_tokens >= 1, "max_new_tokens", "at least 1", self.max_new_tokens)
        most = self.max_new_tokens
        expect(0 <= self.min_new_tokens <= most, "min_new_tokens", f"a number in [0, {most}]", self.min_new_tokens)
        expect(self.num_return_sequences >= 1, "num_return_sequences", "at least 1", self.num_return_sequences)
        penalty = math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0
        expect(penalty, "repetition_penalty", "a finite number above 0", self.repetition_penalty)
        expect(all(self.stop_strings), "stop_strings", "texts that are not empty", self.stop_strings)
        expect(0 <= self.seed < 2**63, "seed", "a whole number in [0, 2**63)", self.seed)
