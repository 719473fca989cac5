"""What we need to know of a transformers causal language model."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from ssd_core.checks import UsageError


class NonFiniteError(ArithmeticError):
    """NaN or infinity where a finite number is needed: weights, logits, a loss."""


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """The map from hidden states to logits: ``softcap * tanh(logit_scale * linear(h) / softcap)``."""

    weight: torch.Tensor            # (V, D)
    bias: torch.Tensor | None       # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None


def local_folder(path: str | Path) -> Path | None:
    """The folder that ``path`` names, if it looks like one; None for a name that only transformers can resolve."""
    folder = Path(path).expanduser()
    if not (folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1):
        return None
    if not folder.is_dir():
        raise UsageError(f"model: expected a folder that from_pretrained loads, got {str(path)!r} (no such folder)")
    if not (folder / "config.json").exists():
        raise UsageError(f"model: {folder} holds no config.json: not a folder that save_pretrained wrote")
    return folder


def load_model(path: str | Path, dtype: torch.dtype):
    """``(model, tokenizer)`` from a local folder (or a name that transformers resolves). All weights must be there, and
    finite."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = local_folder(path) or path
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, found = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"model: {path} cannot be loaded: {error}") from error
    if found["missing_keys"]:       # transformers fills them with random numbers
        missing = sorted(found["missing_keys"])
        raise UsageError(f"model: {path} lacks {len(missing)} of the weights, such as {missing[0]}")
    check_finite(model)
    return model.eval(), tokenizer


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """``model.eval()`` inside; afterwards each module is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_finite(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise NonFiniteError(f"model: the weights hold NaN or infinity, first in {name}")


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of dtypes, shapes and sampled values of all weights: tells one model's samples from another's."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // 4096)].float().cpu()
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} ".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def context_length(model) -> int | None:
    """The most tokens that a sequence may have, if the model says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def eos_token_ids(model, tokenizer) -> list[int]:
    """Every id that ends a sequence: the generation config may name more than the tokenizer does."""
    found = {tokenizer.eos_token_id}
    for config in (getattr(model, "generation_config", None), model.config):
        ids = getattr(config, "eos_token_id", None)
        found.update(ids if isinstance(ids, (list, tuple)) else [ids])
    found.discard(None)
    if not found:
        raise UsageError("tokenizer: expected an end-of-sequence token, got none: set tokenizer.eos_token")
    return sorted(found)


def body(model) -> torch.nn.Module:
    """The model without its head: ``body(model)(input_ids).last_hidden_state``."""
    return model.base_model


def head(model) -> Head:
    """The head, with the logit scale and softcap that the model applies; checked against the model's own logits."""
    layer = model.get_output_embeddings()
    if layer is None or body(model) is model:
        raise UsageError(f"model: expected a causal language model of transformers, got {type(model).__name__}")
    # an adapter on the head: a fresh one changes no logits, and would get no gradient
    own = layer.weight, getattr(layer, "bias", None)
    others = [name for name, parameter in layer.named_parameters() if all(parameter is not t for t in own)]
    if others:
        raise UsageError(
            f"model: expected a head of a weight and a bias, got one with {', '.join(others)} too: merge it first")
    config = model.config.get_text_config()
    logit_scale = getattr(config, "logit_scale", None) or 1.0                  # Cohere
    if getattr(config, "logits_scaling", None):                                # Granite
        logit_scale = logit_scale / config.logits_scaling
    found = Head(*own, logit_scale, getattr(config, "final_logit_softcapping", None))      # Gemma 2
    _check_head(model, found)
    return found


@torch.no_grad()
def _check_head(model, found: Head) -> None:
    ids = torch.arange(4, device=found.weight.device).remainder(found.weight.shape[0]).unsqueeze(0)
    with evaluating(model):
        expected = model(input_ids=ids, use_cache=False).logits.float()
        hidden = body(model)(input_ids=ids, use_cache=False).last_hidden_state
    logits = found.logit_scale * torch.nn.functional.linear(hidden, found.weight, found.bias).float()
    if found.softcap is not None:
        logits = found.softcap * torch.tanh(logits / found.softcap)
    tolerance = 2e-2 if found.weight.dtype != torch.float32 else 1e-4
    error = (logits - expected).norm() / expected.norm()
    if not error <= tolerance:
        raise UsageError(
            f"model: {type(model).__name__} does not compute its logits as softcap * tanh(scale * linear(hidden)): "
            f"ours differ by {error:.1e}, so its loss cannot be fused")
