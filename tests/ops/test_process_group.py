"""A vocabulary over several ranks equals one rank: loss, d_input on every rank, the shards' d_weight and d_bias.

All cases run in one set of processes, each this file as a script.
"""

import dataclasses
import datetime
import importlib
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from ssd_core import (
    SparseTarget,
    TeacherHidden,
    TeacherLogits,
    groups,
    linear_cross_entropy,
    linear_distill,
    linear_logprob,
    native,
    plan,
)
from ssd_core.chunked import grad_filter
from ssd_core.chunked.logits import block_elements
from ssd_core.plan import plan_chunks

D, V = 16, 700
COUNT = {"torch": 37, "cpu": 150, "triton": 8}   # tokens: of compiled kernels several panels
FILTERED_COUNT = {**COUNT, "triton": 37}        # few tokens have tiles without a target
SHARDS = {2: (257, 443), 4: (1, 299, 120, 280)}
DTYPES = {"torch": [torch.float32, torch.float64, torch.bfloat16],
          "cpu": [] if native.missing() else [torch.float32, torch.bfloat16, torch.float16],
          "triton": [torch.float32, torch.bfloat16] * (os.environ.get("TRITON_INTERPRET") == "1")}
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
EXACT = {"torch": torch.float64, "cpu": torch.float32, "triton": torch.float32}     # what the filter is tested in
DELTA = 0.2
BLOCK = 4 * block_elements(torch.device("cpu"))     # bytes that a buffer of a row pass has at least
CLASS_WEIGHT = torch.rand(V, generator=torch.Generator().manual_seed(5)) + 0.1

Shard = namedtuple("Shard", "group start stop")
ALONE = Shard(None, 0, V)

each_backend = pytest.mark.parametrize("backend", [
    "torch", pytest.param("cpu", marks=pytest.mark.skipif(not DTYPES["cpu"], reason=str(native.missing())))])
interpreted = pytest.mark.skipif(not DTYPES["triton"], reason="its kernels run on CPU tensors with TRITON_INTERPRET=1")
each_filter = pytest.mark.parametrize(
    "backend", [*each_backend.args[1], pytest.param("triton", marks=interpreted)])
each_dtype = pytest.mark.parametrize(
    ("backend", "dtype"), [(backend, dtype) for backend in DTYPES for dtype in DTYPES[backend]], ids=str)


def upstream(count):
    return torch.linspace(-2, 3, count)


def problem(backend, dtype, wide=None, counts=COUNT):
    """Leaves x, w, b and whatever the cases are taken against; ``wide`` holds the same numbers in more digits."""
    g, n = torch.Generator().manual_seed(0), counts[backend]

    def random(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype).to(wide or dtype)

    x, w, b = random(n, D), random(V, D, scale=3 / D**0.5), random(V)
    y = torch.randint(V, (n,), generator=g)
    y[::6] = -100
    ids = torch.stack([torch.randperm(V, generator=g)[:5] for _ in range(n)])
    probs = torch.rand(n, 5, generator=g) / 5
    probs[::7] = 0
    dense = torch.rand(n, V, generator=g).softmax(-1)
    return {"x": x, "w": w, "b": b, "y": y, "sparse": SparseTarget(ids, probs), "dense": dense,
            "teacher": random(n, V), "hidden": (random(n, 9), random(V, 9), random(V))}


def run(case, given, shard, backend):
    """``(results, d_input, d_weight, d_bias)`` of a case on one rank; the last two of its shard."""
    own = slice(shard.start, shard.stop)
    x, w, b = (t.detach().requires_grad_() for t in (given["x"], given["w"][own], given["b"][own]))
    options = {"linear_bias": b, "process_group": shard.group, "vocab_start": shard.start, "backend": backend}
    results = case(x, w, given, own, options)
    grads = torch.autograd.grad(results[0].sum(), (x, w, b)) if results[0].ndim == 0 else torch.autograd.grad(
        results[0], (x, w, b), upstream(len(x)).to(results[0].dtype))
    return [t.detach() for t in (*results, *grads)]


def losses(**options):
    """linear_cross_entropy, the target named in ``given``."""
    target, weighted, signed = (options.pop(name, default) for name, default in
                                (("target", "y"), ("weighted", False), ("signed", False)))

    def case(x, w, given, own, shared):
        found = given[target][:, own] if target == "dense" else given[target]
        weight = CLASS_WEIGHT[own] if weighted else None
        token_weight = upstream(len(x)).sign() if signed else None
        loss, stats = linear_cross_entropy(
            x, w, found, weight=weight, token_weight=token_weight, return_stats=True, **options, **shared)
        return loss, stats.nll, stats.lse, stats.denominator, stats.skipped_max

    return case


def distillation(teacher, **options):
    weighted = options.pop("weighted", False)

    def case(x, w, given, own, shared):
        found = given["sparse"]
        if teacher == "logits":
            found = TeacherLogits(given["teacher"][:, own])
        if teacher == "hidden":
            states, weight, bias = given["hidden"]
            found = TeacherHidden(states, weight[own], bias[own], logit_scale=0.7, softcap=5.0)
        target = given["y"] if options.get("ce_weight") else None
        weight = CLASS_WEIGHT[own] if weighted else None
        loss, stats = linear_distill(
            x, w, found, target=target, weight=weight, return_stats=True, **options, **shared)
        return loss, stats.divergence, stats.nll, stats.lse

    return case


def logprobs(x, w, given, own, shared, **options):
    found = linear_logprob(x, w, given["y"], temperature=1.3, softcap=4.0, **options, **shared)
    scale = upstream(len(x))
    return (found.logprob * scale + found.entropy * scale.flip(0)).sum(), *found


CASES = {
    "hard": losses(),
    "hard, none": losses(reduction="none"),
    "hard, few rows": losses(reduction="sum", workspace_bytes=6 * BLOCK + 50_000),
    "hard, tiles": losses(reduction="none", workspace_bytes=6 * BLOCK + 25_000),
    "sparse": losses(target="sparse"),
    "sparse, renormalised": losses(target="sparse", tail="renormalise"),
    "sparse, bucket": losses(target="sparse", tail="bucket", temperature=1.4, reduction="none"),
    "class weights": losses(weighted=True),
    "label smoothing": losses(label_smoothing=0.2, softcap=5.0, logit_scale=1.2),
    "smoothing and class weights": losses(label_smoothing=0.2, weighted=True, temperature=0.8),
    "z_loss": losses(z_loss=0.01),
    "class probabilities": losses(target="dense"),
    "class probabilities, all": losses(target="dense", weighted=True, label_smoothing=0.1, reduction="none"),
    **{f"{teacher}, {divergence}": distillation(teacher, divergence=divergence, temperature=1.5, beta=0.3)
       for teacher in ("sparse", "logits", "hidden") for divergence in ("forward_kl", "reverse_kl", "jsd")},
    "sparse, support": distillation("sparse", tail="support", divergence="jsd", reduction="none"),
    "sparse, renormalised teacher": distillation("sparse", tail="renormalise", temperature_squared=True),
    **{f"{teacher} with cross-entropy": distillation(
        teacher, ce_weight=0.4, label_smoothing=0.1, z_loss=0.01, weighted=True, temperature=0.7)
       for teacher in ("sparse", "logits", "hidden")},
    "hidden, few rows": distillation("hidden", divergence="jsd", workspace_bytes=12 * BLOCK + 80_000),
    "hidden, tiles": distillation("hidden", divergence="jsd", workspace_bytes=12 * BLOCK + 30_000),
    "logprob": logprobs,
    "logprob, few rows": lambda *arguments: logprobs(*arguments, workspace_bytes=8 * BLOCK + 50_000),
    "logprob, tiles": lambda *arguments: logprobs(*arguments, workspace_bytes=8 * BLOCK + 25_000),
}
# what is asked for, and how it is filtered
FILTERED = {
    "hard": ({}, {"grad_filter": DELTA}),
    "none": ({"target": "sparse", "reduction": "none", "signed": True}, {"grad_filter": DELTA}),
    "small": ({"workspace_bytes": 5_400_000}, {"grad_filter": DELTA, "grad_filter_weight": DELTA / 4}),
}


def ties(backend, first, shard):
    """Equal logits of the largest value on several ranks: the lowest id wins."""
    own = slice(shard.start, shard.stop)
    bias = torch.zeros(V)
    bias[[299, 300, 256, 257, 699]] = 9.0
    bias[0] = 9.0 if first else 0.0
    found = linear_logprob(torch.zeros(3, 2), torch.zeros(V, 2)[own], torch.zeros(3, dtype=torch.int64),
                           linear_bias=bias[own], process_group=shard.group, vocab_start=shard.start, backend=backend)
    return found.argmax


def without_a_rank(backend, shard):
    """Shards with a gap: of each loss, which tokens are NaN, and which should be."""
    given, gap = problem(backend, torch.float32), SHARDS[shard.group.size()][0]
    w, group = given["w"][shard.start : shard.stop], {
        "process_group": shard.group, "vocab_start": shard.start + (shard.start > 0), "backend": backend}
    y, sparse = given["y"].clone(), given["sparse"]
    y[2::5] = gap
    sparse.ids[3::7, 1] = gap
    used = (sparse.ids == gap) & (sparse.probs > 0)
    found = [
        (linear_cross_entropy(given["x"], w, y, reduction="none", **group), y == gap),
        (linear_cross_entropy(given["x"], w, sparse, reduction="none", **group), used.any(-1)),
        (linear_distill(given["x"], w, sparse, reduction="none", **group), used.any(-1)),
        (linear_logprob(given["x"], w, y, **group).logprob, y == gap)]
    return [(loss.isnan(), missing) for loss, missing in found]


def worker(rank, world, folder):
    """One rank: results of all cases into ``folder``."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=60))
    start = sum(SHARDS[world][:rank])
    shard = Shard(dist.group.WORLD, start, start + SHARDS[world][rank])
    torch.set_num_threads(1)        # the ranks share the cores
    found = {}
    reduce, summed = groups.all_reduce, set()

    def recording(tensor, how, group):
        if tensor.shape in [(count, D) for count in COUNT.values()]:
            summed.add(tensor.dtype)
        return reduce(tensor, how, group)

    plans = []

    def planning(demand, workspace):
        if backend == "triton":
            columns = 97 if "tiles" in name else demand.vocab
            route = os.environ.get("SSD_CORE_ROUTE", "chunked") if demand.tiled else "chunked"
            return plan.ChunkPlan(3 if workspace else demand.tokens, 64, columns, route=route)
        if demand.held is None or workspace is None or name == "refused":
            plans.append(plan_chunks(demand, workspace))
            return plans[-1]
        # compiled kernels: one panel of tokens, and one tile if so asked
        panel, tile = native.tile_shape(demand.dtype)
        workspace = demand.held(panel, tile if "tiles" in name else demand.vocab) * (8 if demand.filtered else 7) // 7
        plans.append(plan_chunks(demand, workspace + 1))
        # as on a rank with other instructions or threads: the fewest rows are everyone's
        return dataclasses.replace(plans[-1], rows=plans[-1].rows * 3 // 4 if rank else plans[-1].rows)

    groups.all_reduce = recording
    plan.LOOK = 0       # of so small heads, tiles would otherwise never be cheaper than a few rows
    for op in ("cross_entropy", "distill", "logprob"):
        importlib.import_module(f"ssd_core.ops.linear_{op}").plan_chunks = planning
    for backend, dtypes in DTYPES.items():
        for dtype in dtypes:
            given = problem(backend, dtype)
            for name, case in CASES.items():
                summed.clear()
                plans.clear()
                found[name, backend, dtype] = run(case, given, shard, backend)
                found["summed", name, backend, dtype] = set(summed)
                found["plans", name, backend, dtype] = [(plan.rows, plan.tile) for plan in plans]
        if dtypes:
            name = "filtered"
            found |= filtered(backend, shard)
        if dtypes and backend != "triton":      # which plans as "torch" does
            found["ties", backend] = [ties(backend, first, shard) for first in (False, True)]
            found["gap", backend] = without_a_rank(backend, shard)
            name = "refused"
            found["refused", backend] = refused(backend, shard)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def filtered(backend, shard):
    """Results; this rank's bounds; and of each chunk the largest mass that it skips of a token, if that is seen."""
    found, bounds, masses = {}, set(), []
    select, compiled = grad_filter._Skipped.select, native.linear_cross_entropy

    def recording(share, mass, protected):
        select(share, mass, protected)
        bounds.add(share.delta)
        masses.append((share.delta, mass.masked_fill(share.active, 0).sum(-1).max().item()))

    def calling(*arguments, **options):
        bounds.update((options["grad_filter"], options["grad_filter_weight"]))
        return compiled(*arguments, **options)

    def beginning(rows, *given):
        begin(rows, *given)
        bounds.add(given[-1])
        masses.append((given[-1], rows.skipped.max().item()))

    if backend == "triton":
        from ssd_core.kernels.grad_filter import FilteredRows

        begin, FilteredRows.__init__ = FilteredRows.__init__, beginning
    grad_filter._Skipped.select, native.linear_cross_entropy = recording, calling
    for name, (asked, filters) in FILTERED.items():
        bounds.clear()
        masses.clear()
        given = problem(backend, EXACT[backend], counts=FILTERED_COUNT)
        results = run(losses(**asked, **filters), given, shard, backend)
        found["filtered", name, backend] = results, set(bounds), list(masses)
    grad_filter._Skipped.select, native.linear_cross_entropy = select, compiled
    return found


def refused(backend, shard):
    """What one rank refuses all refuse: none waits for another."""
    given = problem(backend, torch.float32)
    x, y, w = given["x"], given["y"], given["w"][shard.start : shard.stop].requires_grad_()
    messages = []
    for target, options in (
        (y, {"workspace_bytes": 1000}),
        (y, {"workspace_bytes": 3_150_000 if backend == "torch" else 1000, "grad_filter": 0.1}),
        (y, {"token_weight": upstream(len(x)), "grad_filter": 0.1}),
        (y.where(y >= 0, V), {}),
    ):
        try:
            linear_cross_entropy(x, w, target, process_group=shard.group, vocab_start=shard.start, backend=backend,
                                 **options)
        except (ValueError, IndexError) as error:
            messages.append(str(error))
    return messages


# -- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.all)], ids=["2-ranks", "4-ranks"])
def ranks(request, tmp_path_factory):
    """What every rank found."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", __file__, str(rank), str(world), folder], stderr=subprocess.PIPE, text=True)
        for rank in range(world)]
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(said)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def error(found, true):
    scale = true.double().norm()
    return ((found.double() - true.double()).norm() / (scale if scale > 0 else 1)).item()


def assert_same(found):
    """All but d_weight and d_bias is the same on all ranks, bit for bit."""
    for rank in found[1:]:
        assert all(torch.equal(a, e) for a, e in zip(rank[:-2], found[0][:-2], strict=True))


def joined(found):
    return *found[0][:-2], *(torch.cat([rank[place] for rank in found]) for place in (-2, -1))


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_equal_to_one_rank(ranks, name, backend, dtype):
    """As near to float64 as one rank is; d_input is added up in float32 (Megatron #2739 did so in bfloat16)."""
    true = run(CASES[name], problem(backend, dtype, torch.float64), ALONE, "torch")
    alone = run(CASES[name], problem(backend, dtype), ALONE, backend)
    found = [rank[name, backend, dtype] for rank in ranks]
    assert_same(found)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(rank["summed", name, backend, dtype] == {wide} for rank in ranks)
    for ours, one, expected in zip(joined(found), alone, true, strict=True):
        assert ours.shape == expected.shape and ours.dtype == one.dtype
        # the ranks' parts of d_input are rounded, each once, before they are added up
        parts = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0
        assert error(ours, expected) <= 1.1 * (error(one, expected) ** 2 + parts**2) ** 0.5 + ROUNDING[dtype]


@each_backend
@pytest.mark.parametrize("name", [name for name in CASES if "rows" in name or "tiles" in name])
def test_chunks_are_those_of_the_largest_shard(ranks, name, backend):
    """On all ranks, or reductions would not meet; several chunks in some dtype, or this shows nothing."""
    plans = [[rank["plans", name, backend, dtype] for dtype in DTYPES[backend]] for rank in ranks]
    assert all(rank == plans[0] for rank in plans)
    count, largest = (problem(backend, torch.float32)["y"] != -100).sum(), max(SHARDS[len(ranks)])
    place, whole = (1, largest) if "tiles" in name else (0, COUNT[backend] if "hidden" in name else count)
    assert any(plan[place] < whole for dtype in plans[0] for plan in dtype)


@each_backend
def test_of_ties_the_lowest_id_on_any_rank(ranks, backend):
    for rank in ranks:
        assert [argmax.tolist() for argmax in rank["ties", backend]] == [[256] * 3, [0] * 3]


@each_backend
def test_an_id_that_no_rank_has_makes_its_loss_nan(ranks, backend):
    for rank in ranks:
        for nan, missing in rank["gap", backend]:
            assert torch.equal(nan, missing) and missing.any() and not missing.all()


@each_filter
@pytest.mark.parametrize("name", FILTERED)
def test_filtered(ranks, name, backend):
    """Each rank skips at most its part of the bound; loss and column sums stay exact, the rest is within the bound."""
    asked, filters = FILTERED[name]
    given = problem(backend, EXACT[backend], torch.float64, FILTERED_COUNT)
    found, bounds, masses = zip(*(rank["filtered", name, backend] for rank in ranks), strict=True)
    *results, skipped_max, d_input, d_weight, d_bias = joined(found)
    *true, _, true_input, true_weight, true_bias = run(losses(**asked), given, ALONE, "torch")
    rounding = 1e-12 if backend == "torch" else ROUNDING[EXACT[backend]]
    assert_same(found)
    for ours, expected in zip((*results, d_bias), (*true, true_bias), strict=True):
        assert error(ours, expected) <= rounding
    assert all(rank == {bound / len(ranks) for bound in filters.values()} for rank in bounds)
    assert all(most <= delta + 1e-12 for rank in masses for delta, most in rank)
    assert backend == "cpu" or max(most for rank in masses for _, most in rank) > 0
    assert 0 < skipped_max <= max(filters.values()) + rounding
    # in L1 a token's gradient is off by at most twice the bound times its weight
    weight = upstream(len(d_input)).abs() if name == "none" else torch.full((len(d_input),), 1 / true[-1])
    off = (d_input - true_input).abs().amax(-1)
    assert (off <= 2 * DELTA * weight * given["w"].abs().max() + rounding).all() and off.max() > 1e-6
    assert error(d_weight, true_weight) > 1e-6


@each_backend
def test_a_refusal_is_everyones(ranks, backend):
    """A workspace that is too small for the largest shard is too small for all: no rank waits for another."""
    for rank in ranks:
        assert len(rank["refused", backend]) == 4 and rank["refused", backend] == ranks[0]["refused", backend]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    importlib.import_module("conftest")         # as pytest does
    worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
