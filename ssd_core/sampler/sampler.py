"""Decoding in fixed groups: which prompts share a batch depends on the prompts and the batch size alone, so that a
restart meets the same batches and draws the same tokens."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from ssd_core import models
from ssd_core.checks import UsageError, expect
from ssd_core.models import NonFiniteError
from ssd_core.ops.sample import Sample, sample
from ssd_core.sampler.cache import new_cache
from ssd_core.sampling_params import SUPPORT_LIMIT, SamplingParams
from ssd_core.store import STATISTICS, Completion
from ssd_core.targets import SparseTarget


@dataclasses.dataclass(frozen=True)
class Request:
    """One completion to draw."""

    prompt_index: int
    sample_index: int
    prompt_ids: tuple[int, ...]
    seed: int


class Sampler:
    """Draws completions: ``for completion in Sampler(model, tokenizer, params).generate(prompts): ...``

    ``model`` is a transformers causal language model, in any dtype, on any device; ``batch_size`` sequences are decoded
    together. The same prompts, parameters, batch size and device give the same tokens, also when only the groups
    that are missing are drawn.
    """

    def __init__(self, model, tokenizer, params: SamplingParams, *, batch_size: int = 32):
        expect(batch_size >= 1, "batch_size", "at least 1", batch_size)
        self.model, self.tokenizer, self.params, self.batch_size = model, tokenizer, params, batch_size
        self.device = next(model.parameters()).device
        self.eos = torch.tensor(models.eos_token_ids(model, tokenizer), device=self.device)

    def generate(self, prompts: Iterable, **options) -> Iterator[Completion]:
        """Completions of ``prompts``: strings (used as they are), message lists (the chat template is applied) or
        token ids. They come group by group, short prompts first; ``prompt_index`` and ``sample_index`` tell them apart.
        Options: those of ``groups``.
        """
        for group in self.groups(prompts, **options):
            yield from group

    def groups(
        self, prompts: Iterable, *, round: int = 0, purpose: str = "sample", skip: int = 0,
        on_step: Callable[[int, int], None] = lambda drawn, finished: None,
    ) -> Iterator[list[Completion]]:
        """The same in lists of up to ``batch_size`` completions. ``skip`` leaves out that many groups; ``on_step`` is
        called with the number of tokens that each step drew and of completions that it finished; ``round`` and
        ``purpose`` enter the seeds.
        """
        for requests in self.plan(prompts, round=round, purpose=purpose)[skip:]:
            with models.evaluating(self.model):
                completions = self._decode(requests, on_step)
            yield completions

    def plan(self, prompts: Iterable, *, round: int = 0, purpose: str = "sample") -> list[list[Request]]:
        """The groups to come: requests sorted by prompt length, ``batch_size`` at a time."""
        context = models.context_length(self.model)
        vocab = self.model.get_input_embeddings().weight.shape[0]
        samples = self.params.num_return_sequences
        times: collections.Counter[tuple[int, ...]] = collections.Counter()     # that a prompt was met before
        requests = []
        for index, prompt in enumerate(prompts):
            ids = tuple(self.encode(prompt))
            if not ids:
                raise UsageError(f"prompts[{index}]: expected at least one token, got none")
            if context is not None and len(ids) >= context:
                raise UsageError(f"prompts[{index}]: expected less than the context's {context} tokens, got {len(ids)}")
            if not 0 <= min(ids) <= max(ids) < vocab:
                raise UsageError(f"prompts[{index}]: expected ids in [0, {vocab}), got {min(ids)} to {max(ids)}")
            for s in range(samples):
                seed = sequence_seed(self.params.seed, round, purpose, ids, times[ids] * samples + s)
                requests.append(Request(index, s, ids, seed))
            times[ids] += 1
        requests.sort(key=lambda request: len(request.prompt_ids))
        return [requests[i : i + self.batch_size] for i in range(0, len(requests), self.batch_size)]

    def encode(self, prompt: str | Sequence) -> list[int]:
        """Token ids of a string, of messages, or of what is ids already."""
        if isinstance(prompt, str):
            return self.tokenizer(prompt).input_ids
        prompt = list(prompt)
        if prompt and isinstance(prompt[0], dict):
            return self.tokenizer.apply_chat_template(
                prompt, tokenize=True, add_generation_prompt=True, return_dict=False)
        return [int(token) for token in prompt]

    @torch.no_grad()
    def _decode(self, requests: list[Request], on_step) -> list[Completion]:
        limits = [self._length_limit(request) for request in requests]
        logits, cache, mask = self._prefill(requests, max(limits))
        records = Records(len(requests), max(limits), self.params.top_k)
        seeds = torch.tensor([request.seed for request in requests], device=self.device)
        live = list(range(len(requests)))               # the request in each row of the batch
        lengths = mask.sum(-1)                          # (B,) tokens of each row so far
        seen = self._seen(requests, logits.shape[-1])
        for position in range(max(limits)):
            logits = self._adjust(logits, position, seen)
            drawn = self._draw(logits, seeds, position, requests, live)
            records.write(live, position, drawn)
            finished = torch.isin(drawn.token, self.eos).tolist()
            for row, request in enumerate(live):
                finished[row] = (
                    finished[row] or position + 1 == limits[request] or self._stopped(records.tokens(request)))
            keep = self._survivors(finished)
            on_step(len(live), len(live) - len(keep))
            if not keep:
                break
            token = drawn.token
            if seen is not None:
                seen.scatter_(1, token.unsqueeze(1), True)
            if len(keep) < len(live):                   # finished rows are not decoded any further
                rows = torch.tensor(keep, device=self.device)
                cache.batch_select_indices(rows)
                token, seeds, lengths, mask = token[rows], seeds[rows], lengths[rows], mask[rows]
                seen = None if seen is None else seen[rows]
                live = [live[row] for row in keep]
            mask = torch.cat((mask, mask.new_ones(len(live), 1)), 1)
            output = self.model(
                input_ids=token.unsqueeze(1), attention_mask=mask, position_ids=lengths.unsqueeze(1),
                past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits = output.logits[:, -1]
            lengths = lengths + 1
        return [self._completion(request, records, i) for i, request in enumerate(requests)]

    def _prefill(self, requests, room):
        """Logits after the prompts (B, V), a cache with room for that many tokens more, and the mask (B, T) of
        left-padded prompts. A prompt of several samples is computed once."""
        prompts = list(dict.fromkeys(request.prompt_ids for request in requests))
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        cache = new_cache(self.model.config, room)
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
            past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1]
        if len(prompts) < len(requests):
            rows = torch.tensor([prompts.index(request.prompt_ids) for request in requests], device=self.device)
            cache.batch_select_indices(rows)
            logits, mask = logits[rows], mask[rows]
        return logits, cache, mask

    def _length_limit(self, request: Request) -> int:
        context = models.context_length(self.model)
        most = self.params.max_new_tokens
        return most if context is None else min(most, context - len(request.prompt_ids))

    def _seen(self, requests, vocab):
        """(B, V) which ids each sequence holds, if the repetition penalty asks for it."""
        if self.params.repetition_penalty == 1:
            return None
        seen = torch.zeros(len(requests), vocab, dtype=torch.bool, device=self.device)
        for row, request in enumerate(requests):
            seen[row, torch.tensor(request.prompt_ids, device=self.device)] = True
        return seen

    def _adjust(self, logits, position, seen):
        if seen is not None:
            penalty, logits = self.params.repetition_penalty, logits.float()
            logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if position < self.params.min_new_tokens:
            logits = logits.index_fill(1, self.eos, -torch.inf)
        return logits

    def _draw(self, logits, seeds, position, requests, live) -> Sample:
        positions = torch.full_like(seeds, position)
        try:
            return sample(logits, self.params, seeds, positions)
        except ValueError as error:
            bad = (~logits.float().logsumexp(-1).isfinite()).nonzero().flatten().tolist()
            if not bad:
                raise
            prompts = sorted({requests[live[row]].prompt_index for row in bad})
            raise NonFiniteError(f"the model's logits are not finite after prompt {prompts}: {error}") from None

    def _stopped(self, tokens: list[int]) -> bool:
        """Whether the last token completed a stop string. Only so much text is decoded as can hold it."""
        if not self.params.stop_strings:
            return False
        length = max(map(len, self.params.stop_strings)) + 64       # a last token may be long
        count = length // 2
        while True:
            tail = self._text(tokens[-count:])
            # U+FFFD: perhaps it begins within a character, and a tokenizer may give up on all bytes in a row with it
            if count >= len(tokens) or (len(tail) >= length and not tail.startswith("\ufffd")):
                return any(stop in tail for stop in self.params.stop_strings)
            count *= 2

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @staticmethod
    def _survivors(finished: list[bool]) -> list[int]:
        """Rows that go on; the last ones fill the places of those that finished, so that few are moved."""
        count = finished.count(False)
        tail = [row for row in range(count, len(finished)) if not finished[row]]
        return [tail.pop() if finished[row] else row for row in range(count)]

    def _completion(self, request: Request, records: Records, row: int) -> Completion:
        tokens = records.tokens(row)
        ended = tokens[-1] in self.eos.tolist()
        text = self._text(tokens[:-1] if ended else tokens)     # not every tokenizer knows that it is special
        cuts = [place for place in (text.find(stop) for stop in self.params.stop_strings) if place >= 0]
        return Completion(
            prompt_index=request.prompt_index, sample_index=request.sample_index, prompt_ids=list(request.prompt_ids),
            token_ids=tokens, text=text[: min(cuts, default=None)],
            finish_reason="stop" if ended or cuts else "length",
            support=records.support(row), **records.statistics(row))


class Records:
    """What each step drew, (requests, limit) on the CPU. Memory is touched only as far as completions get."""

    def __init__(self, count: int, limit: int, top_k: int):
        self.width = min(top_k or SUPPORT_LIMIT, SUPPORT_LIMIT)
        self.length = [0] * count
        self.token = torch.empty(count, limit, dtype=torch.int64)
        self.ids = torch.empty(count, limit, self.width, dtype=torch.int32)
        self.probs = torch.empty(count, limit, self.width)
        self.stats = {name: torch.empty(count, limit) for name in STATISTICS}

    def write(self, requests: list[int], position: int, drawn: Sample) -> None:
        unused = self.width - drawn.support.ids.shape[1]
        self.token[requests, position] = drawn.token.cpu()
        self.ids[requests, position] = torch.nn.functional.pad(drawn.support.ids.cpu(), (0, unused))
        self.probs[requests, position] = torch.nn.functional.pad(drawn.support.probs.cpu(), (0, unused))
        for name, values in self.stats.items():
            values[requests, position] = getattr(drawn, name).cpu()
        for request in requests:
            self.length[request] = position + 1

    def tokens(self, request: int) -> list[int]:
        return self.token[request, : self.length[request]].tolist()

    def support(self, request: int) -> SparseTarget:
        length = self.length[request]
        width = int((self.probs[request, :length] > 0).sum(-1).max())
        return SparseTarget(self.ids[request, :length, :width].clone(), self.probs[request, :length, :width].clone())

    def statistics(self, request: int) -> dict[str, torch.Tensor]:
        return {name: values[request, : self.length[request]].clone() for name, values in self.stats.items()}


def sequence_seed(run_seed: int, round: int, purpose: str, prompt_ids: Sequence[int], sample_index: int) -> int:
    """64 bits, as a signed integer, that no other sequence of the run shares: a hash of all that tells it apart."""
    prompt = hashlib.blake2b(",".join(map(str, prompt_ids)).encode()).hexdigest()
    key = f"{run_seed}/{round}/{purpose}/{prompt}/{sample_index}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)
