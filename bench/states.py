"""Real inputs: hidden states of SmolLM2-135M-Instruct on its own samples.

The samples are drawn as the demo draws them: the demo's prompts in the chat template, temperature 0.8, top-k 20. What
the cache lacks is drawn, a part of the prompts at a time.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

ABOUT = "real: SmolLM2-135M-Instruct on its own samples (T=0.8, top-k 20), targets drawn"
PART = 16           # prompts a part
LENGTH = 256        # longest completion, in tokens


def real(tokens: int, cache: Path) -> dict[str, torch.Tensor]:
    """``input`` (N, 576), ``weight`` (49152, 576), ``target`` (N,) the drawn tokens, ``ids`` and ``probs`` (N, 20) the
    distributions that they were drawn from. float32."""
    folder = cache / "smollm2-own-samples"
    folder.mkdir(parents=True, exist_ok=True)
    model, parts, count = None, [], 0
    while count < tokens:
        file = folder / f"part-{len(parts):03d}.pt"
        if not file.exists():
            model = model or _load(cache)
            _save(_draw(*model, len(parts)), file)
        parts.append(torch.load(file))
        count += len(parts[-1]["target"])
    found = {name: torch.cat([part[name] for part in parts])[:tokens] for name in parts[0]}
    head = folder / "head.pt"
    if not head.exists():
        model = model or _load(cache)
        _save({"weight": model[0].lm_head.weight.detach().cpu().clone()}, head)
    return {**found, **torch.load(head)}


def embed(found: dict[str, torch.Tensor], hidden: int) -> dict[str, torch.Tensor]:
    """The same logits in a wider head: states and weight times one random orthonormal (576, hidden)."""
    narrow = found["input"].shape[1]
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(hidden, narrow, generator=generator, dtype=torch.float64))[0].T.float()
    return {**found, "input": found["input"] @ basis, "weight": found["weight"] @ basis}


def _load(cache: Path):
    from ssd_core.data import smollm2
    from ssd_core.models import load_model

    model, tokenizer = load_model(smollm2.convert(cache / "SmolLM2-135M-Instruct"), torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


@torch.no_grad()
def _draw(model, tokenizer, part: int) -> dict[str, torch.Tensor]:
    from ssd_core import Sampler, SamplingParams
    from ssd_core.prompts import for_chat, load_prompts

    prompts, _ = for_chat(load_prompts("demo"), tokenizer)
    start = part * PART
    params = SamplingParams(temperature=0.8, top_k=20, max_new_tokens=LENGTH)
    sampler = Sampler(model, tokenizer, params, batch_size=PART)
    some = [prompts[i % len(prompts)] for i in range(start, start + PART)]
    rows = {"input": [], "target": [], "ids": [], "probs": []}
    for completion in sampler.generate(some, round=start // len(prompts), purpose="bench"):
        ids = torch.tensor([[*completion.prompt_ids, *completion.token_ids]], device=model.device)
        hidden = model.model(ids[:, :-1]).last_hidden_state[0, len(completion.prompt_ids) - 1 :].cpu()
        unused = 20 - completion.support.ids.shape[1]
        rows["input"].append(hidden)
        rows["target"].append(torch.tensor(completion.token_ids))
        rows["ids"].append(torch.nn.functional.pad(completion.support.ids, (0, unused)))
        rows["probs"].append(torch.nn.functional.pad(completion.support.probs, (0, unused)))
    return {name: torch.cat(tensors) for name, tensors in rows.items()}


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    temporary = file.with_suffix(f".{os.getpid()}")      # another process may draw the same part
    torch.save(tensors, temporary)
    os.replace(temporary, file)
