"""``sample``: one token per row of logits, the same whatever the batch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ssd_core import backends, checks
from ssd_core.sampling_params import SUPPORT_LIMIT, SamplingParams
from ssd_core.targets import SparseTarget


class Sample(NamedTuple):
    """A draw per row of (B, V) logits; log-probabilities and entropy in nats."""

    token: torch.Tensor             # (B,) int64
    logprob: torch.Tensor           # (B,) of the token at temperature 1, over the whole vocabulary
    sampling_logprob: torch.Tensor  # (B,) of the token in the truncated, tempered distribution
    kept_mass: torch.Tensor         # (B,) of the kept tokens at the sampling temperature
    entropy: torch.Tensor           # (B,) of the model's distribution at temperature 1
    support: SparseTarget           # (B, K) the sampling distribution, K <= 64


def sample(
    logits: torch.Tensor, params: SamplingParams, seeds: torch.Tensor, positions: torch.Tensor, *,
    backend: str = "auto",
) -> Sample:
    """Draw one token per row. Without truncation it draws from the same distribution as::

        torch.multinomial(torch.softmax(logits / params.temperature, -1), 1)

    The noise is a function of (seed, position, token id) alone, so equal logits give equal tokens in any batch.

    Args:
        logits: (B, V) floating point, read as float32; -inf excludes a token.
        params: temperature, top_k, top_p and min_p are used, in that order.
        seeds: (B,) int64, one per sequence (any 64 bits).
        positions: (B,) int64, the place of the token in its sequence.

    Raises:
        ValueError: a NaN or +inf among the logits, or a row of -inf alone; an argument that does not fit.
    """
    checks.expect_type(logits, "logits", torch.Tensor, "a tensor")
    fits = logits.ndim == 2 and logits.is_floating_point() and logits.numel() > 0
    checks.expect(fits, "logits", "floating point (B, V)", logits)
    checks.expect_type(params, "params", SamplingParams, "SamplingParams")
    for name, tensor in (("seeds", seeds), ("positions", positions)):
        checks.expect_type(tensor, name, torch.Tensor, "a tensor")
        fits = (tensor.dtype, tensor.shape, tensor.device) == (torch.int64, logits.shape[:1], logits.device)
        checks.expect(fits, name, lambda: f"int64 ({logits.shape[0]},) on {logits.device}", tensor)
    function = backends.resolve("sample", logits.device, logits.dtype, backend)
    *draw, ids, probs = function(
        logits.detach(), seeds, positions, temperature=params.temperature, top_k=min(params.top_k, logits.shape[1]),
        top_p=params.top_p, min_p=params.min_p, support_limit=SUPPORT_LIMIT)
    return Sample(*draw, SparseTarget(ids, probs))
