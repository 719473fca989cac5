"""Where and on what it was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import ssd_core

PACKAGES = ("torch", "triton", "transformers", "cut-cross-entropy", "liger-kernel", "quack-kernels", "trl", "vllm")


def describe() -> dict:
    commit = _git("rev-parse", "--short", "HEAD")
    return {
        "date": datetime.date.today().isoformat(), "commit": commit or "unknown",
        "uncommitted": bool(commit and _git("status", "--porcelain", "--untracked-files=no")),
        "ssd_core": ssd_core.__version__, "python": platform.python_version(), "system": platform.platform(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "cpu": _cpu(), "capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "command": sys.argv[1:], "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def placed(file: dict) -> list[dict]:
    """A file's results, each with the machine and the commit that it is of: what was there when it was resumed may have
    another."""
    return [{"machine": file["machine"], **one} for one in file["results"]]


def line(machine: dict, device: str) -> str:
    """In a few words, for a table."""
    what = f"{machine['cpu']}, {machine['threads']} threads"
    if device.startswith("cuda") and machine["gpu"]:
        what = machine["gpu"][0]
    dirty = " with changes" if machine["uncommitted"] else ""
    return f"{what}, torch {machine['versions']['torch']}, commit {machine['commit']}{dirty}, {machine['date']}"


def _git(*arguments) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
