"""Who is measured, and why someone is not."""

import dataclasses
import importlib.util

import pytest
import torch
from ssd_core.bench import cases, measure, ops, peers

import ssd_core
from ssd_core import backends


def find(op, device="cpu", dtype=torch.float32, softcap=None, workspaces=()):
    return {v.name: v for v in peers.variants(op, device, dtype, softcap, workspaces)}


def test_each_missing_peer_has_its_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = find("linear_cross_entropy")
    assert found["cut-cross-entropy torch_compile"].missing == "cut_cross_entropy and triton not installed"
    assert found["TRL chunked"].missing == "trl not installed"
    assert found["Liger FLCE"].missing == "runs on cuda only"
    assert find("linear_cross_entropy", "cuda")["quack"].missing == "quack and triton not installed"
    assert find("linear_cross_entropy", softcap=30.0)["PyTorch linear_cross_entropy(options)"].missing == (
        "has no softcap")
    for op in ops.OPS:
        for variant in find(op).values():
            assert (variant.function is None) == bool(variant.missing), variant.name


def test_ours_come_from_the_registry(monkeypatch):
    names = find("linear_cross_entropy", workspaces=(32, 64)).keys()
    assert {"ssd-core cpu, 32 MiB", "ssd-core cpu, 64 MiB", "ssd-core torch, 64 MiB"} <= names
    assert "ssd-core torch, 32 MiB" not in names and not any("reference" in name for name in names)
    new = backends.Backend("linear_cross_entropy", "cuda", "nowhere:f", devices=("cuda",), lacks=("grad_filter",))
    monkeypatch.setattr(backends, "BACKENDS", (*backends.BACKENDS, new))
    there = find("linear_cross_entropy", "cuda")
    assert there["ssd-core cuda, 512 MiB"].workspace == 512 << 20 and there["ssd-core cuda, 2048 MiB"].function
    assert "grad_filter" in there["ssd-core cuda, 512 MiB, grad_filter=0.01"].missing
    assert find("linear_cross_entropy")["ssd-core cuda"].missing == "it serves cuda tensors, not cpu"


def test_an_op_that_is_not_there_yet(monkeypatch):
    monkeypatch.setattr(ssd_core, "__all__", [])
    (ours,) = (v for v in find("linear_distill").values() if v.ours)
    assert ours.missing == "ssd_core has no linear_distill yet"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ops.OPS)
def test_every_variant_that_is_here_is_right(op, dtype):
    problem = ops.problem(ops.OPS[op], cases.find("97x16", 50, cache=None).to(dtype, "cpu"))
    true = None if problem.op.define is None else measure.truth(problem)
    ran, eager = [], None
    for variant in find(op, dtype=dtype).values():
        slow = any(word in variant.name for word in ("compile", "axolotl", "Liger", "TRL", "vLLM"))
        if variant.function is None or slow:        # minutes of compilation, packages that few have
            continue
        ran.append(variant)
        if true is None:
            found = measure.draw_errors(variant.function, problem)
            assert found["outside_support"] == 0 and found["sigmas"] < 5, variant.name
            continue
        errors = measure.errors(measure.gradients(variant.function, problem), true)
        eager = eager or errors
        assert measure.worst(errors) <= (variant.bound or measure.bound(problem, eager)), variant.name
        if variant.certificate is not None:
            assert variant.certificate(problem.leaves())["holds"], variant.name
    assert sum(not v.ours for v in ran)
    assert sum(v.ours for v in ran) or ops.OPS[op].public not in ssd_core.__all__


def test_the_axolotl_style_method_without_compilation(monkeypatch):
    monkeypatch.setattr(peers, "_compiled", lambda function: function)
    problem = ops.problem(ops.OPS["linear_distill"], cases.find("97x16", 50, cache=None))
    errors = measure.errors(measure.gradients(peers._axolotl_style, problem), measure.truth(problem))
    assert measure.worst(errors) < 1e-5


def test_a_filtered_variant_declares_its_bound():
    ours = [v for v in find("linear_cross_entropy").values() if v.ours]
    filtered = [v for v in ours if "grad_filter" in v.name]
    assert filtered and all(v.bound == peers.FILTERED_BOUND for v in filtered)
    assert all(v.certificate is not None for v in filtered if v.function)
    assert all(v.bound is None for v in ours if v not in filtered)


def test_variants_are_records():
    with pytest.raises(dataclasses.FrozenInstanceError):
        find("softmax")["PyTorch eager"].name = "other"
