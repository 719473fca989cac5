"""From a byte budget to chunks; and a vocabulary that fits no row: right, and in memory that does not depend on V.

The memory probes run this file as a script.
"""

import ctypes
import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_core import (
    SparseTarget,
    TeacherHidden,
    linear_cross_entropy,
    linear_distill,
    linear_logprob,
    release_workspace,
)
from ssd_core import plan as plans
from ssd_core.chunked.logits import block_elements
from ssd_core.plan import MIB, Demand, plan_chunks

MILLION = 1 << 20
BUDGET = 8 * MIB


# -- problems and calls that the probe and the tests share ------------------------------------------------------------


def problem(n, d, v, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    y = torch.randint(v, (n,), generator=g)
    ids = torch.randint(v, (n, 4), generator=g)
    probs = torch.rand(n, 4, generator=g) / 4
    return {"x": random(n, d), "w": random(v, d), "b": random(v), "y": y, "ids": ids, "probs": probs,
            "states": random(n, d), "class_weight": torch.rand(v, generator=g) + 0.1}


def hidden(t):
    return TeacherHidden(t["states"], t["w"].detach(), t["b"].detach())


CALLS = {
    "hard": lambda t, **options: linear_cross_entropy(t["x"], t["w"], t["y"], linear_bias=t["b"], **options),
    "weights": lambda t, **options: linear_cross_entropy(
        t["x"], t["w"], t["y"], linear_bias=t["b"], label_smoothing=0.1, weight=t["class_weight"], softcap=4.0,
        **options),
    "bucket": lambda t, **options: linear_cross_entropy(
        t["x"], t["w"], SparseTarget(t["ids"], t["probs"]), linear_bias=t["b"], tail="bucket", softcap=5.0,
        temperature=1.5, label_smoothing=0.1, **options),
    "probabilities": lambda t, **options: linear_cross_entropy(
        t["x"], t["w"], t["x"].new_full((len(t["x"]), 1), 1 / len(t["w"])).expand(-1, len(t["w"])), linear_bias=t["b"],
        label_smoothing=0.1, weight=t["class_weight"], softcap=5.0, temperature=1.5, **options),
    "none": lambda t, **options: linear_cross_entropy(
        t["x"], t["w"], t["y"], linear_bias=t["b"], reduction="none", **options).sum(),
    "filter": lambda t, **options: linear_cross_entropy(
        t["x"], t["w"], t["y"], linear_bias=t["b"], grad_filter=0.1, **options),
    "filter, most stays": lambda t, **options: linear_cross_entropy(
        t["x"], t["w"], t["y"], logit_scale=0.02, grad_filter=0.001, **options),
    "filter, two bounds, most stays": lambda t, **options: linear_cross_entropy(
        t["x"], t["w"], t["y"], logit_scale=0.02, grad_filter=0.001, grad_filter_weight=0.002, **options),
    "distill, sparse": lambda t, **options: linear_distill(
        t["x"], t["w"], SparseTarget(t["ids"], t["probs"]), linear_bias=t["b"], divergence="reverse_kl", **options),
    "distill, hidden": lambda t, **options: linear_distill(
        t["x"], t["w"], hidden(t), linear_bias=t["b"], divergence="jsd", temperature=1.5, softcap=5.0,
        target=t["y"], ce_weight=0.3, weight=t["class_weight"], label_smoothing=0.1, **options),
    "logprob": lambda t, **options: sum(
        value.mean() for value in linear_logprob(
            t["x"], t["w"], t["y"], linear_bias=t["b"], temperature=1.5, softcap=5.0, **options)[:2]),
}


def probe(name, n, d, v, dtype, workspace, backend, frozen):
    """Peak resident bytes of the second call beyond what was there and what it returns. Linux only."""
    torch.set_num_threads(1)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast")
    t = problem(n, d, v, torch.float32 if dtype == "autocast" else getattr(torch, dtype))
    t["x"].requires_grad_()
    t["w"].requires_grad_(not frozen)
    leaves = [t["x"]] if frozen else [t["x"], t["w"]]

    def step():
        with mixed:
            loss = CALLS[name](t, workspace_bytes=workspace, backend=backend)
        return torch.autograd.grad(loss, leaves)

    step()
    release_workspace()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")       # resets the peak
    before = resident("VmRSS")
    grads = step()
    return resident("VmHWM") - before - sum(grad.numel() * grad.element_size() for grad in grads)


def resident(field):
    return 1024 * int(re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.M)[1])


# -- plans ------------------------------------------------------------------------------------------------------------


def taken(demand, plan, workspace):
    """Bytes that a plan needs, by the parts that ``Demand`` counts."""
    product = 0
    if demand.dtype.itemsize == 2 or demand.cast:
        product = plan.columns * demand.hidden * (demand.dtype.itemsize + (4 if demand.cast else 0))
    return demand.fixed() + product + demand.row_pass(plan.tile) + plan.rows * demand.row(plan.tile)


demands = st.builds(
    Demand, tokens=st.sampled_from([0, 1, 2, 37, 2048, 32768]), hidden=st.sampled_from([1, 64, 576, 4096]),
    vocab=st.sampled_from([1, 7, 64, 100, 600, 49152, 262144, MILLION]), support=st.sampled_from([1, 20]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    device=st.sampled_from([torch.device("cpu"), torch.device("cuda")]), gathered=st.booleans(), cast=st.booleans(),
    logits=st.sampled_from([1, 2]), buffers=st.sampled_from([5, 6, 10]), passes=st.sampled_from([1, 2]),
    wide_input=st.booleans(), filtered=st.sampled_from([0, 1, 2]))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(demands, st.sampled_from([None, 1000, 4 * MIB, 8 * MIB, 64 * MIB, 128 * MIB, 512 * MIB, 4096 * MIB]))
def test_plans_keep_to_the_budget_or_say_what_is_needed(demand, workspace):
    budget = workspace or plans.DEFAULT_WORKSPACE.get(demand.device.type, plans.ACCELERATOR_WORKSPACE)
    try:
        plan = plan_chunks(demand, workspace)
    except ValueError as refusal:
        least = int(re.search(r"expected at least (\d+) for ", str(refusal))[1])
        assert str(refusal).endswith(f"got {budget}") and least > budget
        assert plan_chunks(demand, least).rows == 1
        with pytest.raises(ValueError, match=f"expected at least {least} for "):
            plan_chunks(demand, least - 1)
        return
    assert plan.route == "chunked" and 1 <= plan.rows <= max(1, demand.tokens)
    assert 1 <= plan.tile <= demand.vocab and 1 <= plan.columns <= demand.vocab
    if demand.filtered:
        assert plan.tile == demand.vocab
    if demand.tokens:
        assert taken(demand, plan, budget) <= budget


SMALL = Demand(tokens=2048, hidden=64, vocab=49152, support=1, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("demand", [
    SMALL, Demand(2048, 64, MILLION, 1, torch.float32, torch.device("cpu"), filtered=1),
    Demand(2048, 64, MILLION, 1, torch.float64, torch.device("cpu"), logits=2)])
def test_the_least_workspace_of_a_refusal_is_enough(demand):
    with pytest.raises(ValueError, match=r"workspace_bytes: expected at least \d+ for") as refusal:
        plan_chunks(demand, 1000)
    least = int(re.search(r"at least (\d+)", str(refusal.value))[1])
    plan = plan_chunks(demand, least)
    assert plan.rows == 1 and taken(demand, plan, least) <= least
    with pytest.raises(ValueError, match="workspace_bytes"):
        plan_chunks(demand, least - 1)


def test_whole_rows_while_they_are_many_and_tiles_when_they_are_few():
    """Adding up d_weight costs a pass over it for each chunk; computing logits again costs a product."""
    smollm2 = dataclasses.replace(SMALL, hidden=576)
    assert plan_chunks(smollm2, 1 << 40) == plans.ChunkPlan(2048, 49152, 49152)    # all at once
    many, few = plan_chunks(smollm2, 64 * MIB), plan_chunks(smollm2, 8 * MIB)
    assert many.tile == 49152 and many.rows > 4 * plans.BALANCE[4][0]
    assert few.tile < 49152 and few.rows > 100
    # 25 whole rows would fit: where looks or products cost more, and nothing is added up, they are cheaper than tiles
    for change in ({"passes": 12}, {"hidden": 8}, {"d_weight": False}):
        assert plan_chunks(dataclasses.replace(smollm2, **change), 8 * MIB).tile == 49152
    # an accelerator's products are cheaper next to its memory: it computes logits again where a CPU does not
    wide = dataclasses.replace(SMALL, tokens=8192, hidden=4096)
    accelerated = dataclasses.replace(wide, device=torch.device("cuda"))
    assert plan_chunks(wide, 128 * MIB).tile == 49152 > plan_chunks(accelerated, 128 * MIB).tile


def test_defaults_by_device():
    cpu, cuda = (plan_chunks(Demand(10**6, 64, 49152, 1, torch.float32, torch.device(kind)), None)
                 for kind in ("cpu", "cuda"))
    assert cpu == plan_chunks(Demand(10**6, 64, 49152, 1, torch.float32, torch.device("cpu")), 64 * MIB)
    assert cuda.rows * cuda.tile > 4 * cpu.rows * cpu.tile


# of backend "triton", whose kernels look at float32 logits where they are, or where they are computed
ROUTES = dataclasses.replace(
    SMALL, tokens=8192, hidden=4096, vocab=131072, dtype=torch.bfloat16, device=torch.device("cuda"), buffers=0,
    wide_logits=True, tiled=lambda rows: 56 * min(rows * 1024, 131072 + rows))
TIGHT = dataclasses.replace(ROUTES, vocab=262144)


@pytest.mark.parametrize(("demand", "workspace", "route"), [
    (ROUTES, 4096 * MIB, "chunked"),                                            # three products, and all logits at once
    (TIGHT, 512 * MIB, "tiled"),                                                # 512 rows: d_weight is added up often
    (dataclasses.replace(TIGHT, d_weight=False), 512 * MIB, "chunked"),         # of a frozen head it is not
    (dataclasses.replace(ROUTES, hidden=576), 4096 * MIB, "tiled"),             # moving them costs more than computing
    (dataclasses.replace(ROUTES, dtype=torch.float32), 4096 * MIB, "chunked"),  # which without tensor cores is slow
    (dataclasses.replace(ROUTES, tiled=None, hidden=576), 4096 * MIB, "chunked")])
def test_the_cheaper_of_two_routes(demand, workspace, route, monkeypatch):
    monkeypatch.delenv("SSD_CORE_ROUTE", raising=False)
    assert plan_chunks(demand, workspace).route == route
    for named in plans.ROUTES:
        monkeypatch.setenv("SSD_CORE_ROUTE", named)
        assert plan_chunks(demand, workspace).route == (named if demand.tiled else "chunked")


def test_a_route_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("SSD_CORE_ROUTE", "tile")
    with pytest.raises(ValueError, match="SSD_CORE_ROUTE: expected 'chunked' or 'tiled', got 'tile'"):
        plan_chunks(ROUTES, None)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(demands, st.sampled_from([None, 1000, 4 * MIB, 64 * MIB, 512 * MIB]))
def test_tiled_plans_keep_to_the_budget_or_say_what_is_needed(demand, workspace):
    demand = dataclasses.replace(demand, filtered=False, buffers=0, logits=1, wide_logits=True, tiled=ROUTES.tiled)
    budget = workspace or plans.DEFAULT_WORKSPACE.get(demand.device.type, plans.ACCELERATOR_WORKSPACE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSD_CORE_ROUTE", "tiled")
        try:
            plan = plan_chunks(demand, workspace)
        except ValueError as refusal:
            least = int(re.search(r"expected at least (\d+) for ", str(refusal))[1])
            assert least > budget and plan_chunks(demand, least).rows == 1
            with pytest.raises(ValueError, match=f"expected at least {least} for "):
                plan_chunks(demand, least - 1)
            return
    assert plan.route == "tiled" and 1 <= plan.rows <= max(1, demand.tokens) and 1 <= plan.tile <= demand.vocab
    lean = dataclasses.replace(demand, wide_logits=False)
    assert taken(lean, plan, budget) + demand.tiled(plan.rows) <= budget


def test_a_tile_that_is_wider_than_a_block_is_counted():
    """A block of the row pass is a row at least, however wide."""
    demand = Demand(1, 8, MILLION, 1, torch.float32, torch.device("cpu"))
    for workspace in (4 * MIB, 6 * MIB, 12 * MIB, 24 * MIB, 40 * MIB):
        plan = plan_chunks(demand, workspace)
        assert taken(demand, plan, workspace) <= workspace
    assert plan_chunks(demand, 6 * MIB).tile > block_elements(demand.device)
    assert plan_chunks(demand, 40 * MIB).tile == MILLION


# -- right ------------------------------------------------------------------------------------------------------------


def error(found, true):
    return ((found.double() - true).norm() / true.norm()).item()


@pytest.mark.parametrize(("name", "backend"), [
    *((name, "torch") for name in CALLS if not name.startswith("filter")),
    *((name, "cpu") for name in ("hard", "weights", "bucket", "none"))])
def test_a_million_ids_in_8_mib(name, backend, monkeypatch):
    """A row of float32 logits is half of the budget and a block of the row pass three times all of it."""
    made = []

    def planning(*given):
        made.append(plan_chunks(*given))
        return made[-1]

    for op in ("cross_entropy", "distill", "logprob"):
        monkeypatch.setattr(f"ssd_core.ops.linear_{op}.plan_chunks", planning)
    t = problem(5, 6, MILLION)
    leaves = [t[key].requires_grad_() for key in "xwb"]
    wide = {key: value.detach().double() if value.is_floating_point() else value for key, value in t.items()}
    wide_leaves = [wide[key].requires_grad_() for key in "xwb"]
    true, plain = CALLS[name](wide, backend="reference"), CALLS[name](t, backend="reference")
    expected, unfused = torch.autograd.grad(true, wide_leaves), torch.autograd.grad(plain, leaves)
    made.clear()
    loss = CALLS[name](t, workspace_bytes=BUDGET, backend=backend)
    assert error(loss.detach(), true.detach()) < 1e-6
    for grad, reference, eager in zip(torch.autograd.grad(loss, leaves), expected, unfused, strict=True):
        assert error(grad, reference) < max(2e-6, 1.1 * error(eager, reference))
    assert made and all(plan.tile < MILLION / 4 for plan in made)


# -- memory -----------------------------------------------------------------------------------------------------------

linux = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")


def measured(*arguments):
    """``probe`` in a process of its own that gives freed memory back at once."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
                   "MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-P", __file__, json.dumps(arguments)], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


every_call = [pytest.param(name, marks=[] if name == "hard" else pytest.mark.all) for name in CALLS
              if not name.startswith("filter")]


@linux
@pytest.mark.parametrize("name", every_call)
def test_memory_does_not_depend_on_the_vocabulary(name):
    """Forward and d_input with a frozen head: 131,072 and 1,048,576 ids need the same, and keep to the budget."""
    small, large = (measured(name, 48, 8, v, "float32", BUDGET, "torch", True) for v in (MILLION // 8, MILLION))
    assert BUDGET / 3 < small <= BUDGET and BUDGET / 3 < large <= BUDGET
    assert abs(large - small) < MIB


@linux
@pytest.mark.all
@pytest.mark.parametrize(("dtype", "frozen"), [
    ("float32", False), ("float64", True), ("bfloat16", True), ("bfloat16", False)])
@pytest.mark.parametrize("name", CALLS)
def test_the_workspace_is_kept(name, dtype, frozen):
    """By the filter and a teacher's head, too. Several chunks of 16-bit numbers add up d_weight in float32."""
    v, d = 12000, 64
    extra = measured(name, 600, d, v, dtype, 16 * MIB, "torch", frozen)
    accumulator = v * d * 4 if dtype == "bfloat16" and not frozen else 0
    assert 16 * MIB / 3 < extra <= 16 * MIB + accumulator


@linux
@pytest.mark.all
@pytest.mark.parametrize("name", ["filter, most stays", "filter, two bounds, most stays"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_workspace_is_kept_by_what_waits(dtype, frozen, name):
    """Backend "cpu" holds back what its filter leaves: here most of it, which is more than the budget."""
    n, v, d = 2048, 20000, 256
    extra = measured(name, n, d, v, dtype, 32 * MIB, "cpu", frozen)
    accumulator = v * d * 4 if dtype == "bfloat16" and not frozen else 0
    assert 32 * MIB / 2 < extra <= 1.05 * 32 * MIB + accumulator


@linux
@pytest.mark.all
@pytest.mark.parametrize(("backend", "name"), [("torch", "hard"), ("cpu", "hard"), ("torch", "logprob")])
def test_the_workspace_is_kept_under_autocast(backend, name):
    """A float32 weight of 24 MiB: a 16-bit copy of it, 12 MiB, would not be within the budget."""
    extra = measured(name, 600, 512, 12288, "autocast", 16 * MIB, backend, True)
    assert 16 * MIB / 3 < extra <= 16 * MIB


if __name__ == "__main__":
    print(probe(*json.loads(sys.argv[1])))
