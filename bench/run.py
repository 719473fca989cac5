"""``python bench/run.py losses``: losses of a head against peers. Ends in JSON, and a Markdown table on the screen."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Annotated

import torch
import typer
from ssd_core.bench import cases, measure, peers

import ssd_core

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"    # around README's table

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
Cache = Annotated[Path, typer.Option(help="folder of cached hidden states")]
Readme = Annotated[Path | None, typer.Option(help="file whose table to replace")]


@app.command()
def losses(
    tokens: int = 2048, dtypes: list[str] = ["float32", "bfloat16"],  # noqa: B006  typer's way of a default list
    samples: Annotated[int, typer.Option(help="timed calls of each variant")] = 20,
    cache: Cache = Path("build/bench"), out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
    readme: Readme = None,
):
    """Loss and gradients of SmolLM2's head on real hidden states: error, time over three bare GEMMs, extra memory."""
    result = {**_machine(), "op": "linear_cross_entropy", "tokens": tokens, "rows": []}
    for dtype in dtypes:
        case = cases.smollm2(tokens, cache).to(getattr(torch, dtype))
        result |= {"case": case.name, "inputs": case.about, "hidden": case.weight.shape[1],
                   "vocab": case.weight.shape[0]}
        true = measure.truth(case)
        floor = "three bare GEMMs"
        functions, facts = {floor: measure.gemm_floor(case)}, {}
        for variant in peers.variants():
            if variant.loss is None:
                facts[variant.name] = {"missing": variant.missing}
                continue
            # a variant that is wrong would get no time; its error stands beside the others'
            error = measure.errors(measure.gradients(variant.loss, case), true)
            extra = measure.peak_extra([variant.name, dtype, str(tokens), "--cache", str(cache)])
            facts[variant.name] = {"errors": error, "extra_bytes": extra, "workspace": variant.workspace}
            functions[variant.name] = lambda loss=variant.loss, case=case: measure.gradients(loss, case)
        del true
        times = measure.interleaved(functions, samples)
        base = times[floor]["median"]
        rate = case.gemm_flops / base / 1e9
        result["rows"].append({"variant": floor, "dtype": dtype, "time": times[floor], "over_floor": 1.0,
                               "gflops": rate})
        for name, fact in facts.items():
            timing = {"time": times[name], "over_floor": times[name]["median"] / base} if name in times else {}
            result["rows"].append({"variant": name, "dtype": dtype, **fact, **timing})
    result["load_average_after"] = os.getloadavg()
    print(table(result))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    if readme:
        _replace_table(readme, result)


@app.command(hidden=True)
def memory_probe(variant: str, dtype: str, tokens: int, cache: Cache = Path("build/bench")):
    loss = next(v.loss for v in peers.variants() if v.name == variant)
    case = cases.smollm2(tokens, cache).to(getattr(torch, dtype))
    print(json.dumps({"extra": measure.memory_probe(loss, case)}))


@app.command("table")
def show(file: Path, readme: Readme = None):
    """The Markdown table of a JSON file."""
    result = json.loads(file.read_text())
    print(table(result))
    if readme:
        _replace_table(readme, result)


def _replace_table(readme: Path, result: dict) -> None:
    before, _, rest = readme.read_text().partition(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{table(result)}\n{END}{rest.partition(END)[2]}")


def table(result: dict) -> str:
    """Markdown, as README shows it."""
    lines = [
        f"{result['cpu']}, {result['threads']} threads, torch {result['torch']}, commit {result['commit']}: N = "
        f"{result['tokens']}, D = {result['hidden']}, V = {result['vocab']:,}; {result['inputs']}.", "",
        "| forward + backward | dtype | time / three bare GEMMs | extra memory, MiB | error d_input | error d_weight |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [row["variant"], row["dtype"]]
        if "missing" in row:
            cells += [f"({row['missing']})", "", "", ""]
        else:
            gflops = f" ({row['gflops']:.0f} GFLOP/s)" if "gflops" in row else ""
            extra = f"{row['extra_bytes'] / 2**20:.0f}" if "extra_bytes" in row else ""
            error = [f"{row['errors'][k]:.1e}" for k in ("d_input", "d_weight")] if "errors" in row else ["", ""]
            cells += [f"{row['over_floor']:.2f}{gflops}", extra, *error]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _machine() -> dict:
    def git(*arguments):
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip() if done.returncode == 0 else ""

    cpu = next((line.split(":")[1].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")),
               platform.processor())
    return {
        "date": datetime.date.today().isoformat(), "commit": git("rev-parse", "--short", "HEAD") or "unknown",
        "uncommitted": bool(git("status", "--porcelain", "--untracked-files=no")), "ssd_core": ssd_core.__version__,
        "torch": torch.__version__, "python": platform.python_version(), "system": platform.platform(), "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg(),
    }


def _read(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


if __name__ == "__main__":
    app()
