"""A draw from each row of logits, as ``ssd_core.reference.sample`` defines it: temperature, top-k, top-p, min-p, then
the largest of ``(z - max z) / temperature - log E``, E = -log1p(-v), v from Philox4x32-10 (Salmon et al., SC 2011).

Tokens are ordered by a 64-bit key: the logit's bits as an ordered integer, then the complement of the id. So there are
no ties, and every truncation keeps the keys above a threshold. The k largest are at or above the k-th largest of the
maxima of groups of columns: what is there is copied together and sorted, unless there is too much of it. Then, and
where nothing bounds how many tokens are kept, the threshold is found by halving, one look at the row for each bit.

One program has one row. Weights, sums of weights and scores are in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import row_launch
from .launch import rows as rows_of

SLACK = tl.constexpr(1e-12)                     # of top-p, as in the definition
NOTHING = tl.constexpr(-(2**63))                # a key below all others
LARGEST = 512                                   # k that the maxima serve


@triton.jit
def _keys(z, ids):
    """Larger: a larger logit, or the same and a smaller id."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)         # + 0.0 makes -0 equal 0
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) + (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def _of_keys(keys):
    """The logits and ids again."""
    ordered = (keys >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(tl.float32, bitcast=True), 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _log_noise(seed, position, ids):
    """log E of each id."""
    zero = tl.zeros_like(ids).to(tl.uint32)
    low, high, _, _ = tl.philox(
        seed, zero + (position & 0xFFFFFFFF).to(tl.uint32), zero + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32),
        ids.to(tl.uint32), zero)
    v = high.to(tl.float64) * (2.0**-32) + (low.to(tl.float64) + 0.5) * (2.0**-64)
    v = tl.minimum(v, 1 - 2.0**-53)
    # log1p(-v): log(u) v / (1 - u), u = 1 - v rounded, keeps the digits of small v
    u = 1 - v
    return tl.log(tl.where(u == 1, v, tl.log(u) * v / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def _weights(z, top, temperature):
    return tl.exp((z.to(tl.float64) - top) / temperature)


@triton.jit
def _above(x_ptr, columns, threshold, top, temperature, MASS: tl.constexpr, BLOCK_V: tl.constexpr):
    """How many keys are above the threshold, or their weights' sum."""
    lanes = tl.arange(0, BLOCK_V)
    sums = tl.zeros([BLOCK_V], tl.float64)
    for start in range(0, columns, BLOCK_V):
        ids = start + lanes
        z = tl.load(x_ptr + ids, mask=ids < columns, other=-float("inf")).to(tl.float32)
        above = (_keys(z, ids) > threshold) & (ids < columns)
        sums += tl.where(above, _weights(z, top, temperature) if MASS else 1.0, 0.0)
    return tl.sum(sums, 0)


@triton.jit
def _least_key(x_ptr, columns, bound, top, temperature, MASS: tl.constexpr, BLOCK_V: tl.constexpr):
    """The least key with fewer than ``bound`` keys, or less than ``bound`` of weights, above it."""
    low, high = tl.full([], NOTHING, tl.int64), tl.full([], 2**63 - 1, tl.int64)
    for _ in range(64):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        fits = _above(x_ptr, columns, middle, top, temperature, MASS, BLOCK_V) < bound
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle + 1)
    return high


@triton.jit
def _gather(x_ptr, columns, threshold, out_ptr, CAPACITY: tl.constexpr, BLOCK_V: tl.constexpr):
    """Copy the keys at or above the threshold together, those behind CAPACITY are lost; how many there are."""
    lanes = tl.arange(0, BLOCK_V)
    count = tl.full([], 0, tl.int32)
    for start in range(0, columns, BLOCK_V):
        ids = start + lanes
        z = tl.load(x_ptr + ids, mask=ids < columns, other=-float("inf")).to(tl.float32)
        keys = _keys(z, ids)
        chosen = (keys >= threshold) & (ids < columns)
        found = tl.sum(chosen.to(tl.int32), 0)
        if found > 0:
            place = count + tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(out_ptr + place, keys, mask=chosen & (place < CAPACITY))
        count += found
    return count


@triton.jit
def _best(score, ids, best, token):
    """The largest score so far and the lowest id that has it."""
    found = tl.max(score, 0)
    where = tl.min(tl.where(score == found, ids, 0x7FFFFFFF), 0)
    better = (found > best) | ((found == best) & (where < token))
    return tl.where(better, found, best), tl.where(better, where, token)


@triton.jit
def _rows(
    x_ptr, x_stride,                                    # (B, V)
    seeds_ptr, positions_ptr,                           # (B,) int64
    options_ptr,                                        # (3,) float64: temperature, top_p, min_p
    maxima_ptr, groups,                                 # (B, groups) float32
    keys_ptr,                                           # (B, CAPACITY) int64
    token_ptr, stats_ptr, stats_stride,                 # (B,) int64; (4, B)
    ids_ptr, probs_ptr,                                 # (B, LIMIT) int32, float32
    columns, top_k,
    GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MAXIMA: tl.constexpr,
    LIMIT: tl.constexpr, CAPACITY: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    maxima_ptr += row * groups
    keys_ptr += row * CAPACITY
    lanes = tl.arange(0, BLOCK_V)
    NEVER: tl.constexpr = -float("inf")
    temperature = tl.load(options_ptr)
    top_p = tl.load(options_ptr + 1)
    min_p = tl.load(options_ptr + 2)

    # the row at temperature 1, and the maxima of its groups
    top = tl.full([], NEVER, tl.float32)
    first = tl.full([], 0, tl.int32)
    sums = tl.zeros([BLOCK_V], tl.float32)
    belows = sums                                       # sum exp(z - top) (z - top)
    tempered = sums                                     # sum exp((z - top) / temperature)
    inverse = tl.minimum(1 / temperature, 1e30).to(tl.float32)
    wrong = tl.full([], 0, tl.int32)
    for start in range(0, columns, BLOCK_V):
        ids = start + lanes
        z = tl.load(x_ptr + ids, mask=ids < columns, other=NEVER).to(tl.float32)
        wrong += tl.sum(((z != z) | (z == float("inf"))).to(tl.int32), 0)
        found, where = tl.max(z, 0, return_indices=True)
        first = tl.where(found > top, start + where, first)
        before = top
        top = tl.maximum(top, found)
        shift = tl.where(top == NEVER, 0.0, top)
        rise = tl.where(before == NEVER, 0.0, top - before)
        fall = tl.exp(-rise)
        e = tl.exp(z - shift)
        belows = (belows - rise * sums) * fall + tl.where(e > 0, e * (z - shift), 0.0)
        sums = sums * fall + e
        if not GREEDY:
            tempered = tempered * tl.exp(-rise * inverse) + tl.exp((z - shift) * inverse)
        if MAXIMA:
            maxima = tl.max(tl.reshape(z, [BLOCK_V // GROUPS, GROUPS]), 1)
            group = start // GROUPS + tl.arange(0, BLOCK_V // GROUPS)
            tl.store(maxima_ptr + group, maxima, mask=group < groups)
    total = tl.sum(sums, 0)
    log_total = tl.log(total)
    entropy = log_total - tl.sum(belows, 0) / total
    nan = tl.where((wrong > 0) | (top == NEVER), float("nan"), 0.0)     # the caller looks: a row without a draw
    seed = tl.load(seeds_ptr + row)
    position = tl.load(positions_ptr + row)
    place = tl.arange(0, LIMIT)

    if GREEDY:
        tl.store(token_ptr + row, first.to(tl.int64))
        tl.store(stats_ptr + row, -log_total + nan)
        tl.store(stats_ptr + stats_stride + row, nan)
        tl.store(stats_ptr + 2 * stats_stride + row, 1.0)
        tl.store(stats_ptr + 3 * stats_stride + row, entropy)
        tl.store(ids_ptr + row * LIMIT + place, tl.where(place == 0, first, 0))
        tl.store(probs_ptr + row * LIMIT + place, tl.where(place == 0, 1.0, 0.0))
    else:
        wide_top = top.to(tl.float64)
        # keys at or above `least` are kept; the `count` heaviest of them lie in keys_ptr, in any order
        least = tl.full([], NOTHING + 1, tl.int64)
        kept_mass = tl.full([], 0.0, tl.float64)
        best = tl.full([], NEVER, tl.float64)
        token = tl.full([], 0x7FFFFFFF, tl.int32)
        count = tl.full([], CAPACITY + 1, tl.int32)
        if MAXIMA:
            tl.debug_barrier()
            g = tl.arange(0, BLOCK_G)
            maxima = tl.sort(tl.load(maxima_ptr + g, mask=g < groups, other=NEVER), descending=True)
            kth = tl.max(tl.where(g == top_k - 1, maxima, NEVER), 0)
            at_least = _keys(kth, tl.full([], 0x7FFFFFFF, tl.int32))
            count = _gather(x_ptr, columns, at_least, keys_ptr, CAPACITY, BLOCK_V)
        if count <= CAPACITY:
            tl.debug_barrier()
            c = tl.arange(0, CAPACITY)
            keys = tl.sort(tl.load(keys_ptr + c, mask=c < count, other=NOTHING), descending=True)
            z, ids = _of_keys(keys)
            w = tl.where(c < tl.minimum(count, top_k), _weights(z, wide_top, temperature), 0.0)
            weight = tl.sum(w, 0)
            kept = (w > 0) & ((w / weight >= min_p / weight) | (c == 0))
            if TOP_P:
                kept = kept & ((tl.cumsum(w, 0) - w < (top_p - SLACK) * weight) | (c == 0))
            kept_mass = tl.sum(tl.where(kept, w, 0.0), 0)
            score = (z.to(tl.float64) - wide_top) / temperature - _log_noise(seed, position, ids)
            best, token = _best(tl.where(kept, score, NEVER), ids, best, token)
            count = tl.minimum(tl.sum(kept.to(tl.int32), 0), LIMIT)
            tl.debug_barrier()
            tl.store(keys_ptr + c, keys)
        else:
            if TOP_K:
                least = _least_key(x_ptr, columns, top_k, wide_top, temperature, False, BLOCK_V)
            weight = _above(x_ptr, columns, least - 1, wide_top, temperature, True, BLOCK_V)
            if TOP_P:
                share = (top_p - SLACK) * weight
                enough = _least_key(x_ptr, columns, share, wide_top, temperature, True, BLOCK_V)
                least = tl.maximum(least, tl.minimum(enough, _keys(top, first)))        # one is always kept
            weights = tl.zeros([BLOCK_V], tl.float64)
            number = tl.full([], 0, tl.int32)
            least_kept = tl.full([], 2**63 - 1, tl.int64)
            for start in range(0, columns, BLOCK_V):
                ids = start + lanes
                z = tl.load(x_ptr + ids, mask=ids < columns, other=NEVER).to(tl.float32)
                w = tl.where(ids < columns, _weights(z, wide_top, temperature), 0.0)
                keys = _keys(z, ids)
                kept = (keys >= least) & (w > 0) & ((w / weight >= min_p / weight) | (ids == first))
                found = tl.sum(kept.to(tl.int32), 0)
                if found > 0:
                    number += found
                    weights += tl.where(kept, w, 0.0)
                    least_kept = tl.minimum(least_kept, tl.min(tl.where(kept, keys, 2**63 - 1), 0))
                    score = (z.to(tl.float64) - wide_top) / temperature - _log_noise(seed, position, ids)
                    best, token = _best(tl.where(kept, score, NEVER), ids, best, token)
            kept_mass = tl.sum(weights, 0)
            least = least_kept
            if number > LIMIT:
                least = _least_key(x_ptr, columns, LIMIT, wide_top, temperature, False, BLOCK_V)
            tl.debug_barrier()          # what was gathered before has been read
            count = _gather(x_ptr, columns, least, keys_ptr, LIMIT, BLOCK_V)

        drawn = tl.load(x_ptr + tl.minimum(token, columns - 1)).to(tl.float32)      # of a row without a draw: any
        drawn_weight = _weights(drawn, wide_top, temperature)
        tl.store(token_ptr + row, token.to(tl.int64))
        tl.store(stats_ptr + row, drawn - top - log_total + nan)
        tl.store(stats_ptr + stats_stride + row, (tl.log(drawn_weight) - tl.log(kept_mass)).to(tl.float32) + nan)
        of_all = (kept_mass / tl.sum(tempered, 0).to(tl.float64)).to(tl.float32)
        tl.store(stats_ptr + 2 * stats_stride + row, tl.minimum(of_all, 1.0) + nan)
        tl.store(stats_ptr + 3 * stats_stride + row, entropy + nan)

        # the support: all that is kept; or the heaviest, if the drawn token is among them, else that token alone
        tl.debug_barrier()
        keys = tl.sort(tl.load(keys_ptr + place, mask=place < count, other=NOTHING), descending=True)
        z, support = _of_keys(keys)
        w = tl.where(place < count, _weights(z, wide_top, temperature), 0.0)
        inside = tl.max(((support == token) & (w > 0)).to(tl.int32), 0) > 0
        probs = tl.where(inside, w / tl.sum(w, 0), tl.where(place == 0, 1.0, 0.0)).to(tl.float32)
        support = tl.where(inside, support, token)
        tl.store(ids_ptr + row * LIMIT + place, tl.where(probs > 0, support, 0))
        tl.store(probs_ptr + row * LIMIT + place, probs)


def sample(logits, seeds, positions, *, temperature, top_k, top_p, min_p, support_limit):
    """``(token, logprob, sampling_logprob, kept_mass, entropy, support ids, support probs)``, see ``chunked.sample``.
    The statistics of a row that has a NaN, +inf or nothing but -inf are NaN."""
    x = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, columns = x.shape
    token = torch.empty(rows, dtype=torch.int64, device=x.device)
    stats = torch.empty(4, rows, dtype=torch.float32, device=x.device)
    ids = torch.empty(rows, support_limit, dtype=torch.int32, device=x.device)
    probs = torch.empty(rows, support_limit, dtype=torch.float32, device=x.device)
    options = torch.tensor([temperature or 1, top_p, min_p], dtype=torch.float64).to(x.device, non_blocking=True)
    group = 256
    while triton.cdiv(columns, group) > 4096:
        group *= 2
    group = min(group, rows_of("sample", columns).block)
    groups = triton.cdiv(columns, group)
    capacity = max(support_limit, triton.next_power_of_2(2 * min(top_k, LARGEST) + 128))
    row_launch(
        _rows, "sample", rows, x,
        x, x.stride(0), seeds.contiguous(), positions.contiguous(), options,
        torch.empty(rows, groups, dtype=torch.float32, device=x.device), groups,
        torch.empty(rows, capacity, dtype=torch.int64, device=x.device), token, stats, stats.stride(0), ids, probs,
        columns, top_k, GREEDY=temperature == 0, TOP_K=0 < top_k < columns, TOP_P=top_p < 1,
        MAXIMA=0 < top_k <= min(LARGEST, groups), LIMIT=support_limit, CAPACITY=capacity, GROUPS=group,
        BLOCK_G=triton.next_power_of_2(groups))
    return token, *stats, ids, probs
