"""``bench runs``: whole runs against their peers: generation, training, and both in one.

Each run is a process of its own (``peer_run.py``, in the peer's environment), and whole runs take turns: A, B, A, B.
``make bench-peers`` makes the environments.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import dataclasses
import inspect
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Optional

import typer
from ssd_core.bench import machine

from ssd_core.checks import UsageError
from ssd_core.files import write_json

SCRIPT = Path(__file__).with_name("peer_run.py")
SAMPLING = {"temperature": 0.8, "top_k": 20, "top_p": 0.95}
TIME_LIMIT = 1800       # seconds of one run
UNFINISHED = 3          # exit code
TASKS = {"generate": "generation", "train": "training", "distill": "sample and train"}


@dataclasses.dataclass(frozen=True)
class Peer:
    name: str
    task: str
    function: str               # of peer_run.py
    environment: str = ""       # a folder of `make bench-peers`; empty: this one
    autocast: bool = False      # float32 weights, bfloat16 products; else weights in the job's dtype


PEERS = (
    Peer("ssd-core Sampler", "generate", "generate_ours"),
    Peer("HF generate", "generate", "generate_hf"),
    Peer("HF generate_batch", "generate", "generate_hf_batch"),
    Peer("vLLM", "generate", "generate_vllm", "vllm"),
    Peer("ssd-core train", "train", "train_ours"),
    Peer("ssd-core train, no kernels", "train", "train_without_kernels"),
    Peer("HF Trainer (autocast)", "train", "train_hf", autocast=True),
    Peer("HF Trainer (no master weights)", "train", "train_hf"),
    Peer("ssd-core self_distill", "distill", "distill_ours"),
    Peer("ssd-core self_distill, no kernels", "distill", "distill_without_kernels"),
    Peer("TRL SSDTrainer (autocast)", "distill", "distill_trl", "trl", autocast=True),
    Peer("TRL SSDTrainer (no master weights)", "distill", "distill_trl", "trl"),
)


def runs(
    tasks: Annotated[str, typer.Option(help=f"comma-separated: {', '.join(TASKS)}")] = ",".join(TASKS),
    peers: Annotated[str, typer.Option(help="comma-separated parts of names, ours too; empty: all")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="runs of each peer; the table shows medians")] = 2,
    model: Annotated[Path, typer.Option(help="a folder")] = Path("demo/SmolLM2-135M-Instruct"),
    prompts: Annotated[str, typer.Option(help="file of prompts, or 'demo'")] = "demo",
    sequences: Annotated[str, typer.Option(help="generation: prompts in a batch, comma-separated")] = "32,64",
    new_tokens: Annotated[int, typer.Option(help="of each sequence; sample and train: at most")] = 128,
    rows: Annotated[str, typer.Option(help="training: sequences x tokens of a step")] = "4x512",
    steps: Annotated[int, typer.Option(min=2, help="training: the first warms up")] = 4,
    distill_prompts: Annotated[int, typer.Option(help="sample and train: how many prompts")] = 32,
    batch_size: Annotated[int, typer.Option(help="sample and train: sequences of a step")] = 8,
    dtype: str = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu, cuda or 'auto'")] = "auto",
    environments: Annotated[Path, typer.Option(help="where make bench-peers put them")] = Path("build/peers"),
    minutes: Annotated[float, typer.Option(
        help=f"begin no run that may end later; exit code {UNFINISHED} if any is left; 0: no limit")] = 0,
    out: Annotated[Optional[Path], typer.Option(help="JSON file, written after each run")] = None,  # noqa: UP045
    resume: Annotated[bool, typer.Option("--resume", help="keep the runs that the JSON file holds")] = False,
):
    """Whole runs: tokens per second of generation, of training, and of both, and the memory that they take."""
    wanted = [peer for peer in PEERS if peer.task in _split(tasks, "tasks", TASKS)
              and (not peers or any(part.lower() in peer.name.lower() for part in _split(peers, "peers")))]
    if not wanted:
        raise UsageError(f"peers: expected parts of {', '.join(peer.name for peer in PEERS)}, got {peers!r}")
    settings = {
        "model": model.name, "prompts": prompts, "sampling": SAMPLING, "new_tokens": new_tokens, "dtype": dtype,
        "sequences": sequences, "rows": rows, "steps": steps, "distill_prompts": distill_prompts,
        "batch_size": batch_size, "device": _device(device),
    }
    result = _open(out if resume else None, settings)
    jobs = make_jobs(settings, model, {peer.task for peer in wanted})
    for left in take_turns(wanted, jobs, repeats, environments, result["runs"], 60 * minutes):
        result["machine"]["load_average_after"] = [round(value, 2) for value in os.getloadavg()]
        result["left"] = left
        if out:
            write_json(out, result)
    print(table(result))
    if result["left"]:
        print(f"{result['left']} runs are left: --resume goes on", file=sys.stderr)
        raise typer.Exit(UNFINISHED)


# -- what all peers are given


def make_jobs(settings: dict, model: Path, tasks: set[str]) -> dict[str, dict]:
    """For each task what ``peer_run.py`` reads: the same ids and sizes for all of its peers."""
    from transformers import AutoTokenizer

    from ssd_core.data.smollm2 import convert
    from ssd_core.prompts import for_chat, load_prompts

    if model == _default("model"):
        convert(model)
    elif not model.is_dir():
        raise UsageError(f"model: expected a folder, got {model}")
    tokenizer = AutoTokenizer.from_pretrained(model)
    common = {"model": str(model.resolve()), **{name: settings[name] for name in ("device", "dtype", "sampling")}}
    loaded = load_prompts(settings["prompts"])
    jobs = {}
    if "generate" in tasks:
        counts = [_count(part, "sequences") for part in settings["sequences"].split(",")]
        ids = [_ids(prompt, tokenizer) for prompt in for_chat(loaded, tokenizer)[0]]
        jobs["generate"] = {**common, "prompts": _first(ids, max(counts)), "sequences": counts,
                            "new_tokens": settings["new_tokens"]}
    if "train" in tasks:
        count, _, length = settings["rows"].partition("x")
        count, length = _count(count, "rows"), _count(length, "rows")
        text = tokenizer(inspect.getsource(inspect)).input_ids      # any text does
        text = _first(text, count * length)
        jobs["train"] = {**common, "steps": settings["steps"],
                         "rows": [text[i * length : (i + 1) * length] for i in range(count)]}
    if "distill" in tasks:
        count, most = settings["distill_prompts"], len(loaded.items)
        if count > most or count % settings["batch_size"]:
            raise UsageError(f"distill_prompts: expected a multiple of batch_size, at most the {most} there are, got "
                             f"{count}")
        jobs["distill"] = {**common, "prompts": list(loaded.items[:count]), "new_tokens": settings["new_tokens"],
                           "batch_size": settings["batch_size"]}
    return jobs


def _ids(prompt, tokenizer) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    return tokenizer.apply_chat_template(prompt, tokenize=True, add_generation_prompt=True, return_dict=False)


def _first(values: list, count: int) -> list:
    """``count`` of them, from the start again where there are fewer."""
    return [values[i % len(values)] for i in range(count)]


# -- running


def take_turns(
    peers: Sequence[Peer], jobs: dict[str, dict], repeats: int, environments: Path, done: list[dict], seconds: float,
) -> Iterator[int]:
    """Run what ``done`` lacks and append it there; yields how many runs are left, before the first and after each.

    A peer that cannot run, or failed once, gets a "reason" and no more runs. With ``seconds``, no run begins that would
    end later if it took as long as the longest so far.
    """
    done[:] = [run for run in done if "reason" not in run]
    failed = set()
    for peer in peers:
        reason = missing(peer, environments)
        if reason:
            done.append({"task": peer.task, "peer": peer.name, "reason": reason})
            failed.add(peer)
    there = {(run["task"], run["peer"], run.get("repeat")) for run in done}
    turns = [(peer, repeat) for task in TASKS for repeat in range(repeats) for peer in peers
             if peer.task == task and (task, peer.name, repeat) not in there]

    def left(number: int) -> int:
        return sum(peer not in failed for peer, _ in turns[number:])

    start, longest = time.monotonic(), 0.0
    yield left(0)
    for number, (peer, repeat) in enumerate(turns, 1):
        if peer in failed:
            continue
        begin = time.monotonic()
        if seconds and longest and begin - start + longest > seconds:
            return
        run = {"task": peer.task, "peer": peer.name, "repeat": repeat,
               "load_average": [round(value, 2) for value in os.getloadavg()]}
        try:
            run |= run_peer(peer, {**jobs[peer.task], "autocast": peer.autocast}, environments)
        except RuntimeError as error:
            run["reason"] = str(error)
            failed.add(peer)
        run["process_seconds"] = time.monotonic() - begin
        longest = max(longest, run["process_seconds"])
        done.append(run)
        print(f"{peer.name} {repeat + 1}/{repeats}: {run['process_seconds']:.0f} s"
              f"{', ' + run['reason'] if 'reason' in run else ''}", file=sys.stderr, flush=True)
        yield left(number)


def missing(peer: Peer, environments: Path) -> str:
    """Why it cannot run here, or nothing."""
    if not peer.environment:
        return ""
    failed = environments / f"{peer.environment}.failed"
    if failed.exists():
        return failed.read_text().strip()
    here = interpreter(peer, environments).exists()
    return "" if here else f"{environments / peer.environment} is not there: make bench-peers"


def interpreter(peer: Peer, environments: Path) -> Path:
    return environments / peer.environment / "bin/python" if peer.environment else Path(sys.executable)


def run_peer(peer: Peer, job: dict, environments: Path) -> dict:
    """What ``peer_run.py`` prints. RuntimeError: why it did not."""
    python = Path(os.path.abspath(interpreter(peer, environments)))     # not resolved: a link tells its environment
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "job.json")
        file.write_text(json.dumps(job))
        process = subprocess.Popen(
            [python, "-P", SCRIPT, peer.function, file], env=_variables(python.parents[1]), text=True, cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        try:
            output, errors = process.communicate(timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not done after {TIME_LIMIT} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):       # and what it started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        raise RuntimeError(_reason(errors) or f"exit code {process.returncode}")
    found = json.loads(next(line for line in reversed(output.splitlines()) if line.startswith('{"device"')))
    if found["device"] != job["device"]:
        raise RuntimeError(f"it runs on {found['device']} only")
    return found


def _variables(environment: Path) -> dict[str, str]:
    """As many threads for all, nothing from this environment, nothing from the network."""
    import torch

    out = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    out.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    out |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_NO_USAGE_STATS": "1"}
    openmp = environment / "lib/libiomp5.so"
    if openmp.exists():     # vLLM's advice for CPUs
        out["LD_PRELOAD"] = ":".join(filter(None, [str(openmp), ctypes.util.find_library("tcmalloc_minimal")]))
    return out


def _reason(errors: str) -> str:
    """The last line of an exception; programs may warn after it."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return (named or lines or [""])[-1][:300]


# -- results


def summarize(runs: list[dict], task: str) -> list[dict]:
    """For each peer and case of a task the median, least and most of what was measured, or the reason why not."""
    found: dict[tuple, dict[str, list]] = {}
    reasons = {}
    for run in (run for run in runs if run["task"] == task):
        if "reason" in run:
            reasons[run["peer"]] = run["reason"]
        for one in run.get("measured", ()):
            values = found.setdefault((run["peer"], one["case"]), {})
            for name, value in _numbers(one, run).items():
                values.setdefault(name, []).append(value)
    rows = [{"peer": peer, "case": case, "runs": len(values["seconds"]),
             **{name: (statistics.median(some), min(some), max(some)) for name, some in values.items()}}
            for (peer, case), values in found.items()]
    return rows + [{"peer": peer, "reason": reason} for peer, reason in reasons.items()]


def _numbers(one: dict, run: dict) -> dict[str, float]:
    numbers = {"seconds": one["seconds"], "peak_bytes": one["peak_bytes"], "process_seconds": run["process_seconds"]}
    if run["task"] == "distill":
        return {**numbers, "generation": one["tokens"] / one["generation_seconds"],
                "training": one["trained_tokens"] / one["training_seconds"]}
    return {**numbers, "rate": one["tokens"] / one["seconds"]}


COLUMNS = {     # of a task: heading, name in a row of summarize, divisor
    "generate": (("tokens/s", "rate", 1), ("seconds", "seconds", 1)),
    "train": (("tokens/s", "rate", 1), ("seconds", "seconds", 1)),
    "distill": (("seconds in all", "seconds", 1), ("generation, tokens/s", "generation", 1),
                ("training, completion tokens/s", "training", 1)),
}
SHARED = (("peak memory, MiB", "peak_bytes", 2**20), ("whole process, s", "process_seconds", 1))


def table(result: dict) -> str:
    """Markdown: a table for each task."""
    settings, sections = result["settings"], []
    loads = [run["load_average"][0] for run in result["runs"] if "load_average" in run]
    lead = (f"{settings['model']}, {settings['dtype']}, {machine.line(result['machine'], settings['device'])}"
            + (f", load average {min(loads):g} - {max(loads):g}" if loads else "") + ". Median (least - most).")
    for task, title in TASKS.items():
        rows = summarize(result["runs"], task)
        if not rows:
            continue
        columns = COLUMNS[task] + SHARED
        lines = [_line([title, "case", "runs", *(heading for heading, _, _ in columns)]),
                 "|" + "---|" * (3 + len(columns))]
        for row in rows:
            if "reason" in row:
                lines.append(_line([row["peer"], f"({row['reason']})", *[""] * (1 + len(columns))]))
                continue
            cells = [_spread(row[name], divisor) for _, name, divisor in columns]
            lines.append(_line([row["peer"], f"{row['case']}", f"{row['runs']}", *cells]))
        sections.append(f"{_about(task, settings)}\n\n" + "\n".join(lines))
    used = {", ".join(f"{name} {version}" for name, version in run["versions"].items())
            for run in result["runs"] if "versions" in run}
    return "\n\n".join([lead, *sections, f"Environments: {'; '.join(sorted(used)) or 'none'}."])


def _about(task: str, settings: dict) -> str:
    drawn = "T = {temperature}, top-k {top_k}, top-p {top_p}".format(**settings["sampling"])
    return {
        "generate": f"Generation: {settings['new_tokens']} new tokens of each sequence, {drawn}; loading is not "
                    "counted.",
        "train": f"Training: {settings['rows']} tokens a step, {settings['steps'] - 1} steps after the first.",
        "distill": f"Sample and train: up to {settings['new_tokens']} new tokens, {drawn}, batches of "
                   f"{settings['batch_size']}; loading and saving are counted.",
    }[task]


def _spread(values: tuple[float, float, float], divisor: float) -> str:
    values = [value / divisor for value in values]
    digits = 0 if values[0] >= 100 else 1
    median, least, most = (f"{value:.{digits}f}" for value in values)
    return median if least == most else f"{median} ({least} - {most})"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


# -- arguments and files


def _open(path: Path | None, settings: dict) -> dict:
    """The result so far, its machine described anew."""
    result = {"machine": machine.describe(), "settings": settings, "runs": []}
    if path is None or not path.exists():
        return result
    try:
        before = json.loads(path.read_text())
        there, result["runs"] = before["settings"], before["runs"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path}: expected a result file of `bench runs`: {error!r}") from None
    differ = sorted(name for name in {*there, *settings} if there.get(name) != settings.get(name))
    if differ:
        raise UsageError(f"{path}: measured with other settings: " + ", ".join(
            f"{name} {there.get(name)!r} there, {settings.get(name)!r} now" for name in differ))
    return result




def _device(name: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _default(option: str) -> object:
    return inspect.signature(runs).parameters[option].default


def _split(text: str, argument: str, known=None) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in parts if known is not None and part not in known]
    if unknown or not parts:
        raise UsageError(f"{argument}: expected some of {', '.join(known or ())}, got {text!r}")
    return parts


def _count(text: str, argument: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise UsageError(f"{argument}: expected whole numbers from 1, got {text!r}")
    return int(text)
