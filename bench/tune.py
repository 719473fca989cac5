"""``ssd-core bench tune``: launch configurations that are faster on this device than those that come with the kernels.

One field of a configuration at a time takes its other values, for as long as that helps. A value stays if it is faster
by more than the noise of calls that take turns, and right. The file that the kernels read from then on is written after
each configuration; they never tune by themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from ssd_core.checks import UsageError
from ssd_core.files import write_json

GAIN = 0.98         # of the time before: less is faster
VALUES = {
    "block": (512, 1024, 2048, 4096, 8192, 16384), "warps": (1, 2, 4, 8, 16), "rows": (16, 32, 64, 128, 256),
    "columns": (32, 64, 128, 256), "terms": (16, 32, 64, 128), "stages": (1, 2, 3, 4, 5), "group": (4, 8, 16, 32),
    "hidden": (32, 64, 128, 256)}


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Configurations by name, and the op of the bench whose calls launch them. A name that ends in "*" goes on with the
    bits of a number."""

    op: str
    names: tuple[str, ...]
    filtered: bool = False
    route: str = "chunked"

    @property
    def label(self) -> str:
        return self.op + ", filtered" * self.filtered + ", tiled" * (self.route == "tiled")


TUNINGS = (
    Tuning("cross_entropy", ("cross_entropy",)),
    Tuning("softmax", ("softmax",)),
    Tuning("distill", ("distill",)),
    Tuning("linear_distill_hidden", ("distill_dense",)),
    Tuning("linear_logprob", ("logprob",)),
    Tuning("sample", ("sample_look", "sample")),
    Tuning("linear_cross_entropy", ("input*", "weight*", "moments", "select"), filtered=True),
    Tuning("linear_cross_entropy", ("tiles*",), route="tiled"),
    Tuning("linear_distill_hidden", ("pairs*",), route="tiled"),
)
OPS = ", ".join(dict.fromkeys(tuning.op for tuning in TUNINGS))


def tune(
    ops: Annotated[str, typer.Option(help=f"comma-separated: {OPS}; or 'all'")] = "all",
    case: Annotated[str, typer.Option(help="a head, as of `run`")] = "llama-3-8b",
    tokens: int = 8192,
    batch: Annotated[int, typer.Option(help="rows of `sample`")] = 256,
    dtype: str = "bfloat16",
    device: str = "cuda",
    workspace: Annotated[int, typer.Option(help="MiB")] = 1024,
    samples: Annotated[int, typer.Option(min=1, help="timed calls of either configuration")] = 10,
    minutes: Annotated[float, typer.Option(help="begin nothing after that; 0: no limit")] = 0,
    out: Annotated[Optional[Path], typer.Option(help="file to write [what the kernels read]")] = None,  # noqa: UP045
):
    """Find faster launch configurations of backend "triton" on this device and keep them."""
    from ssd_core.kernels import launch

    wanted = [tuning for tuning in TUNINGS if ops == "all" or tuning.op in ops.split(",")]
    if not wanted:
        raise UsageError(f"ops: expected some of {OPS}, got {ops!r}")
    end = time.monotonic() + (60 * minutes or float("inf"))
    path = out or launch.tuned_file()
    for tuning in wanted:
        rows = batch if tuning.op == "sample" else tokens
        os.environ["SSD_CORE_ROUTE"] = tuning.route
        for name, changes, ratio in _tune(tuning, case, rows, dtype, device, workspace, samples, end):
            found = f"{changes}, {ratio:.2f} of the time" if changes else "nothing is faster"
            print(f"{tuning.label}, {name}: {found}", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {device: {name: fields for name, fields in ops.items() if fields}
                              for device, ops in launch.everything_tuned().items()})
    print(path)


def _tune(tuning: Tuning, case, rows, dtype, device, workspace, samples, end):
    """(name, fields that changed, ratio of the times) of each configuration."""
    import torch
    from ssd_core.bench import measure
    from ssd_core.bench.jobs import Job
    from ssd_core.kernels import launch

    job = Job(tuning.op, case, rows, dtype, device, workspaces=(workspace,))
    problem = job.problem()
    variant = next((v for v in job.variants(problem.case.softcap) if v.name.startswith("ssd-core triton")
                    and ("grad_filter" in v.name) == tuning.filtered), None)
    if variant is None or variant.function is None:
        why = "no such variant" if variant is None else variant.missing
        raise UsageError(f"device: expected one that backend 'triton' serves, got {device}: {why}")
    call = functools.partial(measure.gradients, variant.function, problem)
    true = {name: value.double() for name, value in call().items()}
    weight = problem.case.weight

    def configuration(name):
        if name.startswith(("tiles", "pairs")):
            by_descriptor = launch.has_tensor_memory_accelerator(weight.device)
            return launch.tiles(len(weight), weight.dtype, weight.device, by_descriptor, name.startswith("pairs"))
        return launch.rows(name, len(weight)) if name in launch.ROWS else launch.products(name)

    def run(name, fields):
        launch.tuned()[name] = fields
        return call()

    def ratio(name, fields, other) -> float:
        """The time with the other fields over that with these; infinite if they do not compile, or are wrong."""
        try:
            right = measure.worst(measure.errors(run(name, other), true)) <= 4 * measure.ROUNDING[problem.dtype]
        except Exception as error:      # too many registers, too much shared memory, a block that the compiler refuses
            print(f"  {name} {other}: {(str(error) or repr(error)).splitlines()[0][:100]}")
            right = False
        if not right:
            return math.inf
        times = measure.interleaved(
            {"these": lambda: run(name, fields), "other": lambda: run(name, other)}, samples,
            synchronize=lambda: weight.is_cuda and torch.cuda.synchronize(weight.device))
        return times["other"]["median"] / times["these"]["median"]

    for name in (name.replace("*", str(8 * weight.element_size())) for name in tuning.names):
        earlier, before = launch.tuned().get(name, {}), dataclasses.asdict(configuration(name))
        try:
            after, total = descend(before, functools.partial(ratio, name), end)
        finally:
            launch.tuned()[name] = earlier
        changes = {field: value for field, value in after.items() if value != before[field]}
        launch.tuned()[name] = earlier | changes
        yield name, changes, total


def descend(fields: dict[str, int], ratio, end: float) -> tuple[dict[str, int], float]:
    """The fields that ``ratio(fields, other)``, a quotient of times, leads to, and its product on the way there."""
    total, better = 1.0, True
    while better:
        better = False
        for field in [field for field in fields if field in VALUES and fields[field]]:
            smaller = [value for value in VALUES[field] if value < fields[field]][-1:]
            larger = [value for value in VALUES[field] if value > fields[field]][:1]
            for value in smaller + larger:
                if time.monotonic() > end:
                    return fields, total
                other = {**fields, field: value}
                found = ratio(fields, other)
                if found < GAIN:
                    fields, total, better = other, total * found, True
                    break
    return fields, total
