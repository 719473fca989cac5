"""Every op and backend of ours on a device, small and odd shapes, against float64: a smoke test before any timing.

    python -P -m ssd_core.bench.gpu_check --device cuda --out check.json
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Optional

import typer
from ssd_core.bench.jobs import Job, run
from ssd_core.bench.ops import OPS

SHAPES = (("4099x128", 257), ("32768x64", 128))         # odd sizes; a vocabulary beyond one block


def main(
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu")] = "cuda",
    dtypes: Annotated[str, typer.Option(help="comma-separated")] = "float32,bfloat16,float16",
    out: Annotated[Optional[Path], typer.Option(help="JSON file to write")] = None,  # noqa: UP045
):
    """Exit code 1 if a variant of ours is wrong or fails, or if an op has none that runs."""
    checks, bad = [], 0
    for op, dtype, (case, tokens) in itertools.product(OPS, dtypes.split(","), SHAPES):
        one = run(Job(op, case, tokens, dtype, device), wanted=("ssd-core",), samples=0, memory=False)
        checks.append(one)
        bad += not any(row["status"] == "right" for row in one["rows"])
        for row in one["rows"]:
            bad += row["status"] in ("wrong", "failed")
            errors = ", ".join(f"{name} {value:.1e}" for name, value in row.get("errors", {}).items())
            print(f"{row['status']:8} {op} {case} {dtype} {row['variant']}: {errors} {row['reason']}".rstrip())
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"device": device, "bad": bad, "checks": checks}, indent=1) + "\n")
    print(f"{bad} wrong, failed or without a backend")
    raise typer.Exit(bool(bad))


if __name__ == "__main__":
    typer.run(main)
