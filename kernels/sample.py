"""A draw from each row of logits, as ``ssd_core.reference.sample`` defines it: temperature, top-k, top-p, min-p, then
the largest of ``(z - max z) / temperature - log E``, E = -log1p(-v), v from Philox4x32-10 (Salmon et al., SC 2011).

Tokens are ordered by a 64-bit key: the logit's bits as an ordered integer, then the complement of the id. So there are
no ties, and every truncation keeps the keys above a threshold.

    _look       of a part of a row: maximum, sums, and the maximum of each group of columns
    _threshold  where nothing bounds how many tokens top-k and top-p keep: the least key that they keep
    _score      there, of a part of a row: who would be drawn
    _draw       the k largest keys are in the k groups of the largest maxima: they are copied together and sorted. Who
                is drawn of them, or of the parts of the row; and the record, which takes the largest keys

A row is in parts, so that few rows keep the whole device busy. What is added up of them in float32 may differ in the
last digit, who is drawn does not: scores are in float64, and weights whose sum decides over several looks are integers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch
from .logits import first_largest

SLACK = tl.constexpr(1e-12)                     # of top-p, as in the definition
NOTHING = tl.constexpr(-(2**63))                # a key below all others
NOBODY = tl.constexpr(0x7FFFFFFF)               # an id above all others
NEVER = tl.constexpr(-float("inf"))
WHOLE = tl.constexpr(2.0**61)                   # the weight of all tokens, as an integer
SUMS = tl.constexpr(3)
LARGEST = 512                                   # k up to which the k largest are sorted
PARTS = 64                                      # of a row, at most
SORTED = 64 if launch.INTERPRETED else 1024     # keys among which _threshold ends


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
def _noise(seed, position, ids):
    """Each id's 64 random bits: the lower and the upper 32."""
    zero = tl.zeros_like(ids).to(tl.uint32)
    low, high, _, _ = tl.philox(
        seed, zero + (position & 0xFFFFFFFF).to(tl.uint32), zero + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32),
        ids.to(tl.uint32), zero)
    return low, high


@triton.jit
def _log_exponential(low, high):
    """log E of random bits."""
    v = high.to(tl.float64) * (2.0**-32) + (low.to(tl.float64) + 0.5) * (2.0**-64)
    v = tl.minimum(v, 1 - 2.0**-53)
    # log1p(-v): log(u) v / (1 - u), u = 1 - v rounded, keeps the digits of small v
    u = 1 - v
    return tl.log(tl.where(u == 1, v, tl.log(u) * v / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def _tempered(z, top, temperature):
    return (z.to(tl.float64) - top) / temperature


@triton.jit
def _best(score, ids):
    """The largest score and the lowest id that has it."""
    found = tl.max(score, 0)
    return found, tl.min(tl.where(score == found, ids, NOBODY), 0)


@triton.jit
def _append(keys, chosen, count, out_ptr, CAPACITY: tl.constexpr):
    """Store the chosen keys behind ``count`` others, but for those behind CAPACITY; how many there are then."""
    found = tl.sum(chosen.to(tl.int32), 0)
    if found > 0:
        place = count + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(out_ptr + place, keys, mask=chosen & (place < CAPACITY))
    return count + found


@triton.jit
def _sorted(keys_ptr, count, CAPACITY: tl.constexpr):
    """What has been stored, largest first."""
    tl.debug_barrier()
    c = tl.arange(0, CAPACITY)
    return tl.sort(tl.load(keys_ptr + c, mask=c < count, other=NOTHING), descending=True)


@triton.jit
def _gather(
    x_ptr, columns, order_ptr, wanted, least, keys_ptr, GROUP: tl.constexpr, CAPACITY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Copy the keys at or above ``least`` of the first ``wanted`` groups together; how many there are."""
    lanes = tl.arange(0, BLOCK_V)
    count = tl.full([], 0, tl.int32)
    for start in range(0, wanted * GROUP, BLOCK_V):
        which = (start + lanes) // GROUP
        group = tl.load(order_ptr + which, mask=which < wanted, other=0)
        ids = group * GROUP + lanes % GROUP
        there = (which < wanted) & (ids < columns)
        keys = _keys(tl.load(x_ptr + ids, mask=there, other=NEVER).to(tl.float32), ids)
        count = _append(keys, there & (keys >= least), count, keys_ptr, CAPACITY)
    return count


@triton.jit
def _top(tops_ptr, row, parts, PARTS: tl.constexpr):
    """Maximum and first id of a row; how far below lie those of its parts."""
    p = tl.arange(0, PARTS)
    keys = tl.load(tops_ptr + row * parts + p, mask=p < parts, other=NOTHING)
    top, first = _of_keys(tl.max(keys, 0))
    tops, _ = _of_keys(keys)
    return top, first, tl.where((p < parts) & (tops > NEVER), tops - top, 0.0)


@triton.jit
def _of_parts(sums_ptr, row, parts, which, PARTS: tl.constexpr):
    """One of the sums of _look."""
    p = tl.arange(0, PARTS)
    return tl.load(sums_ptr + (row * SUMS + which) * parts + p, mask=p < parts, other=0.0)


@triton.jit
def _inverse(temperature):
    return tl.minimum(1 / temperature, 1e30).to(tl.float32)


@triton.jit
def _look(
    x_ptr, x_stride,                                    # (B, V)
    options_ptr,                                        # (3,) float64: temperature, top_p, min_p
    tops_ptr, sums_ptr,                                 # (B, parts) int64, (B, SUMS, parts) float32
    maxima_ptr,                                         # (B, groups) float32
    columns, width, groups,
    GREEDY: tl.constexpr, GROUP: tl.constexpr, BLOCK_V: tl.constexpr,
):
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    x_ptr += row * x_stride
    lanes = tl.arange(0, BLOCK_V)
    inverse = _inverse(tl.load(options_ptr))
    top = tl.full([], NEVER, tl.float32)
    first = tl.full([], 0, tl.int32)
    sums = tl.zeros([BLOCK_V], tl.float32)              # sum exp(z - top): NaN if there is NaN or inf
    belows = sums                                       # sum exp(z - top) (z - top)
    tempered = sums                                     # sum exp((z - top) / temperature)
    last = tl.minimum((part + 1) * width, columns)
    for start in range(part * width, last, BLOCK_V):
        ids = start + lanes
        z = tl.load(x_ptr + ids, mask=ids < columns, other=NEVER).to(tl.float32)
        found, where = first_largest(z, lanes)
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
            maxima = tl.max(tl.reshape(z, [BLOCK_V // GROUP, GROUP]), 1)
            group = start // GROUP + tl.arange(0, BLOCK_V // GROUP)
            tl.store(maxima_ptr + row * groups + group, maxima, mask=group < groups)
    tl.store(tops_ptr + row * parts + part, _keys(top, first))
    sums_ptr += row * SUMS * parts + part
    tl.store(sums_ptr, tl.sum(sums, 0))
    tl.store(sums_ptr + parts, tl.sum(belows, 0))
    tl.store(sums_ptr + 2 * parts, tl.sum(tempered, 0))


@triton.jit
def _shares(z, top, temperature, scale):
    """Weights as integers: their sums are the same in any order."""
    return (tl.exp(_tempered(z, top, temperature)) * scale).to(tl.int64)


@triton.jit
def _least_key(
    x_ptr, columns, least, bound, top, temperature, scale, keys_ptr, MASS: tl.constexpr, CAPACITY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The least key, of those at or above ``least``, with fewer than ``bound`` keys above it; or with less than
    ``bound`` of their weight. Four bits a look, until CAPACITY holds all that it may be."""
    lanes = tl.arange(0, BLOCK_V)
    digits = tl.arange(0, 16)
    low, above = tl.full([], NOTHING, tl.int64), tl.full([], 0, tl.int64)
    shift = tl.full([], 64, tl.int64)
    size = tl.full([], CAPACITY + 1, tl.int64)
    while size > CAPACITY:                              # at the last bit there is one
        shift -= 4
        counts = tl.zeros([16], tl.int64)
        sums = tl.zeros([16], tl.int64)
        for start in range(0, columns, BLOCK_V):
            ids = start + lanes
            z = tl.load(x_ptr + ids, mask=ids < columns, other=NEVER).to(tl.float32)
            keys = _keys(z, ids)
            digit = tl.where((keys >= least) & (ids < columns), (keys >> shift) - (low >> shift), -1)
            has = digit[None, :] == digits[:, None]
            counts += tl.sum(has.to(tl.int32), 1)
            if MASS:
                sums += tl.sum(tl.where(has, _shares(z, top, temperature, scale)[None, :], 0), 1)
        if MASS:
            bound = tl.where(shift == 60, bound * tl.sum(sums, 0), bound)
        else:
            sums = counts
        ahead = above + tl.sum(sums, 0) - tl.cumsum(sums, 0)            # of each digit: what is above it
        digit = tl.minimum(16 - tl.sum((ahead < bound).to(tl.int64), 0), 15)
        low += digit << shift
        above = tl.sum(tl.where(digits == digit, ahead, 0), 0)
        size = tl.sum(tl.where(digits == digit, counts, 0), 0)
    count = tl.full([], 0, tl.int32)
    for start in range(0, columns, BLOCK_V):
        ids = start + lanes
        z = tl.load(x_ptr + ids, mask=ids < columns, other=NEVER).to(tl.float32)
        keys = _keys(z, ids)
        chosen = (keys >= least) & (ids < columns) & ((keys >> shift) == (low >> shift))
        count = _append(keys, chosen, count, keys_ptr, CAPACITY)
    keys = _sorted(keys_ptr, count, CAPACITY)
    there = tl.arange(0, CAPACITY) < count
    z, _ = _of_keys(keys)
    share = tl.where(there, _shares(z, top, temperature, scale) if MASS else 1, 0)
    fits = there & (above + tl.cumsum(share, 0) - share < bound)
    found = tl.min(tl.where(fits, keys, 2**63 - 1), 0)
    return tl.maximum(least, tl.where(tl.max(fits.to(tl.int32), 0) > 0, found, low))


@triton.jit
def _threshold(
    x_ptr, x_stride, options_ptr, tops_ptr, sums_ptr,
    keys_ptr,                                           # (B, SORTED) int64
    least_ptr,                                          # (B,) int64
    columns, parts, top_k,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, SORTED: tl.constexpr, PARTS: tl.constexpr, BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    keys_ptr += row * SORTED
    temperature = tl.load(options_ptr)
    top, first, below = _top(tops_ptr, row, parts, PARTS)
    least = tl.full([], NOTHING, tl.int64)
    if TOP_K:
        bound = tl.full([], 0, tl.float64) + top_k
        least = _least_key(x_ptr, columns, least, bound, top, temperature, 1.0, keys_ptr, False, SORTED, BLOCK_V)
    if TOP_P:
        total = tl.sum(_of_parts(sums_ptr, row, parts, 2, PARTS) * tl.exp(below * _inverse(temperature)), 0)
        scale = tl.where(total > 0, WHOLE / total.to(tl.float64), 0.0)
        bound = tl.load(options_ptr + 1) - SLACK
        tl.debug_barrier()
        found = _least_key(x_ptr, columns, least, bound, top, temperature, scale, keys_ptr, True, SORTED, BLOCK_V)
        least = tl.minimum(found, _keys(top, first))    # one is always kept
    tl.store(least_ptr + row, least)


@triton.jit
def _score(
    x_ptr, x_stride,
    seeds_ptr, positions_ptr,                           # (B,) int64
    options_ptr, tops_ptr,
    least_ptr,                                          # (B,) int64
    scores_ptr, best_ptr, counts_ptr, masses_ptr,       # (B, parts) float64, int32, int32, float32
    columns, width,
    LEAST: tl.constexpr, MIN_P: tl.constexpr, PARTS: tl.constexpr, BLOCK_V: tl.constexpr,
):
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    x_ptr += row * x_stride
    lanes = tl.arange(0, BLOCK_V)
    temperature = tl.load(options_ptr)
    min_p = tl.load(options_ptr + 2)
    inverse = _inverse(temperature)
    seed = tl.load(seeds_ptr + row)
    position = tl.load(positions_ptr + row)
    top, _, _ = _top(tops_ptr, row, parts, PARTS)
    best = tl.full([], NEVER, tl.float64)
    token = tl.full([], NOBODY, tl.int32)
    count = tl.full([], 0, tl.int32)
    masses = tl.zeros([BLOCK_V], tl.float32)
    last = tl.minimum((part + 1) * width, columns)
    for start in range(part * width, last, BLOCK_V):
        ids = start + lanes
        z = tl.load(x_ptr + ids, mask=ids < columns, other=NEVER).to(tl.float32)
        kept = ids < last
        if LEAST:
            kept = kept & (_keys(z, ids) >= tl.load(least_ptr + row))
        if MIN_P:
            kept = kept & (tl.exp(_tempered(z, top, temperature)) >= min_p)
        found = tl.sum(kept.to(tl.int32), 0)
        if found > 0:
            count += found
            low, high = _noise(seed, position, ids)
            # In float32 who cannot win: -log E <= -log v, and v is at least its upper bits. Halves do not overflow.
            x = (0.5 * z - 0.5 * top) * (2 * inverse)
            masses += tl.where(kept, tl.exp(x), 0.0)
            most = x - tl.log(high.to(tl.float32) * (2.0**-32)) + (1e-3 - 1e-6 * x)
            if tl.max((kept & (most >= best.to(tl.float32))).to(tl.int32), 0) > 0:
                score = _tempered(z, top, temperature) - _log_exponential(low, high)
                higher, where = _best(tl.where(kept, score, NEVER), ids)
                token = tl.where(higher > best, where, token)
                best = tl.maximum(best, higher)
    place = row * parts + part
    tl.store(scores_ptr + place, best)
    tl.store(best_ptr + place, token)
    tl.store(counts_ptr + place, count)
    tl.store(masses_ptr + place, tl.sum(masses, 0))


@triton.jit
def _draw(
    x_ptr, x_stride, seeds_ptr, positions_ptr, options_ptr, tops_ptr, sums_ptr, maxima_ptr,
    order_ptr,                                          # (B, groups) int32
    keys_ptr,                                           # (B, CAPACITY) int64
    scores_ptr, best_ptr, counts_ptr, masses_ptr,
    token_ptr, stats_ptr, stats_stride,                 # (B,) int64; (4, B)
    ids_ptr, probs_ptr,                                 # (B, LIMIT) int32, float32
    columns, parts, groups, most,
    GREEDY: tl.constexpr, BOUNDED: tl.constexpr, TOP_P: tl.constexpr, LIMIT: tl.constexpr, CAPACITY: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, PARTS: tl.constexpr, BLOCK_V: tl.constexpr,
):
    """``most`` tokens are kept at most, if that is BOUNDED, or wanted in the record."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    ids_ptr += row * LIMIT
    probs_ptr += row * LIMIT
    stats_ptr += row
    temperature = tl.load(options_ptr)
    place = tl.arange(0, LIMIT)

    # the row at temperature 1
    top, first, below = _top(tops_ptr, row, parts, PARTS)
    fall = tl.exp(below)
    sums = _of_parts(sums_ptr, row, parts, 0, PARTS)
    total = tl.sum(sums * fall, 0)
    log_total = tl.log(total)
    entropy = log_total - tl.sum((_of_parts(sums_ptr, row, parts, 1, PARTS) + below * sums) * fall, 0) / total
    nan = tl.where(total > 0, 0.0, float("nan"))        # the caller looks: a row without a draw

    if GREEDY:
        tl.store(token_ptr + row, first.to(tl.int64))
        tl.store(stats_ptr, -log_total + nan)
        tl.store(stats_ptr + stats_stride, nan)
        tl.store(stats_ptr + 2 * stats_stride, 1.0)
        tl.store(stats_ptr + 3 * stats_stride, entropy)
        tl.store(ids_ptr + place, tl.where(place == 0, first, 0))
        tl.store(probs_ptr + place, tl.where(place == 0, 1.0, 0.0))
    else:
        # the groups of the largest maxima, and what is in them at or above the least of these
        order_ptr += row * groups
        keys_ptr += row * CAPACITY
        g = tl.arange(0, BLOCK_G)
        maxima = tl.load(maxima_ptr + row * groups + g, mask=g < groups, other=NEVER)
        order = tl.sort(_keys(maxima, g), descending=True)
        least = (tl.max(tl.where(g == most - 1, order, NOTHING), 0) >> 32) << 32
        wanted = tl.sum(((order >= least) & (g < groups)).to(tl.int32), 0)
        _, group = _of_keys(order)
        tl.store(order_ptr + g, group, mask=g < groups)
        tl.debug_barrier()
        count = _gather(x_ptr, columns, order_ptr, wanted, least, keys_ptr, GROUP, CAPACITY, BLOCK_V)
        if count > CAPACITY:
            tl.debug_barrier()
            bound = tl.full([], 0, tl.float64) + most
            least = _least_key(x_ptr, columns, least, bound, top, temperature, 1.0, keys_ptr, False, CAPACITY, BLOCK_V)
            tl.debug_barrier()
            count = _gather(x_ptr, columns, order_ptr, wanted, least, keys_ptr, GROUP, CAPACITY, BLOCK_V)
        keys = _sorted(keys_ptr, count, CAPACITY)

        if BOUNDED:
            c = tl.arange(0, CAPACITY)
            z, ids = _of_keys(keys)
            x = _tempered(z, top, temperature)
            w = tl.where(c < tl.minimum(count, most), tl.exp(x), 0.0)
            kept = (w > 0) & ((w >= tl.load(options_ptr + 2)) | (c == 0))
            if TOP_P:
                enough = (tl.load(options_ptr + 1) - SLACK) * tl.sum(w, 0)
                kept = kept & ((tl.cumsum(w, 0) - w < enough) | (c == 0))
            low, high = _noise(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), ids)
            _, token = _best(tl.where(kept, x - _log_exponential(low, high), NEVER), ids)
            kept_mass = tl.sum(tl.where(kept, w, 0.0), 0)
            kept_count = tl.sum(kept.to(tl.int32), 0)
        else:
            p = tl.arange(0, PARTS)
            at, there = row * parts + p, p < parts
            scores = tl.load(scores_ptr + at, mask=there, other=NEVER)
            _, token = _best(scores, tl.load(best_ptr + at, mask=there, other=NOBODY))
            kept_mass = tl.sum(tl.load(masses_ptr + at, mask=there, other=0.0), 0).to(tl.float64)
            kept_count = tl.sum(tl.load(counts_ptr + at, mask=there, other=0), 0)

        drawn = tl.load(x_ptr + tl.minimum(token, columns - 1)).to(tl.float32)      # of a row without a draw: any
        tempered = tl.sum(_of_parts(sums_ptr, row, parts, 2, PARTS) * tl.exp(below * _inverse(temperature)), 0)
        log_share = (_tempered(drawn, top, temperature) - tl.log(kept_mass)).to(tl.float32)
        tl.store(token_ptr + row, token.to(tl.int64))
        tl.store(stats_ptr, drawn - top - log_total + nan)
        tl.store(stats_ptr + stats_stride, log_share + nan)
        tl.store(stats_ptr + 2 * stats_stride, tl.minimum((kept_mass / tempered).to(tl.float32), 1.0) + nan)
        tl.store(stats_ptr + 3 * stats_stride, entropy + nan)

        # all that is kept; or the largest, if the drawn token is among them, else that token alone
        tl.debug_barrier()
        tl.store(keys_ptr + tl.arange(0, CAPACITY), keys)
        tl.debug_barrier()
        count = tl.minimum(count, kept_count)
        z, support = _of_keys(tl.load(keys_ptr + place))
        w = tl.where(place < count, tl.exp(_tempered(z, top, temperature)), 0.0)
        inside = tl.max(((support == token) & (w > 0)).to(tl.int32), 0) > 0
        probs = tl.where(inside, w / tl.sum(w, 0), tl.where(place == 0, 1.0, 0.0)).to(tl.float32)
        support = tl.where(inside, support, token)
        tl.store(ids_ptr + place, tl.where(probs > 0, support, 0))
        tl.store(probs_ptr + place, probs)


def sample(logits, seeds, positions, *, temperature, top_k, top_p, min_p, support_limit):
    """``(token, logprob, sampling_logprob, kept_mass, entropy, support ids, support probs)``, see ``chunked.sample``.
    The statistics of a row that has a NaN, +inf or nothing but -inf are NaN."""
    x = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, columns = x.shape

    def empty(dtype, *shape):
        return torch.empty(shape, dtype=dtype, device=x.device)

    greedy, bounded, top_k = temperature == 0, 0 < top_k <= LARGEST, top_k if top_k < columns else 0
    most = min(columns, (top_k or columns) if bounded else support_limit)
    group = launch.rows("sample_look", columns).block
    while group > 1 and (group > 256 or triton.cdiv(columns, group) < 2 * most):
        group //= 2
    groups = triton.cdiv(columns, group)
    capacity = max(support_limit, triton.next_power_of_2(min(columns, 2 * most + 128)))
    width, parts = launch.parts_of("sample_look", rows, columns, x.device, PARTS)

    options = torch.tensor([temperature or 1, top_p, min_p], dtype=torch.float64).to(x.device, non_blocking=True)
    seeds, positions = seeds.contiguous(), positions.contiguous()
    tops, sums = empty(torch.int64, rows, parts), empty(torch.float32, rows, SUMS.value, parts)
    maxima = empty(torch.float32, rows, groups)
    launch.row_launch(
        _look, "sample_look", rows, x, x, x.stride(0), options, tops, sums, maxima, columns, width, groups,
        parts=parts, GREEDY=greedy, GROUP=group)

    scores = tokens = counts = masses = x
    if not (greedy or bounded):
        least = x
        if top_k or top_p < 1:
            least = empty(torch.int64, rows)
            launch.row_launch(
                _threshold, "sample_threshold", rows, x, x, x.stride(0), options, tops, sums,
                empty(torch.int64, rows, SORTED), least, columns, parts, top_k, TOP_K=top_k > 0, TOP_P=top_p < 1,
                SORTED=SORTED, PARTS=PARTS)
        scores, tokens = empty(torch.float64, rows, parts), empty(torch.int32, rows, parts)
        counts, masses = empty(torch.int32, rows, parts), empty(torch.float32, rows, parts)
        launch.row_launch(
            _score, "sample_score", rows, x, x, x.stride(0), seeds, positions, options, tops, least, scores, tokens,
            counts, masses, columns, width, parts=parts, LEAST=least is not x, MIN_P=min_p > 0, PARTS=PARTS)

    token, stats = empty(torch.int64, rows), empty(torch.float32, 4, rows)
    ids, probs = empty(torch.int32, rows, support_limit), empty(torch.float32, rows, support_limit)
    launch.row_launch(
        _draw, "sample", rows, x, x, x.stride(0), seeds, positions, options, tops, sums, maxima,
        empty(torch.int32, rows, groups), empty(torch.int64, rows, capacity), scores, tokens, counts, masses, token,
        stats, stats.stride(0), ids, probs, columns, parts, groups, most, GREEDY=greedy, BOUNDED=bounded,
        TOP_P=top_p < 1, LIMIT=support_limit, CAPACITY=capacity, GROUP=group, BLOCK_G=triton.next_power_of_2(groups),
        PARTS=PARTS)
    return token, *stats, ids, probs
