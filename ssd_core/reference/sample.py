"""Drawing one token in NumPy, row by row, in float64: every other backend draws the same tokens.

The draw is Gumbel-max with noise that depends on nothing but the sequence's seed, the position and the token id:
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

WORD = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)
SLACK = 1e-12   # of top_p: where tied tokens reach p exactly, the order in which a sum was taken must not decide


class Draw(NamedTuple):
    """One row's draw; log-probabilities and entropy in nats."""

    token: int
    logprob: float              # of the token at temperature 1, over the whole vocabulary
    sampling_logprob: float     # of the token in the distribution that it was drawn from
    kept_mass: float            # of the kept tokens at the sampling temperature, before truncation
    entropy: float              # of the model's distribution at temperature 1, over the whole vocabulary
    ids: np.ndarray             # (k,) the recorded support, likeliest first
    probs: np.ndarray           # (k,)


def philox4x32(counter: list, key: list, rounds: int = 10) -> list:
    """Four 32-bit words from four 32-bit counter words and two key words (uint64 arrays or scalars)."""
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = (np.asarray(word, dtype=np.uint64) for word in key)
    for _ in range(rounds):
        p0 = np.uint64(0xD2511F53) * c0
        p1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> SHIFT) ^ c1 ^ k0, p1 & WORD, (p0 >> SHIFT) ^ c3 ^ k1, p0 & WORD
        k0 = (k0 + np.uint64(0x9E3779B9)) & WORD
        k1 = (k1 + np.uint64(0xBB67AE85)) & WORD
    return [c0, c1, c2, c3]


def exponential(seed: int, position: int, ids: np.ndarray) -> np.ndarray:
    """Exp(1) noise of each token id, float64: ``-log1p(-v)`` with v = (x + 1/2) 2^-64 and x a 64-bit Philox output.

    Small values decide who wins, and v resolves them down to 2^-65; the largest v rounds to 1 and is kept below it.
    """
    seed, position = seed % 2**64, position % 2**64
    ids = ids.astype(np.uint64)
    key = [seed & 0xFFFFFFFF, seed >> 32]
    low, high, *_ = philox4x32([position & 0xFFFFFFFF, position >> 32, ids & WORD, ids >> SHIFT], key)
    v = high.astype(np.float64) * 2.0**-32 + (low.astype(np.float64) + 0.5) * 2.0**-64
    return -np.log1p(-np.minimum(v, 1 - 2.0**-53))


def sample(
    logits: np.ndarray, seed: int, position: int, *, temperature: float, top_k: int, top_p: float, min_p: float,
    support_limit: int,
) -> Draw:
    """Draw from (V,) logits: temperature, top-k, top-p on the renormalised survivors, min-p, one draw.

    Order among tokens is (logit descending, id ascending). top-p keeps the token that crosses p; one token is always
    kept. Support: ids and probabilities of the kept tokens; if there are more than ``support_limit``, the heaviest
    ones renormalised when the drawn token is among them, else the drawn token alone. Either way its expectation over
    the draw is the sampling distribution.
    """
    z = np.asarray(logits, dtype=np.float64)
    if np.isnan(z).any() or not np.isfinite(z.max()):
        raise ValueError("logits: expected finite values or -inf, with a finite maximum, got NaN or inf")
    order = np.lexsort((np.arange(len(z)), -z))
    log_p = z - z.max() - np.log(np.exp(z - z.max()).sum())
    p = np.exp(log_p)
    entropy = -(p[p > 0] * log_p[p > 0]).sum()
    if temperature == 0:
        token = int(order[0])
        return Draw(token, log_p[token], 0.0, 1.0, entropy, np.array([token]), np.array([1.0]))

    tempered = (z - z.max()) / temperature
    weights = np.exp(tempered)[order]                   # sorted, unnormalised
    total = weights.sum()
    kept = weights[:top_k] if top_k else weights
    share = kept / kept.sum()
    before = np.cumsum(share) - share                   # mass of the tokens ahead
    keep = (share >= min_p * share[0]) & (kept > 0)
    if top_p < 1:
        keep &= before < top_p - SLACK
    keep[0] = True
    ids, kept = order[: len(keep)][keep], kept[: len(keep)][keep]
    probs = kept / kept.sum()

    by_id = np.sort(ids)
    score = tempered[by_id] - np.log(exponential(seed, position, by_id))
    token = int(by_id[np.argmax(score)])
    place = int(np.flatnonzero(ids == token)[0])
    sampling_logprob = np.log(probs[place])
    if len(ids) > support_limit:
        if place < support_limit:
            ids, probs = ids[:support_limit], probs[:support_limit] / probs[:support_limit].sum()
        else:
            ids, probs = np.array([token]), np.array([1.0])
    return Draw(token, log_p[token], sampling_logprob, kept.sum() / total, entropy, ids, probs)


def run(logits, seeds, positions, **options):
    """The definition behind the interface of the backends of this op: see ``chunked.sample``."""
    import torch

    draws = [
        sample(row, int(seed), int(position), **options)
        for row, seed, position in zip(logits.float().numpy(), seeds.tolist(), positions.tolist(), strict=True)
    ]
    width = max(len(draw.ids) for draw in draws)
    ids = torch.zeros(len(draws), width, dtype=torch.int32)
    probs = torch.zeros(len(draws), width)
    for i, draw in enumerate(draws):
        ids[i, : len(draw.ids)] = torch.from_numpy(draw.ids)
        probs[i, : len(draw.ids)] = torch.from_numpy(draw.probs)
    token = torch.tensor([draw.token for draw in draws])
    stats = (torch.tensor([getattr(draw, name) for draw in draws], dtype=torch.float32)
             for name in ("logprob", "sampling_logprob", "kept_mass", "entropy"))
    return token, *stats, ids, probs
