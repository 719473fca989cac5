"""``ssd-core bench``, and ``python bench/run.py``: every op against its peers.

A result file holds the machine, and for each op, case and dtype its floor and its variants: error, time, memory.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Optional

import typer
from ssd_core.bench import machine
from ssd_core.bench.cases import HEADS
from ssd_core.bench.runs import runs
from ssd_core.bench.table import BEGIN, END, table
from ssd_core.bench.tune import tune

from ssd_core.checks import UsageError
from ssd_core.files import write_json

__all__ = ["BEGIN", "END", "app", "main", "table"]

app = typer.Typer(help="Measure every op against its peers.", add_completion=False, no_args_is_help=True,
                  pretty_exceptions_enable=False, rich_markup_mode=None)

CPU_FLOPS = 4e11        # of a floor: about 2 s on two cores
CPU_LOGITS = 2**26      # elements

Ops = Annotated[str, typer.Option(help="comma-separated, or 'all'")]
Dtypes = Annotated[str, typer.Option(help="comma-separated")]
Devices = Annotated[str, typer.Option(help="comma-separated: cpu, cuda, cuda:1; 'auto': cuda if there is one")]
Peers = Annotated[str, typer.Option(help="comma-separated parts of names of variants, ours too; empty: all")]
Workspaces = Annotated[str, typer.Option(help="MiB, comma-separated; empty: 16,64,256 on a CPU, 512,1024,2048 on CUDA")]
Samples = Annotated[int, typer.Option(min=0, help="timed calls of each variant; 0: only check them")]
Budget = Annotated[float, typer.Option(help="seconds of timing for each op, case and dtype; 0: no limit")]
Memory = Annotated[bool, typer.Option(help="measure peak extra memory")]
Frozen = Annotated[bool, typer.Option("--frozen", help="the head gets no gradient")]
Threads = Annotated[str, typer.Option(help="comma-separated; each variant of ours once with each; empty: with all")]
MostFlops = Annotated[float, typer.Option(help="of a floor: fewer tokens above that; 0: no limit [4e11 on a CPU]",
                                          show_default=False)]
MostLogits = Annotated[float, typer.Option(help="of an op on logits, elements: fewer tokens above that; 0: no limit "
                                                "[2^26 on a CPU]", show_default=False)]
Cache = Annotated[Path, typer.Option(help="folder of real hidden states; drawn where it lacks them")]
Out = Annotated[Optional[Path], typer.Option(help="JSON file to write")]  # noqa: UP045  a runtime annotation
Resume = Annotated[bool, typer.Option("--resume", help="keep what the JSON file holds already")]
Readme = Annotated[Optional[Path], typer.Option(help="file whose table to replace")]  # noqa: UP045


@app.command()
def run(
    ops: Ops = "linear_cross_entropy",
    cases: Annotated[str, typer.Option(
        help=f"comma-separated: {', '.join(HEADS)}, smollm2@D (real, in a wider head), VxD (random); 'heads': all named"
    )] = "smollm2",
    tokens: Annotated[str, typer.Option(help="comma-separated")] = "2048",
    batch: Annotated[str, typer.Option(help="rows of `sample`, comma-separated")] = "32",
    dtypes: Dtypes = "float32,bfloat16", devices: Devices = "auto", frozen: Frozen = False, peers: Peers = "",
    workspaces: Workspaces = "", samples: Samples = 20, budget: Budget = 0, memory: Memory = True,
    threads: Threads = "", most_flops: MostFlops = -1, most_logits: MostLogits = -1,
    cache: Cache = Path("build/bench"), out: Out = None, resume: Resume = False, readme: Readme = None,
):
    """Check, time (interleaved) and measure the memory of every variant; print a table, write JSON."""
    names = list(_ops()) if ops == "all" else _split(ops)
    heads = list(HEADS) if cases == "heads" else _split(cases)
    jobs = []
    for op, case, device in itertools.product(names, heads, _devices(devices)):
        for count, dtype in itertools.product(_ints(batch if op == "sample" else tokens, "tokens"), _split(dtypes)):
            jobs.append(_job(op, case, count, dtype, device, workspaces, most_flops, most_logits, cache,
                             frozen=frozen and _ops()[op].linear, threads=tuple(_ints(threads, "threads"))))
    result = _run(jobs, peers, samples, budget, memory, out, resume)
    print(table(result))
    if readme:
        _replace(readme, result)


@app.command()
def scale(
    ops: Ops = "linear_cross_entropy",
    axes: Annotated[str, typer.Option(help="comma-separated: N, V, D")] = "N,V,D",
    case: Annotated[str, typer.Option(help="the head that the other two sizes come from, VxD; random inputs")]
    = "49152x576",
    tokens: Annotated[int, typer.Option(help="N where V or D grows")] = 64,
    values_n: Annotated[str, typer.Option(help="comma-separated")] = "256,512,1024,2048",
    values_v: Annotated[str, typer.Option(help="comma-separated")] = "16384,65536,262144,1048576",
    values_d: Annotated[str, typer.Option(help="comma-separated")] = "256,512,1024,2048",
    dtypes: Dtypes = "float32", devices: Devices = "auto",
    peers: Peers = "eager,options,ssd-core", workspaces: Workspaces = "", samples: Samples = 5,
    budget: Budget = 10, memory: Memory = True, cache: Cache = Path("build/bench"), out: Out = None,
    resume: Resume = False,
):
    """Time and memory as N, V and D grow, one at a time."""
    vocab, hidden = _ints(case.replace("x", ","), "case")
    points = {"N": [(case, n) for n in _ints(values_n, "values_n")],
              "V": [(f"{v}x{hidden}", tokens) for v in _ints(values_v, "values_v")],
              "D": [(f"{vocab}x{d}", tokens) for d in _ints(values_d, "values_d")]}
    if unknown := set(_split(axes)) - set(points):
        raise UsageError(f"axes: expected some of N, V, D, got {sorted(unknown)}")
    jobs = [_job(op, name, count, dtype, device, workspaces, 0, 0, cache, axis=axis)
            for op, device, dtype in itertools.product(_split(ops), _devices(devices), _split(dtypes))
            for axis in _split(axes) for name, count in points[axis]]
    _run(jobs, peers, samples, budget, memory, out, resume)


@app.command("table")
def show(files: list[Path], readme: Readme = None):
    """The Markdown table of result files."""
    result = _read(files)
    print(table(result))
    if readme:
        _replace(readme, result)


@app.command()
def plots(
    files: list[Path],
    out: Annotated[Path, typer.Option(help="folder of the PNG files and of index.html")] = Path("bench-plots"),
):
    """Time over the floor, time and memory as N, V and D grow: PNG files, and one page that holds them all."""
    from ssd_core.bench.page import write_page

    for path in write_page(_read(files), out):
        print(path)


@app.command()
def compare(
    before: Path, after: Path,
    relative: Annotated[bool, typer.Option("--relative", help="times over the floor's instead of seconds")] = False,
):
    """What got slower (beyond the spread of both), larger or less exact. Exit code 1 if anything did."""
    from ssd_core.bench.compare import differences

    found = differences(_read([before]), _read([after]), relative)
    for line in found:
        print(line)
    worse = sum(line.startswith("worse") for line in found)
    print(f"{worse} worse, {len(found) - worse} better or gone or new")
    raise typer.Exit(bool(worse))


@app.command()
def verdict(files: list[Path], out: Out = None):
    """What is met of the targets, what is missed, what was not measured. Exit code 1 if one is missed."""
    from ssd_core.bench.verdict import judge

    lines = judge(_read(files))
    print("\n".join(lines))
    if out:
        write_json(out, {"verdict": lines})
    raise typer.Exit(any(line.startswith("missed") for line in lines))


@app.command(hidden=True)
def memory_probe(job: str, variant: str):
    from ssd_core.bench import jobs

    print(json.dumps({"extra": jobs.probe(jobs.Job.from_json(job), variant)}))


app.command()(runs)
app.command()(tune)


# -- lists


def _ops() -> dict:
    from ssd_core.bench.ops import OPS

    return OPS


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _ints(text: str, argument: str) -> list[int]:
    try:
        return [int(part) for part in _split(text)]
    except ValueError:
        raise UsageError(f"{argument}: expected whole numbers with commas, got {text!r}") from None


def _devices(text: str) -> list[str]:
    import torch

    return ["cuda" if torch.cuda.is_available() else "cpu"] if text == "auto" else _split(text)


def _job(op, case, tokens, dtype, device, workspaces, most_flops, most_logits, cache, **options):
    from ssd_core.bench.cases import head
    from ssd_core.bench.jobs import Job

    if op not in _ops():
        raise UsageError(f"ops: expected some of {', '.join(_ops())}, got {op!r}")
    head(case)
    if dtype not in ("float64", "float32", "bfloat16", "float16"):
        raise UsageError(f"dtypes: expected float64, float32, bfloat16 or float16, got {dtype!r}")
    limits = [(usual if device == "cpu" else None) if limit < 0 else limit or None
              for limit, usual in ((most_flops, CPU_FLOPS), (most_logits, CPU_LOGITS))]
    return Job(op, case, tokens, dtype, device, workspaces=tuple(_ints(workspaces, "workspaces")),
               most_flops=limits[0], most_logits=limits[1], cache=str(cache), **options)


# -- files


def _run(jobs, peers, samples, budget, memory, out, resume) -> dict:
    """The results of all jobs; the file is written after each, so that an interrupted run can be resumed."""
    from ssd_core.bench.jobs import run as run_job

    result = {"machine": machine.describe(), "results": []}
    if resume and out and out.exists():
        result["results"] = _read([out])["results"]
        for one in result["results"]:
            if machine.line(one["machine"], one["device"]) == machine.line(result["machine"], one["device"]):
                del one["machine"]      # that of the file
    done = [{**one, "tokens": one["asked_tokens"]} for one in result["results"]]
    for number, job in enumerate(jobs, 1):
        if any(job.key.items() <= one.items() for one in done):
            continue
        start = time.perf_counter()
        one = run_job(job, wanted=_split(peers), samples=samples, budget=budget or float("inf"), memory=memory)
        result["results"].append(one)
        result["machine"]["load_average_after"] = [round(value, 2) for value in os.getloadavg()]
        print(f"{number}/{len(jobs)} {job.op} {job.case} N={one['tokens']} {job.dtype} {job.device}: "
              f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if out:
            write_json(out, result)
    return result


def _read(files: list[Path]) -> dict:
    """Result files as one, of which each result has the machine of its own."""
    found = []
    for path in files:
        try:
            found.append(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: expected a result file of `bench run`: {error}") from None
        if not {"machine", "results"} <= found[-1].keys():
            raise UsageError(f"{path}: expected a result file of `bench run`, got keys {sorted(found[-1])}")
    return {"machine": found[0]["machine"], "results": [one for file in found for one in machine.placed(file)]}


def _replace(readme: Path, result: dict) -> None:
    from ssd_core.bench.table import replace_in

    replace_in(readme, result)


def main() -> None:
    try:
        app(prog_name="bench")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
