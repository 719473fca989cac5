"""The training loop, from top to bottom."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ssd_core import models
from ssd_core.files import AppendOnly
from ssd_core.models import NonFiniteError
from ssd_core.ops.linear_cross_entropy import linear_cross_entropy
from ssd_core.store import Completion
from ssd_core.train import checkpoint
from ssd_core.train.batches import collate, plan_steps
from ssd_core.train.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Progress:
    """Told after every step."""

    step: int
    total: int
    loss: float
    tokens: int     # of the sequences of this step, prompts included, padding not


def train(
    model, train_set: list[Completion], held_out: list[Completion], config: TrainConfig, out: Path, *,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Train ``model`` in place on ``train_set``; continues from the newest checkpoint under ``out``.

    Writes ``out/metrics.jsonl`` and ``out/checkpoints``. N steps in one go, or in any number of runs that were killed
    anywhere, give the same weights bit for bit on the same machine and thread count.
    """
    out.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    cast(model, config)
    model.train()
    if config.gradient_checkpointing:
        _recompute_activations(model, "enable")
    head = models.head(model)
    weights = MasterWeights(model)
    decayed = [p for p in weights.masters if p.ndim >= 2]
    others = [p for p in weights.masters if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon, fused=True)

    steps = plan_steps(train_set, config)
    torch.manual_seed(config.seed)
    first = _restore(out / "checkpoints", weights, optimizer)
    metrics = AppendOnly(out / "metrics.jsonl")
    metrics.keep(lambda line: line["step"] <= first)
    if first == 0 and held_out:
        metrics.keep(lambda line: False)
        metrics.append([_evaluate(model, head, held_out, config, 0)])

    for step, micro_batches in enumerate(steps[first:], first + 1):
        start = time.perf_counter()
        indices = [i for chosen in micro_batches for i in chosen]
        # the mean is over the tokens of the whole step, whatever the micro-batches
        tokens = sum(len(train_set[i].token_ids) for i in indices)
        loss = torch.zeros((), device=device)
        for chosen in micro_batches:
            batch = collate([train_set[i] for i in chosen], config.targets, device)
            part = _loss(model, head, batch, config, tokens)
            part.backward()
            weights.collect()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(weights.masters, config.max_grad_norm or torch.inf)
        if not (loss.isfinite() and norm.isfinite()):
            prompts = sorted({train_set[i].prompt_index for i in indices})
            raise NonFiniteError(
                f"step {step}: loss {loss.item()}, gradient norm {norm.item()}; the weights are untouched since step "
                f"{step - 1}; the batch holds completions of prompts {prompts}")
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step - 1, len(steps))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        weights.publish()

        seconds = time.perf_counter() - start
        seen = sum(len(train_set[i].prompt_ids) + len(train_set[i].token_ids) for i in indices)
        lines = [{
            "kind": "train", "step": step, "loss": loss.item(), "grad_norm": norm.item(),
            "learning_rate": optimizer.param_groups[0]["lr"], "tokens": tokens, "tokens_per_second": seen / seconds,
        }]
        last = step == len(steps)
        if held_out and (last or (config.eval_steps and step % config.eval_steps == 0)):
            lines.append(_evaluate(model, head, held_out, config, step))
        metrics.append(lines)
        if last or step % config.save_steps == 0:
            checkpoint.save(out / "checkpoints", step, _state(weights, optimizer), config.save_total_limit)
        on_step(Progress(step, len(steps), loss.item(), seen))
    if config.gradient_checkpointing:
        _recompute_activations(model, "disable")
    model.eval()


def cast(model, config: TrainConfig) -> None:
    """The parameters to the dtype that they are trained in: not model.to(), so that rotary frequencies stay in
    float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if config.bf16 else torch.float32)


def _recompute_activations(model, state: str) -> None:
    """"enable" or "disable" it, by transformers' new name or its old one."""
    new = getattr(model, f"activation_checkpointing_{state}", None)
    (new or getattr(model, f"gradient_checkpointing_{state}"))()


class MasterWeights:
    """float32 copies of 16-bit parameters: the optimizer works on them, the model on their rounded values.

    float32 parameters are their own masters.
    """

    def __init__(self, model):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self.masters = [
            p if p.dtype == torch.float32 else torch.nn.Parameter(p.detach().float()) for p in self.parameters]

    def collect(self) -> None:
        """Add the gradients of a micro-batch to the masters' float32 gradients."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)


def _loss(model, head, batch, config, tokens):
    hidden = models.body(model)(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    return linear_cross_entropy(
        hidden, head.weight, batch.target, linear_bias=head.bias, logit_scale=head.logit_scale, softcap=head.softcap,
        temperature=config.loss_temperature, num_items_in_batch=tokens,
        grad_filter=config.grad_filter if torch.is_grad_enabled() else 0.0)


@torch.no_grad()
def _evaluate(model, head, held_out, config, step) -> dict:
    """The loss of held-out samples, as in training, without dropout."""
    model.eval()
    device = next(model.parameters()).device
    ordered = sorted(held_out, key=lambda c: len(c.prompt_ids) + len(c.token_ids))
    size = config.per_device_train_batch_size
    batches = (collate(ordered[i : i + size], config.targets, device) for i in range(0, len(ordered), size))
    tokens = sum(len(c.token_ids) for c in held_out)
    loss = sum(_loss(model, head, batch, config, tokens).item() for batch in batches)
    model.train()
    return {"kind": "eval", "step": step, "loss": loss, "tokens": tokens}


def _state(weights: MasterWeights, optimizer) -> dict[str, torch.Tensor]:
    tensors = {"rng": torch.get_rng_state()}
    for device in range(torch.cuda.device_count()):
        tensors[f"rng.cuda.{device}"] = torch.cuda.get_rng_state(device)
    for name, master in zip(weights.names, weights.masters, strict=True):
        tensors[f"master.{name}"] = master.detach()
        for key, value in optimizer.state[master].items():
            tensors[f"{key}.{name}"] = value
    return tensors


def _restore(folder: Path, weights: MasterWeights, optimizer) -> int:
    """Take up the newest checkpoint; the number of steps done."""
    found = checkpoint.latest(folder)
    if found is None:
        return 0
    step, tensors = found
    torch.set_rng_state(tensors["rng"])
    for device in range(torch.cuda.device_count()):
        torch.cuda.set_rng_state(tensors[f"rng.cuda.{device}"], device)
    with torch.no_grad():
        for name, master in zip(weights.names, weights.masters, strict=True):
            master.copy_(tensors[f"master.{name}"])
            # a parameter that met no gradient yet (an idle expert) has no state
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
            optimizer.state[master] = {key: tensors[f"{key}.{name}"].to(master.device) for key in keys}
    weights.publish()
    return step
