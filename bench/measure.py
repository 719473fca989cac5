"""How it is measured: correctness first, then time in one interleaved run, then memory in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def gradients(loss: Callable, case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, d_input and d_weight of one forward and backward."""
    x, w = case.input.detach().requires_grad_(), case.weight.detach().requires_grad_()
    value = loss(x, w, case.target)
    value.backward()
    return value.detach(), x.grad, w.grad


def truth(case, rows: int = 128) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same in float64, of the inputs as they are rounded to the case's dtype."""
    x, w = case.input.double(), case.weight.double()
    loss, dx, dw = 0.0, torch.empty_like(x), torch.zeros_like(w)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        z = x[part] @ w.T
        y = case.target[part].unsqueeze(1)
        log_q = z.log_softmax(-1)
        loss -= log_q.gather(1, y).sum() / len(x)
        grad = log_q.exp_().scatter_add_(1, y, torch.full(y.shape, -1.0, dtype=torch.float64)) / len(x)
        dx[part] = grad @ w
        dw += grad.T @ x[part]
    return loss, dx, dw


def errors(found, true) -> dict:
    """Relative errors in norm, and of the rows (median and 99th percentile)."""
    out = {"loss": abs(found[0].item() - true[0].item()) / abs(true[0].item())}
    for name, value, reference in zip(("d_input", "d_weight"), found[1:], true[1:], strict=True):
        difference = value.double() - reference
        rows = difference.norm(dim=1) / reference.norm(dim=1).clamp_min(1e-300)
        out[name] = (difference.norm() / reference.norm()).item()
        out[f"{name}_row_median"] = rows.median().item()
        out[f"{name}_row_p99"] = rows.quantile(0.99).item()
    return out


def gemm_floor(case) -> Callable[[], None]:
    """The three products that any exact method needs, bare, into outputs that are there already."""
    x, w = case.input, case.weight
    z = x.new_empty(len(x), len(w))
    dx, dw = torch.empty_like(x), torch.empty_like(w)

    def run():
        torch.mm(x, w.t(), out=z)
        torch.mm(z, w, out=dx)
        torch.mm(z.t(), x, out=dw)

    return run


def interleaved(functions: dict[str, Callable[[], None]], samples: int) -> dict[str, dict]:
    """Median, 20th and 80th percentile in seconds; one call of each in turn, ``samples`` times after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(samples + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:
                times[name].append(time.perf_counter() - start)
    out = {}
    for name, values in times.items():
        values.sort()
        out[name] = {"median": statistics.median(values), "p20": values[len(values) // 5],
                     "p80": values[-1 - len(values) // 5], "samples": len(values)}
    return out


def peak_extra(arguments: list[str]) -> int:
    """Peak resident bytes beyond inputs and returned gradients, of one forward and backward in a fresh process that
    gives freed memory back at once: ``memory_probe`` run with ``arguments``."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
                   "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ssd_core.bench.run", "memory-probe", *arguments], env=environment,
        capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"memory probe {arguments} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["extra"]


def memory_probe(loss: Callable, case) -> int:
    """See ``peak_extra``; Linux only. A first call at full size warms the libraries up and is given back."""
    gradients(loss, case)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")       # resets the peak
    before = _kibibytes(status.read_text(), "VmRSS")
    found = gradients(loss, case)
    peak = _kibibytes(status.read_text(), "VmHWM")
    returned = sum(t.numel() * t.element_size() for t in found[1:])
    return (peak - before) * 1024 - returned


def _kibibytes(status: str, field: str) -> int:
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field + ":"))
