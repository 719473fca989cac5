"""One op on one case in one dtype: its variants are checked, timed in turn, and their memory measured."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import math
import sys
from pathlib import Path

import torch
from ssd_core.bench import cases, measure, ops, peers
from ssd_core.bench.verdict import thread_count

OUTSIDE = 0.005     # of a sampler's draws that may be outside the float64 support: rounding at the edge of top-p


@dataclasses.dataclass(frozen=True)
class Job:
    op: str
    case: str
    tokens: int
    dtype: str
    device: str = "cpu"
    frozen: bool = False                    # the head gets no gradient
    workspaces: tuple[int, ...] = ()        # MiB; empty: the device's usual ones
    most_flops: float | None = None         # of an op from hidden states: fewer tokens where that is too slow
    most_logits: float | None = None        # elements of (N, V): the same for an op on logits
    threads: tuple[int, ...] = ()           # each variant of ours once with each of these; empty: with all
    cache: str = "build/bench"
    axis: str = ""                          # "N", "V" or "D": a point of a plot over it

    @property
    def key(self) -> dict:
        """What tells its result from others'."""
        names = ("op", "case", "tokens", "dtype", "device", "frozen", "axis")
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        fields = json.loads(text)
        return Job(**{**fields, "workspaces": tuple(fields["workspaces"]), "threads": tuple(fields["threads"])})

    def problem(self) -> ops.Problem:
        head, op = cases.head(self.case), ops.OPS[self.op]
        if op.linear:
            tokens, scaled = cases.scale(
                self.tokens, 2 * op.products * head.vocab * head.hidden, self.most_flops, "FLOP")
        else:
            tokens, scaled = cases.scale(self.tokens, head.vocab, self.most_logits, "logits")
        case = cases.find(self.case, tokens, Path(self.cache), scaled)
        return ops.problem(op, case.to(getattr(torch, self.dtype), self.device), self.frozen)

    def variants(self, softcap) -> list[peers.Variant]:
        device = torch.device(self.device).type
        found = peers.variants(self.op, device, getattr(torch, self.dtype), softcap, self.workspaces)
        return found if not self.threads else [
            one for v in found for one in ([_with_threads(v, n) for n in self.threads] if v.ours else [v])]


def _with_threads(variant, number: int):
    def call(*arguments, **options):
        before = torch.get_num_threads()
        torch.set_num_threads(number)
        try:
            return variant.function(*arguments, **options)
        finally:
            torch.set_num_threads(before)

    return dataclasses.replace(variant, name=f"{variant.name}, {thread_count(number)}",
                               function=variant.function and call)


def run(job: Job, *, wanted=(), samples: int = 20, budget: float = math.inf, memory: bool = True) -> dict:
    """The job's result. ``wanted``: parts of names of the variants to run; empty: all. No samples: only checked."""
    torch._dynamo.reset()       # each shape is compiled for itself
    problem = job.problem()
    variants = [v for v in job.variants(problem.case.softcap)
                if not wanted or any(part.lower() in v.name.lower() for part in wanted)]
    case = problem.case
    result = {
        **job.key, "about": problem.op.about, "inputs": case.about, "scaled": case.scaled, "asked_tokens": job.tokens,
        "tokens": case.tokens, "hidden": case.weight.shape[1], "vocab": len(case.weight), "softcap": case.softcap,
        "floor": {"name": ops.floor_name(problem), "flops": problem.flops, "bytes": problem.bytes},
        "rows": [{"variant": v.name, "ours": v.ours, "workspace": v.workspace, "status": "missing", "reason": v.missing}
                 for v in variants],
    }
    pairs = [(variant, row) for variant, row in zip(variants, result["rows"], strict=True) if variant.function]
    result["unchecked"] = _check(problem, pairs, job)
    passed = [(variant, row) for variant, row in pairs if row["status"] == "right"]
    if memory:
        for variant, row in passed:
            try:
                row["extra_bytes"] = _memory(job, variant, problem)
            except RuntimeError as error:
                row |= {"extra_bytes": None, "memory_reason": str(error)[-500:]}
    if samples:
        _time(result, problem, passed, samples, budget)
    return result


def _check(problem, pairs, job) -> list[str]:
    """Fill in errors and status: "right", "wrong" or "failed". Names of the gradients that could not be checked."""
    if problem.op.define is None:
        for variant, row in pairs:
            _attempt(row, lambda v=variant: measure.draw_errors(v.function, problem))
            if row["status"] == "right":
                found = row["errors"]
                _judge(row, found["outside_support"] <= OUTSIDE and found["sigmas"] <= measure.SIGMAS)
        return []
    true = measure.truth(problem)
    eager = {}
    first = job.variants(problem.case.softcap)[0]
    _attempt(eager, lambda: measure.errors(measure.gradients(first.function, problem), true))
    exact = measure.bound(problem, eager.get("errors"))
    for variant, row in pairs:
        row["bound"] = variant.bound or exact
        if variant.name == first.name:
            row |= eager
        else:
            _attempt(row, lambda v=variant: measure.errors(measure.gradients(v.function, problem), true))
        if row["status"] == "right":
            _judge(row, measure.worst(row["errors"]) <= row["bound"])
        if row["status"] == "right" and variant.certificate is not None:
            _attempt(row, lambda v=variant: v.certificate(problem.leaves()), "certificate")
            _judge(row, row["status"] == "failed" or row["certificate"]["holds"])
    return [f"d_{name}" for name in problem.wrt if f"d_{name}" not in true]


def _attempt(row: dict, work, name: str = "errors") -> None:
    """What ``work`` finds goes into the row. A variant that fails says so; it does not end the run."""
    try:
        row |= {name: work(), "status": "right", "reason": ""}
    except Exception as error:
        row |= _failed(error)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _failed(error: Exception) -> dict:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return {"status": "failed", "reason": f"{type(error).__name__}: {text[:120]}"}


def _judge(row: dict, holds: bool) -> None:
    if not holds:
        row |= {"status": "wrong", "reason": "its error is above the bound"}


def _memory(job: Job, variant, problem) -> int | None:
    if problem.case.weight.device.type == "cuda":
        return measure.cuda_extra(variant.function, problem)
    return measure.peak_extra(job, variant.name) if sys.platform == "linux" else None


def _time(result, problem, passed, samples, budget) -> None:
    """Rows that passed get "time" and "over_floor"."""
    device = problem.case.weight.device
    synchronize = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    functions = {"floor": ops.floor(problem)}
    for variant, _ in passed:
        functions[variant.name] = functools.partial(measure.gradients, variant.function, problem)
    times = measure.interleaved(functions, samples, budget, synchronize)
    floor = result["floor"]
    if isinstance(times["floor"], Exception):
        raise times["floor"]
    floor["time"] = times["floor"]
    base = floor["time"]["median"]
    floor["rate"] = (floor["flops"] or floor["bytes"]) / base
    for variant, row in passed:
        time = times[variant.name]
        if isinstance(time, Exception):
            row |= _failed(time)
        else:
            row |= {"status": "timed", "time": time, "over_floor": time["median"] / base}


def probe(job: Job, variant: str) -> int:
    """What ``measure.peak_extra`` starts in a process of its own."""
    problem = job.problem()
    function = next(v.function for v in job.variants(problem.case.softcap) if v.name == variant)
    return measure.resident_extra(function, problem)
