"""The command line: ``ssd-core info | sample | train | run | eval | report | bench``.

Exit codes: 0 done, 1 failure, 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import signal
import sys
import time
import traceback
import typing
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich import progress as rich_progress
from rich.console import Console
from rich.table import Table

from ssd_core import presets
from ssd_core.checks import UsageError
from ssd_core.pipeline import Reporter, Run, held_out_loss
from ssd_core.prompts import Prompts, load_prompts
from ssd_core.sampling_params import SamplingParams
from ssd_core.train.config import TrainConfig

app = typer.Typer(
    help="Make a language model better with its own samples.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False, rich_markup_mode=None)
console = Console()
errors = Console(stderr=True)

Model = Annotated[str, typer.Option(help="a folder or name that from_pretrained loads")]
PromptFile = Annotated[str, typer.Option(help=".jsonl, .json or .txt file of prompts, or 'demo'")]
Out = Annotated[Path, typer.Option(help="the run directory")]
Resume = Annotated[bool, typer.Option("--resume", help="continue what is in the run directory")]
PresetName = Annotated[str, typer.Option(help=f"one of {', '.join(presets.PRESETS)}")]
Seed = Annotated[int, typer.Option(help="seed of sampling and of training")]
BatchSize = Annotated[int, typer.Option(min=1, help="sequences decoded together")]
Bf16 = Annotated[bool, typer.Option(help="weights in bfloat16; else float32")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the memory and time plan and stop")]
Debug = Annotated[bool, typer.Option("--debug", help="log details; a traceback on errors")]


def command(name: str | None = None, **settings: type):
    """Register a command. The fields of each dataclass in ``settings`` become options in kebab case, and reach the
    function as one dict of those that were given; ``decoding`` options are prefixed ``eval-``. Errors become exit
    codes.
    """

    def register(function):
        own = inspect.signature(function, eval_str=True)
        parameters = {p.name: p for p in own.parameters.values() if p.name not in settings}
        fields = {}
        for group, cls in settings.items():
            hints = typing.get_type_hints(cls)
            for field in dataclasses.fields(cls):
                key = f"eval_{field.name}" if group == "decoding" else field.name
                if field.name != "seed":                    # --seed is shared
                    fields[key] = (group, field.name)
                    default = getattr(presets.PRESETS["default"], group).get(field.name, field.default)
                    parameters[key] = _option(key, field, hints[field.name], default)

        @functools.wraps(function)
        def run(**given):
            grouped = {group: {} for group in settings}
            for key, (group, field) in fields.items():
                value = given.pop(key)
                if value not in (None, []):
                    grouped[group][field] = tuple(value) if isinstance(value, list) else value
            with _exit_codes(given.get("debug", False)):
                function(**given, **grouped)

        run.__signature__ = inspect.Signature(list(parameters.values()))
        run.__annotations__ = {key: p.annotation for key, p in parameters.items()}
        return app.command(name)(run)

    return register


def _option(key: str, field: dataclasses.Field, kind: type, default: object) -> inspect.Parameter:
    """Its default is None, so that the preset's value holds; ``default`` is only shown."""
    flag = "--" + key.replace("_", "-")
    shown = "" if default == () else f" [{default}]"
    if kind is bool:
        flag += "/--no-" + key.replace("_", "-")
    kind = Optional[list[str]] if kind == tuple[str, ...] else Optional[kind]  # noqa: UP045  a runtime annotation
    annotation = Annotated[kind, typer.Option(flag, help=field.metadata["help"] + shown, show_default=False)]
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


@contextlib.contextmanager
def _exit_codes(debug: bool):
    signal.signal(signal.SIGTERM, _interrupt)   # like Ctrl-C
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("ssd_core").setLevel(logging.DEBUG if debug else logging.INFO)
    try:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        yield
    except KeyboardInterrupt:
        errors.print("interrupted; continue with --resume", style="yellow", highlight=False)
        code = 130
    except (typer.Exit, SystemExit):
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        errors.print("error: " + (str(error) or type(error).__name__), style="red", markup=False, highlight=False,
                     soft_wrap=True)
        code = 2 if isinstance(error, UsageError) else 1
    else:
        return
    raise typer.Exit(code)


def _interrupt(*args):
    raise KeyboardInterrupt


class Bars(Reporter):
    """Progress bars with tokens per second."""

    @contextlib.contextmanager
    def stage(self, title, total, unit):
        columns = (
            rich_progress.TextColumn("{task.description:<17}"), rich_progress.BarColumn(),
            rich_progress.TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}s"),
            rich_progress.TextColumn("{task.fields[rate]}"), rich_progress.TimeElapsedColumn())
        start, counted = time.perf_counter(), 0
        with rich_progress.Progress(*columns, console=console) as bars:
            task = bars.add_task(title, total=total, unit=unit, rate="")

            def advance(done, tokens=0, total=None, loss=None):
                nonlocal counted
                counted += tokens
                rate = f"{counted / (time.perf_counter() - start):.0f} tokens/s" if counted else ""
                bars.update(task, advance=done, rate=rate if loss is None else f"{rate}, loss {loss:.3f}",
                            **({} if total is None else {"total": total}))

            yield advance


@command()
def info(debug: Debug = False):
    """Versions, devices, and the backends: which serve here, and why others do not."""
    import importlib.metadata
    import platform

    import torch

    import ssd_core
    from ssd_core import native
    from ssd_core.backends import BACKENDS

    facts = Table.grid(padding=(0, 2))
    facts.add_row("ssd-core", ssd_core.__version__)
    facts.add_row("python", platform.python_version())
    for package in ("torch", "triton", "transformers", "numpy"):
        try:
            facts.add_row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            facts.add_row(package, "not installed")
    facts.add_row("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for device in range(torch.cuda.device_count()):
        facts.add_row(f"cuda:{device}", torch.cuda.get_device_name(device))
    facts.add_row("extension", native.missing() or ", ".join(f"{k} {v}" for k, v in native.build_info().items()))
    console.print(facts, soft_wrap=True)
    names = list(dict.fromkeys(record.name for record in BACKENDS))
    ops = Table("op", *names, box=None, pad_edge=False)
    for op in dict.fromkeys(record.op for record in BACKENDS):
        here = {record.name: "-" if record.missing() else "yes" if record.automatic else "by name"
                for record in BACKENDS if record.op == op}
        ops.add_row(op, *(here.get(name, "-") for name in names))
    backends = Table("backend", "devices", "dtypes", "why not here", box=None, pad_edge=False)
    for name in names:
        record = next(record for record in BACKENDS if record.name == name)
        backends.add_row(name, ", ".join(record.devices) or "any", ", ".join(record.dtypes), record.missing() or "")
    for table in (ops, backends):
        console.print()
        console.print(table)


@command(sampling=SamplingParams)
def sample(
    sampling: dict, model: Model, prompts: PromptFile, out: Out = Path("run"), preset: PresetName = "default",
    seed: Seed = 0, batch_size: BatchSize = 32, bf16: Bf16 = True, resume: Resume = False, dry_run: DryRun = False,
    debug: Debug = False,
):
    """Draw completions from a model, with their soft targets, into OUT/samples."""
    settings = presets.resolve(preset, {**sampling, "seed": seed}, {"bf16": bf16}, {})
    found = load_prompts(prompts)
    if dry_run:
        return _plan(model, found, settings, batch_size, train=False)
    run = _run(out, model, found, settings, batch_size, resume, sections=("sampling",))
    run.sample()
    _say_counts(run)
    console.print(f"samples: {run.out / 'samples'}", soft_wrap=True)


@command(training=TrainConfig)
def train(
    training: dict, model: Model, out: Out = Path("run"), preset: PresetName = "default", seed: Seed = 0,
    resume: Resume = False, dry_run: DryRun = False, debug: Debug = False,
):
    """Train a model on the samples in OUT/samples, into OUT/model."""
    settings = presets.resolve(preset, {}, {**training, "seed": seed}, {})
    if dry_run:
        return _plan(model, None, settings, 0, train=True, samples=out / "samples")
    run = _run(out, model, None, settings, 32, resume, sections=("training",))
    run.train()
    run.report()
    _say_loss(run)
    console.print(f"model: {run.out / 'model'}", soft_wrap=True)


@command(sampling=SamplingParams, training=TrainConfig, decoding=SamplingParams)
def run(
    sampling: dict, training: dict, decoding: dict, model: Model, prompts: PromptFile, out: Out = Path("run"),
    problems: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help="problems in HumanEval's format, or 'demo': pass@1 before and after")] = None,
    preset: PresetName = "default", seed: Seed = 0, batch_size: BatchSize = 32, resume: Resume = False,
    dry_run: DryRun = False, debug: Debug = False,
):
    """Sample, train on the samples, save, report; with --problems also evaluate before and after."""
    settings = presets.resolve(
        preset, {**sampling, "seed": seed}, {**training, "seed": seed}, {**decoding, "seed": seed})
    found = load_prompts(prompts)
    if dry_run:
        return _plan(model, found, settings, batch_size, train=True)
    job = _run(out, model, found, settings, batch_size, resume, problems=problems)
    result = job.all()
    from ssd_core.report import summary

    console.print()
    console.print(summary(job.out))
    console.print(f"\nreport: {result.report}\nmodel:  {result.model}", soft_wrap=True)


@command("eval", sampling=SamplingParams)
def evaluate(
    sampling: dict, model: Model,
    problems: Annotated[str, typer.Option(help="problems in HumanEval's format, or 'demo'")],
    out: Out = Path("evaluation"), preset: PresetName = "default", seed: Seed = 0, batch_size: BatchSize = 32,
    bf16: Bf16 = True, resume: Resume = False, debug: Debug = False,
):
    """pass@1 of a model on a JSONL of problems; each program runs in a subprocess with limits."""
    from ssd_core.evaluate import Evaluation

    settings = presets.resolve(preset, {}, {"bf16": bf16}, {**sampling, "seed": seed})
    job = _run(out, model, None, settings, batch_size, resume, problems=problems, sections=("evaluation",))
    job.evaluate("result")
    found = Evaluation.load(job.out / "evaluation/result.json")
    low, high = found.interval
    console.print(
        f"pass@1 {found.pass_at_1:.1%} [{low:.1%}, {high:.1%}] of {found.problems} problems, "
        f"{found.samples_per_problem} samples each: {found.statuses}", soft_wrap=True)


@command()
def report(out: Out = Path("run"), debug: Debug = False):
    """Write OUT/report.html again and print its summary."""
    from ssd_core.report import summary, write_report

    if not (out / "config.json").exists():
        raise UsageError(f"out: {out} is not a run directory (no config.json)")
    page = write_report(out)
    console.print(summary(out))
    console.print(f"report: {page}", soft_wrap=True)


# imported at first use, and with commands and options of its own
@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context):
    """Measure every op against its peers: error, time, memory."""
    with _exit_codes(debug=False):
        from ssd_core.bench.run import app as bench_app

        bench_app(context.args, prog_name="ssd-core bench")


def _run(out, model, prompts: Prompts | None, settings, batch_size, resume, **options) -> Run:
    sampling, training, decoding = settings
    return Run(out, model, prompts, sampling=sampling, training=training, decoding=decoding, batch_size=batch_size,
               resume=resume, reporter=Bars(), **options)


def _say_counts(run: Run) -> None:
    if run.prompts.duplicates:
        console.print(f"{run.prompts.duplicates} duplicate prompts dropped")


def _say_loss(run: Run) -> None:
    losses = held_out_loss(run.out)
    if losses:
        console.print(f"held-out loss {losses[0]:.4f} -> {losses[1]:.4f}")


def _plan(model, prompts, settings, batch_size, *, train, samples=None):
    from ssd_core.dryrun import plan_run

    console.print(plan_run(model, prompts, *settings[:2], batch_size=batch_size, train=train, samples=samples))


def main() -> None:
    app(prog_name="ssd-core")


if __name__ == "__main__":
    sys.exit(main())
