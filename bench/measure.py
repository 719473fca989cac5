"""How it is measured: correctness first, then time in one interleaved run, then memory in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from ssd_core.bench.ops import PER_TOKEN, Problem, capped

from ssd_core import release_workspace

CHUNK = 1 << 24             # float64 logits at a time
LARGEST = 10 << 30          # bytes: the head and its gradient in float64 on a CPU
FACTOR = 3.0                # of eager's gradient error: more is wrong
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}    # never less
WITHOUT_EAGER = {torch.float64: 1e-10, torch.float32: 3e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
SIGMAS = 5.0                # that the mean log-probability of draws may be off


# -- correctness


def gradients(function: Callable, problem: Problem) -> dict[str, torch.Tensor]:
    """``value`` and ``d_<name>`` of one forward and backward."""
    given = problem.leaves()
    value = function(given)
    if problem.wrt:
        value.backward(getattr(given, "upstream", None))
    return {"value": value.detach(), **{f"d_{name}": getattr(given, name).grad for name in problem.wrt}}


def truth(problem: Problem) -> dict[str, torch.Tensor]:
    """The same in float64, of the inputs as they are rounded. Without ``d_weight`` where the machine cannot hold it."""
    linear, given = problem.op.linear, SimpleNamespace(**problem.given)
    w = given.weight.double() if linear else None
    wanted = linear and "weight" in problem.wrt
    wanted = wanted and (w.device.type != "cpu" or 2 * w.numel() * w.element_size() <= LARGEST)
    d_weight = torch.zeros_like(w) if wanted else None
    values, d_rows = [], []
    tokens, vocab = problem.case.tokens, len(problem.case.weight)
    rows = max(1, CHUNK // vocab)
    for start in range(0, tokens, rows):
        part = {name: value[start : start + rows] if name in PER_TOKEN else value
                for name, value in problem.given.items()}
        t = SimpleNamespace(**part)
        if "teacher_input" in part:
            t.teacher = capped(t.teacher_input.double() @ w.T, t.softcap)
        x = t.input.double() if linear else t.logits.double()
        u = (x @ w.T if linear else x).requires_grad_()         # the head's outputs
        value = problem.op.define(capped(u, t.softcap), t)
        (grad,) = torch.autograd.grad(value, u, t.upstream.double() if hasattr(t, "upstream") else None)
        values.append(value.detach())
        d_rows.append(grad @ w if linear else grad)
        if d_weight is not None:
            d_weight.addmm_(grad.T, x)
    value = torch.stack(values).sum() if values[0].ndim == 0 else torch.cat(values)
    found = {"value": value, f"d_{problem.wrt[0]}": torch.cat(d_rows)}
    return found if d_weight is None else {**found, "d_weight": d_weight}


def errors(found: dict, true: dict) -> dict[str, float]:
    """Relative errors in norm, and of the rows of what has rows (median and 99th percentile)."""
    out = {}
    for name, reference in true.items():
        value = found[name]
        if reference.ndim < 2:
            out[name] = ((value.double() - reference).norm() / reference.norm().clamp_min(1e-300)).item()
            continue
        pairs = zip(value.split(4096), reference.split(4096), strict=True)      # never a third copy of a head
        wrong, size = torch.cat([torch.stack(((v.double() - r).norm(dim=1), r.norm(dim=1))) for v, r in pairs], 1)
        rows = wrong / size.clamp_min(1e-300)
        out[name] = (wrong.norm() / size.norm().clamp_min(1e-300)).item()
        out[f"{name}_row_median"] = rows.median().item()
        out[f"{name}_row_p99"] = rows.sort().values[math.ceil(0.99 * len(rows)) - 1].item()
    return out


def bound(problem: Problem, eager: dict | None) -> float:
    """The largest error of a gradient that passes: 3 times eager's at that dtype (its worst), and rounding."""
    if eager is None:
        return WITHOUT_EAGER[problem.dtype]
    return max(FACTOR * worst(eager), ROUNDING[problem.dtype])


def worst(errors: dict) -> float:
    """Of the value and the gradients, in norm; NaN if there is one."""
    whole = [error for name, error in errors.items() if "_row_" not in name]
    return math.nan if any(map(math.isnan, whole)) else max(whole)


def draw_errors(function: Callable, problem: Problem, draws: int = 512) -> dict[str, float]:
    """Of a sampler: the share of draws outside the float64 support, and how many standard errors their mean
    log-probability is off its expectation."""
    t = SimpleNamespace(**problem.given)
    z = t.logits.double() / t.params.temperature
    values, order = z.topk(t.params.top_k, dim=-1)
    p = values.softmax(-1)
    # rounding may move the edge of top-p by one token: what is within it counts as support, not as expected mass
    edge = p.cumsum(-1) - p
    p = torch.where(edge < t.params.top_p, p, 0)
    p = p / p.sum(-1, keepdim=True)
    log_p = torch.full_like(z, -torch.inf).scatter(-1, order, p.log())
    expected = torch.special.entr(p).sum(-1).neg()
    variance = (p * (p.log().nan_to_num(neginf=0) - expected.unsqueeze(-1)).square()).sum(-1)
    outside, total, spread, count = 0, 0.0, 0.0, 0
    for turn in range(max(1, draws // len(z))):
        t.positions = torch.full_like(t.positions, turn)
        found = log_p.gather(-1, function(t).view(-1, 1)).squeeze(-1)
        inside = found.isfinite()
        outside += (~inside).sum().item()
        total += (found - expected)[inside].sum().item()
        spread += variance[inside].sum().item()
        count += len(found)
    return {"outside_support": outside / count, "sigmas": abs(total) / max(spread, 1e-300) ** 0.5}


# -- time


def interleaved(functions: dict[str, Callable[[], None]], samples: int, budget: float = math.inf,
                synchronize: Callable[[], None] = lambda: None) -> dict[str, dict | Exception]:
    """Median, 20th and 80th percentile in seconds: one call of each in turn, ``samples`` times after a warm-up or, if
    that is longer, for ``budget`` seconds (but three times at least). Of what raises, the exception: its turns end."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    raised: dict[str, Exception] = {}
    began = time.perf_counter()
    for turn in range(samples + 1):
        if turn > 3 and time.perf_counter() - began > budget:
            break
        for name in [name for name in functions if name not in raised]:
            try:
                synchronize()
                start = time.perf_counter()
                functions[name]()
                synchronize()
                if turn:
                    times[name].append(time.perf_counter() - start)
            except Exception as error:
                raised[name] = error
    return {name: raised.get(name) or spread(values) for name, values in times.items()}


def spread(values: list[float]) -> dict:
    values = sorted(values)
    return {"median": statistics.median(values), "p20": values[len(values) // 5],
            "p80": values[-1 - len(values) // 5], "samples": len(values)}


# -- memory


def cuda_extra(function: Callable, problem: Problem) -> int:
    """Peak bytes of the CUDA allocator beyond inputs and what is returned, of one call after a first."""
    gradients(function, problem)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = gradients(function, problem)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - _returned(found)


def peak_extra(job, variant: str) -> int:
    """Peak resident bytes beyond inputs and what is returned, of one call of a variant in a fresh process that gives
    freed memory back at once. ``job``: a ``jobs.Job``."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
                   "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ssd_core.bench.run", "memory-probe", job.to_json(), variant], env=environment,
        capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"memory probe of {variant} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["extra"]


def resident_extra(function: Callable, problem: Problem) -> int:
    """See ``peak_extra``; Linux only. A first call at full size warms the libraries up and is given back."""
    gradients(function, problem)
    release_workspace()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")       # resets the peak
    before = _kibibytes(status.read_text(), "VmRSS")
    found = gradients(function, problem)
    peak = _kibibytes(status.read_text(), "VmHWM")
    return (peak - before) * 1024 - _returned(found)


def _returned(found: dict) -> int:
    return sum(t.numel() * t.element_size() for t in found.values())


def _kibibytes(status: str, field: str) -> int:
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field + ":"))
