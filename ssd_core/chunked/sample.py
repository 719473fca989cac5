"""Drawing one token per row: the k largest are selected first, and only the survivors meet a softmax and noise."""

from __future__ import annotations

import torch

WORD = 0xFFFFFFFF
SLACK = 1e-12       # as in the definition


def sample(logits, seeds, positions, *, temperature, top_k, top_p, min_p, support_limit):
    """``(token, logprob, sampling_logprob, kept_mass, entropy, support ids, support probs)`` of (B, V) logits.

    ``seeds`` and ``positions`` (B,) int64, ``top_k`` at most V. Tokens are (B,) int64, statistics (B,) float32, the
    support (B, K) int32 and float32 with K <= ``support_limit``. Definition: ``ssd_core.reference.sample``.
    """
    z = logits.float()
    rows, vocab = z.shape
    top = z.amax(-1, keepdim=True)      # NaN if there is one
    if not top.isfinite().all():
        raise ValueError("logits: expected finite values or -inf, with a finite maximum, got NaN or inf")
    # below the maximum, so that a common offset of all logits costs no precision; clamped as exp(-inf) * -inf is NaN
    below = (z - top).clamp_min_(torch.finfo(z.dtype).min)
    unnormalised = below.exp()
    mass = unnormalised.sum(-1)
    entropy = mass.log() - torch.linalg.vecdot(unnormalised, below) / mass      # lse - sum p z
    if temperature == 0:
        token = z.argmax(-1)            # the first of equal maxima
        zeros, ones = torch.zeros_like(mass), torch.ones_like(mass)
        return token, -mass.log(), zeros, ones, entropy, token.unsqueeze(-1).int(), ones.unsqueeze(-1)

    # survivors (B, M) in the order (logit descending, id ascending); with no truncation at all the order is free
    truncated = bool(top_k) or top_p < 1 or min_p > 0
    if truncated:
        values, ids = largest(z, top_k or vocab)
    else:
        values, ids = z, torch.arange(vocab, device=z.device).expand(rows, vocab)
    tempered = (values.double() - top) / temperature
    weights = tempered.exp()
    total = (below / max(temperature, 1e-30)).exp_().sum(-1)        # of the whole vocabulary; float32 ends at 1e-38
    if truncated:
        share = weights / weights.sum(-1, keepdim=True)
        keep = (share >= min_p * share[:, :1]) & (weights > 0)
        if top_p < 1:
            keep &= share.cumsum(-1) - share < top_p - SLACK        # the mass ahead
        keep[:, 0] = True
        weights = weights.where(keep, 0)
    kept_mass = weights.sum(-1)

    score = (tempered - exponential(seeds.unsqueeze(-1), positions.unsqueeze(-1), ids).log_()).masked_fill(
        weights == 0, -torch.inf)
    place = score.argmax(-1, keepdim=True)
    token = ids.gather(-1, place)
    sampling_logprob = weights.gather(-1, place).log().squeeze(-1) - kept_mass.log()
    support = record(values, weights, ids, place, token, support_limit, ordered=truncated)
    logprob = below.gather(-1, token).squeeze(-1) - mass.log()
    return (token.squeeze(-1), logprob, sampling_logprob.float(), (kept_mass / total).float().clamp_max(1), entropy,
            *support)


def largest(z, k):
    """Values and ids of the k largest of each row in the order (value descending, id ascending), exactly k.

    ``torch.topk`` breaks ties as it likes. Where none crosses the boundary its set is right and needs only sorting;
    the other rows are redone on integer keys that hold the value and the id.
    """
    vocab = z.shape[-1]
    if k == vocab:
        return z.sort(dim=-1, descending=True, stable=True)
    values, ids = z.topk(k + 1, dim=-1)
    tied = (values[:, k - 1] == values[:, k]).nonzero().squeeze(-1)
    ids, by_id = ids[:, :k].sort(-1)
    values, by_value = values.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, by_value)
    if len(tied):
        bits = (z[tied] + 0.0).view(torch.int32).long()                 # + 0.0 makes -0 equal 0
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)        # float order as integer order
        keys = (ordered << 32) + (vocab - torch.arange(vocab, device=z.device))
        ids[tied] = keys.topk(k, dim=-1).indices
        values[tied] = z[tied].gather(-1, ids[tied])
    return values, ids


def record(values, weights, ids, place, token, limit, *, ordered):
    """The soft target of each row, (B, K) ids and probabilities, unbiased when the support exceeds ``limit``."""
    if ordered:
        heavy, heavy_ids, heavy_place = weights[:, :limit], ids[:, :limit], place
    else:
        _, heavy_ids = largest(values, min(limit, values.shape[-1]))    # ids are 0 .. V-1 here
        heavy = weights.gather(-1, heavy_ids)
        match = heavy_ids == token
        heavy_place = torch.where(match.any(-1, keepdim=True), match.int().argmax(-1, keepdim=True), limit)
    first = torch.zeros_like(heavy)
    first[:, 0] = 1
    alone = heavy_place >= limit
    probs = torch.where(alone, first, heavy / heavy.sum(-1, keepdim=True)).float()
    support_ids = torch.where(alone, token, heavy_ids).where(probs > 0, 0)
    width = int((probs > 0).sum(-1).max())
    return support_ids.int()[:, :width], probs[:, :width]


def exponential(seeds, positions, ids):
    """Exp(1) noise (B, M) float64, bit for bit that of ``ssd_core.reference.sample``."""
    low, high = philox4x32(positions & WORD, positions >> 32 & WORD, ids & WORD, ids >> 32 & WORD, seeds & WORD,
                           seeds >> 32 & WORD)
    v = high.double() * 2.0**-32 + (low.double() + 0.5) * 2.0**-64
    return -torch.log1p(-v.clamp_max(1 - 2.0**-53))


def philox4x32(c0, c1, c2, c3, k0, k1, rounds=10):
    """The first two words of Philox4x32, on int64 tensors that hold 32-bit words.

    A product of two words overflows int64 into the right bits; the shift is arithmetic, hence the mask.
    """
    for _ in range(rounds):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & WORD) ^ c1 ^ k0, p1 & WORD, (p0 >> 32 & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return c0, c1
