"""A job: checked first, then timed, its memory measured."""

import dataclasses
import json
import sys

import pytest
import torch
from ssd_core.bench import jobs, peers

JOB = jobs.Job("linear_cross_entropy", "97x16", 50, "float32")


def ask(monkeypatch, job=JOB, **functions):
    """The rows of a run of eager PyTorch and of the given variants, none of them timed for long."""
    eager = peers.PEERS[job.op][0].function
    variants = [peers.Variant("eager", eager)]
    variants += [v if isinstance(v, peers.Variant) else peers.Variant(name, v) for name, v in functions.items()]
    monkeypatch.setattr(jobs.Job, "variants", lambda self, softcap: variants)
    result = jobs.run(job, samples=3, memory=False)
    return {row["variant"]: row for row in result["rows"]}


def test_a_wrong_variant_gets_its_error_and_no_time(monkeypatch):
    eager = peers.PEERS[JOB.op][0].function
    rows = ask(monkeypatch, twice=lambda t: 2 * eager(t), same=lambda t: eager(t))
    assert rows["twice"]["status"] == "wrong" and rows["twice"]["errors"]["d_input"] > 0.5
    assert "time" not in rows["twice"] and "over_floor" not in rows["twice"]
    for name in ("eager", "same"):
        assert rows[name]["status"] == "timed" and rows[name]["time"]["samples"] == 3 and rows[name]["over_floor"] > 0


def test_nan_is_wrong(monkeypatch):
    eager = peers.PEERS[JOB.op][0].function
    assert ask(monkeypatch, nan=lambda t: torch.nan * eager(t))["nan"]["status"] == "wrong"


def test_a_declared_bound_and_a_certificate(monkeypatch):
    eager = peers.PEERS[JOB.op][0].function
    off = lambda t: 1.01 * eager(t)  # noqa: E731
    rows = ask(
        monkeypatch, exact=off, filtered=peers.Variant("filtered", off, bound=0.05),
        broken=peers.Variant("broken", off, bound=0.05, certificate=lambda t: {"skipped_max": 0.5, "holds": False}))
    assert [rows[name]["status"] for name in ("exact", "filtered", "broken")] == ["wrong", "timed", "wrong"]
    assert rows["broken"]["certificate"]["skipped_max"] == 0.5 and rows["filtered"]["bound"] == 0.05


def test_a_variant_that_fails_does_not_end_the_run(monkeypatch):
    def fail(t):
        raise MemoryError("no room\nfor it")

    rows = ask(monkeypatch, fails=fail, gone=peers.Variant("gone", None, "not installed"))
    assert rows["fails"]["status"] == "failed" and rows["fails"]["reason"] == "MemoryError: no room"
    assert rows["gone"]["status"] == "missing" and rows["gone"]["reason"] == "not installed"
    assert rows["eager"]["status"] == "timed"


def test_one_that_fails_later_does_not_end_the_others(monkeypatch):
    eager = peers.PEERS[JOB.op][0].function
    calls = []

    def tires(t):
        calls.append(t)
        if len(calls) > 2:
            raise RuntimeError("out of memory")
        return eager(t)

    rows = ask(monkeypatch, tires=tires)
    assert rows["tires"]["reason"] == "RuntimeError: out of memory" and "time" not in rows["tires"] and len(calls) == 3
    assert rows["eager"]["time"]["samples"] == 3


def test_memory_that_cannot_be_measured_does_not_end_the_run(monkeypatch):
    def fail(job, variant, problem):
        raise RuntimeError("probe failed")

    monkeypatch.setattr(jobs, "_memory", fail)
    (row,) = jobs.run(JOB, wanted=("eager",), samples=3)["rows"]
    assert row["status"] == "timed" and row["extra_bytes"] is None and row["memory_reason"] == "probe failed"


def test_a_sampler_that_draws_outside_the_support_is_wrong(monkeypatch):
    rows = ask(monkeypatch, dataclasses.replace(JOB, op="sample"),
               anything=lambda t: torch.randint(97, (len(t.logits),)))
    assert rows["anything"]["status"] == "wrong" and rows["eager"]["status"] == "timed"


def test_only_checked(monkeypatch):
    result = jobs.run(JOB, wanted=("eager",), samples=0, memory=False)
    assert {row["status"] for row in result["rows"]} == {"right"} and "time" not in result["floor"]


def test_fewer_tokens_where_the_machine_is_small():
    job = dataclasses.replace(JOB, tokens=1000, most_flops=6 * 97 * 16 * 130)
    case = job.problem().case
    assert case.tokens == 128 and case.scaled.startswith("N 1000 -> 128")
    rows = dataclasses.replace(JOB, op="softmax", tokens=1000, most_logits=97 * 70).problem().case
    assert rows.tokens == 64


def test_a_job_travels_as_json():
    job = dataclasses.replace(JOB, workspaces=(16, 64), axis="N", frozen=True)
    assert jobs.Job.from_json(job.to_json()) == job and json.loads(job.to_json())["op"] == "linear_cross_entropy"


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_threads_of_each_variant_of_ours():
    job = dataclasses.replace(JOB, threads=(1, 2), workspaces=(64,))
    assert jobs.Job.from_json(job.to_json()) == job
    before, names = torch.get_num_threads(), [variant.name for variant in job.variants(None)]
    seen = []
    one = jobs._with_threads(peers.Variant("ours", lambda: seen.append(torch.get_num_threads())), 1)
    one.function()
    assert seen == [1] and one.name == "ours, 1 thread"
    assert {"PyTorch eager", "ssd-core cpu, 64 MiB, 1 thread", "ssd-core cpu, 64 MiB, 2 threads"} <= set(names)
    assert "ssd-core cpu, 64 MiB" not in names and torch.get_num_threads() == before


def test_peak_memory_of_a_fresh_process():
    """Eager PyTorch on 16 MiB of logits: those and, at least, their gradient."""
    from ssd_core.bench import measure

    extra = measure.peak_extra(jobs.Job("linear_cross_entropy", "32768x16", 128, "float32"), "PyTorch eager")
    assert 24 << 20 < extra < 80 << 20
    with pytest.raises(RuntimeError, match="memory probe of nobody failed"):
        measure.peak_extra(JOB, "nobody")
