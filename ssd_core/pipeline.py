"""The main job: sample from the frozen model, train the same weights on the samples, save, report.

A run directory holds ``config.json`` (all settings, resolved), ``samples/``, ``checkpoints/``, ``metrics.jsonl``,
``model/`` (for ``from_pretrained``), ``evaluation/``, ``summary.json`` (which stages are done, counts, times) and
``report.html``. Each stage can be killed anywhere and continued.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

import ssd_core
from ssd_core import models, presets
from ssd_core.checks import UsageError
from ssd_core.files import read_json, write_json
from ssd_core.prompts import Prompt, Prompts, for_chat, load_prompts
from ssd_core.sampling_params import SamplingParams
from ssd_core.store import SampleStore
from ssd_core.train.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Result:
    """Where a run's outcome is, and its main numbers."""

    out: Path
    model: Path                     # loads with from_pretrained
    report: Path                    # a page to look at
    summary: dict                   # counts; seconds, tokens and tokens per second of each stage
    held_out_loss: tuple[float, float] | None       # before and after training
    pass_at_1: tuple[float, float] | None           # before and after, if problems were given


class Reporter:
    """Told how far a stage is; this one is silent."""

    @contextlib.contextmanager
    def stage(self, title: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
        """Yields ``advance(done, tokens=0, **values)``: more of ``total`` done, tokens that it took, values to show."""
        yield lambda done, tokens=0, **values: None


def self_distill(
    model, prompts: str | Path | Iterable[Prompt], out: str | Path = "run", *,
    tokenizer=None, preset: str = "default", sampling: SamplingParams | None = None,
    training: TrainConfig | None = None, problems: str | Path | None = None, decoding: SamplingParams | None = None,
    batch_size: int = 32, resume: bool = False, reporter: Reporter | None = None,
) -> Result:
    """Sample one completion per prompt from ``model``, train the same weights on the samples, save the result.

    In plain words of other libraries: ``generate`` with temperature, top-k and top-p; a fine-tuning ``Trainer`` on the
    prompts and completions; ``save_pretrained(out/model)``.

    Args:
        model: a folder (or name) that ``from_pretrained`` loads, or a transformers causal language model, which is
            then trained in place and needs its ``tokenizer``. Either way its weights are in ``training``'s dtype
            (bfloat16 by default) from the start, so that what is trained is what was sampled from.
        prompts: a .jsonl, .json or .txt file, "demo", or an iterable of texts or chat messages.
        out: the run directory; it must not exist unless ``resume``.
        preset: a name of ``ssd_core.presets.PRESETS``; ``sampling``, ``training`` and ``decoding`` replace its parts.
        problems: a file in HumanEval's format (or "demo"): pass@1 before and after, decoded as ``decoding`` says.
        batch_size: sequences decoded together.
        resume: continue what is there, with equal settings; a model object must be the untrained one again.

    Raises:
        UsageError: something asked for cannot be done; nothing was changed. NonFiniteError: NaN in weights or loss;
        what was done is kept.
    """
    chosen = presets.resolve(preset, {}, {}, {})
    run = Run(
        out, model, load_prompts(prompts), sampling=sampling or chosen[0], training=training or chosen[1],
        decoding=decoding or chosen[2], problems=problems, batch_size=batch_size, tokenizer=tokenizer, resume=resume,
        reporter=reporter or Reporter())
    return run.all()


class Run:
    """A run directory and its stages. Each stage is skipped if it is done and continues if it was interrupted."""

    def __init__(
        self, out, model, prompts: Prompts | None, *, sampling: SamplingParams, training: TrainConfig,
        decoding: SamplingParams, problems=None, batch_size: int = 32, tokenizer=None, resume: bool = False,
        reporter: Reporter | None = None, sections: tuple[str, ...] = ("sampling", "training", "evaluation"),
    ):
        self.out, self.prompts, self.problems = Path(out).expanduser(), prompts, _problems_path(problems)
        self.sampling, self.training, self.decoding = sampling, training, decoding
        self.batch_size, self.reporter = batch_size, reporter or Reporter()
        self._given, self._tokenizer, self._trained_here = model, tokenizer, False
        if batch_size < 1:
            raise UsageError(f"batch_size: expected at least 1, got {batch_size}")
        if isinstance(model, (str, Path)):
            models.local_folder(model)      # a wrong path is told before anything is written
        elif tokenizer is None:
            raise UsageError("tokenizer: expected the model's tokenizer beside a model object, got None")
        self._open(sections, resume)

    # -- the stages ---------------------------------------------------------------------------------------------------

    def all(self) -> Result:
        self.check()
        self.evaluate("before")
        self.sample()
        self.train()
        self.evaluate("after")
        return self.report()

    def check(self) -> None:
        """Tell of a prompt that is too long or a head that cannot be trained now, not after hours of other stages."""
        if not self._done("sample"):
            from ssd_core.sampler import Sampler

            prompts, params = self._requests
            Sampler(self.model, self.tokenizer, params, batch_size=self.batch_size).plan(prompts)
        if not self._done("train"):
            models.head(self.model)

    def sample(self) -> None:
        """Draw completions of all prompts from the frozen model into ``samples/``."""
        if self._done("sample"):
            return
        prompts, params = self._requests
        source = {"prompts": self.prompts.digest}
        with self._writing():
            self._draw(self.out / "samples", prompts, source, params, "sample", "sample", "Sampling")
            self._finish("sample")

    def train(self) -> None:
        """Train on ``samples/`` and save ``model/``."""
        if self._done("train"):
            self._take_up_trained()
            return
        from ssd_core.train.batches import select
        from ssd_core.train.checkpoint import whole_folder
        from ssd_core.train.loop import train

        store = SampleStore(self.out / "samples")
        if not self._done("sample"):
            raise UsageError(f"samples: {store.folder} is not finished: continue sampling with --resume first")
        if store.settings["model"] != models.fingerprint(self.model):
            raise UsageError(f"model: expected the one that drew {store.folder} (and its dtype), got another")
        train_set, held_out, counts = select(store, self.training)
        self._begin()
        shown = 0
        with self._writing(), self.reporter.stage("Training", 0, "step") as advance:
            self._note({"counts": dataclasses.asdict(counts)})
            meter = Meter(self, "train")

            def on_step(progress):
                nonlocal shown
                advance(progress.step - shown, progress.tokens, total=progress.total, loss=progress.loss)
                shown = progress.step
                meter.tokens += progress.tokens
                if progress.step % self.training.save_steps == 0 or progress.step == progress.total:
                    meter.keep()

            train(self.model, train_set, held_out, self.training, self.out, on_step=on_step)
            self._trained_here = True
            with whole_folder(self.out / "model") as folder:
                self.model.save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)
            meter.keep()
            self._finish("train")

    def evaluate(self, when: str) -> None:
        """pass@1 "before" or "after" training, into ``evaluation/``."""
        name = f"evaluate {when}"
        if self.problems is None or self._done(name):
            return
        from ssd_core import evaluate

        problems = evaluate.load_problems(self.problems)
        if when == "after":
            self._take_up_trained()
        templated = bool(self.tokenizer.chat_template)
        ids = [self.tokenizer(evaluate.problem_prompt(p, self.tokenizer), add_special_tokens=not templated).input_ids
               for p in problems]
        stops = self.decoding.stop_strings or tuple(evaluate.problem_stop_strings(self.tokenizer))
        params = dataclasses.replace(self.decoding, stop_strings=stops)
        folder = self.out / "evaluation"
        with self._writing():
            # the same seeds before and after: what differs is the model
            store = self._draw(
                folder / when, ids, {"problems": _digest(self.problems)}, params, name, "evaluate",
                f"Evaluating {when}")
            completions: dict[str, list[str]] = {problem.task_id: [] for problem in problems}
            for completion in store:
                completions[problems[completion.prompt_index].task_id].append(completion.text)
            evaluate.grade(problems, completions).save(folder / f"{when}.json")
            self._finish(name)

    def report(self) -> Result:
        from ssd_core.report import write_report

        with self._writing():
            page = write_report(self.out)
        return Result(
            self.out, self.out / "model", page, self._summary(), held_out_loss(self.out), _pass_at_1(self.out))

    # -- what they share ----------------------------------------------------------------------------------------------

    @functools.cached_property
    def model(self):
        if isinstance(self._given, (str, Path)):
            model, tokenizer = models.load_model(self._given, self._dtype)
            self._tokenizer = self._tokenizer or tokenizer
            return model.to(default_device())
        from ssd_core.train.loop import cast

        models.check_finite(self._given)
        cast(self._given, self.training)
        return self._given.eval()

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.training.bf16 else torch.float32

    @property
    def tokenizer(self):
        if self._tokenizer is None:
            self.model  # noqa: B018  loads both
        return self._tokenizer

    @functools.cached_property
    def _requests(self) -> tuple[list[Prompt], SamplingParams]:
        """Prompts as the Sampler takes them, and how to draw their completions."""
        prompts, stops = for_chat(self.prompts, self.tokenizer)
        return prompts, dataclasses.replace(self.sampling, stop_strings=self.sampling.stop_strings or stops)

    def _take_up_trained(self) -> None:
        """``model`` becomes the trained one, if an earlier process trained it."""
        if self._trained_here:
            return
        if isinstance(self._given, (str, Path)):
            self.__dict__.pop("model", None)    # loaded when it is needed
            self._given = self.out / "model"
        else:
            trained, _ = models.load_model(self.out / "model", self._dtype)
            self.model.load_state_dict(trained.state_dict())
        self._trained_here = True

    def _draw(
        self, folder: Path, prompts, source: dict, params: SamplingParams, stage: str, purpose: str, title: str,
    ) -> SampleStore:
        """Draw what is missing in ``folder``."""
        from ssd_core.sampler import Sampler

        sampler = Sampler(self.model, self.tokenizer, params, batch_size=self.batch_size)
        total = sum(map(len, sampler.plan(prompts, purpose=purpose)))     # raises before anything is written
        self._begin()
        store = SampleStore(folder, {
            "model": models.fingerprint(self.model), "batch_size": self.batch_size, **source, **_plain(params)})
        meter = Meter(self, stage)
        with self.reporter.stage(title, total, "completion") as advance:
            advance(min(store.groups * self.batch_size, total))

            def on_step(drawn, finished):
                meter.tokens += drawn
                advance(finished, drawn)

            for group in sampler.groups(prompts, purpose=purpose, skip=store.groups, on_step=on_step):
                store.append(group)
                meter.keep()
        return store

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """The error of a full disk names no file: name the run directory."""
        try:
            yield
        except OSError as error:
            if error.filename is not None or error.errno is None:
                raise
            raise OSError(error.errno, error.strerror, str(self.out)) from error
        except SafetensorError as error:
            raise OSError(f"{self.out}: {error}") from error

    def _open(self, sections, resume) -> None:
        """Create the run directory, or check that its settings are those of this call. They are written, and bind, when
        a stage begins."""
        given = self._given if isinstance(self._given, (str, Path)) else type(self._given).__name__
        model = {"path": str(given), "dtype": str(self._dtype).removeprefix("torch.")}
        config = {"version": ssd_core.__version__}
        if sections != ("evaluation",):     # any model may be evaluated in a run directory, such as what it trained
            config["model"] = model
        if self.prompts is not None:
            config["prompts"] = {"source": self.prompts.source, "count": len(self.prompts.items),
                                 "duplicates_dropped": self.prompts.duplicates, "digest": self.prompts.digest}
        if "sampling" in sections:
            config["sampling"] = {"batch_size": self.batch_size, **_plain(self.sampling)}
        if "training" in sections:
            config["training"] = _plain(self.training)
        if "evaluation" in sections and self.problems is not None:
            config["evaluation"] = {"problems": str(self.problems), "digest": _digest(self.problems),
                                    **_plain(self.decoding), **({} if "model" in config else {"model": model})}
        path = self.out / "config.json"
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"out: expected a folder, got {self.out}, a file")
        # names with a dot are temporary files, which a kill in the first moment may leave alone
        there = {entry.name for entry in self.out.iterdir() if entry.name[0] != "."} if self.out.exists() else set()
        if there and "config.json" not in there:
            raise UsageError(f"out: {self.out} exists and is not a run directory (no config.json)")
        stored = read_json(path) if there else {}
        again = [section for section in sections if section in stored]
        if again and not resume:
            raise UsageError(f"out: {self.out} holds a run already: continue it with --resume, or name another folder")
        shared = [key for key in config if key in stored and key != "version"]
        differences = [line for key in shared for line in _differences(key, stored[key], config[key])]
        if differences:
            raise UsageError(f"out: {self.out} holds a run with other settings:\n  " + "\n  ".join(differences))
        self._config = {**stored, **config}
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if not os.access(self.out, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise UsageError(f"out: cannot write to {self.out}: {error.strerror or error}") from None

    def _begin(self) -> None:
        write_json(self.out / "config.json", self._config)

    def _summary(self) -> dict:
        path = self.out / "summary.json"
        return read_json(path) if path.exists() else {}

    def _note(self, values: dict) -> None:
        summary = self._summary()
        for key, value in values.items():
            summary[key] = {**summary.get(key, {}), **value}
        write_json(self.out / "summary.json", summary)

    def _done(self, stage: str) -> bool:
        return stage in self._summary().get("done", {})

    def _finish(self, stage: str) -> None:
        self._note({"done": {stage: True}})


class Meter:
    """Seconds and tokens of a stage, in ``summary.json``: of all work that was kept, whichever attempt did it."""

    def __init__(self, run: Run, stage: str):
        self._run, self._stage, self._start, self.tokens = run, stage, time.perf_counter(), 0

    def keep(self) -> None:
        """What was done since the last call is on disk now."""
        now, summary = time.perf_counter(), self._run._summary()
        seconds = summary.get("seconds", {}).get(self._stage, 0.0) + now - self._start
        tokens = summary.get("tokens", {}).get(self._stage, 0) + self.tokens
        self._run._note({"seconds": {self._stage: seconds}, "tokens": {self._stage: tokens},
                         "tokens_per_second": {self._stage: tokens / seconds}})
        self._start, self.tokens = now, 0


def held_out_loss(out: Path) -> tuple[float, float] | None:
    """First and last held-out loss of a run directory."""
    from ssd_core.files import AppendOnly

    losses = [line["loss"] for line in AppendOnly(out / "metrics.jsonl").read() if line["kind"] == "eval"]
    return (losses[0], losses[-1]) if len(losses) > 1 else None


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _pass_at_1(out: Path) -> tuple[float, float] | None:
    found = [read_json(path)["pass_at_1"] for path in (out / "evaluation/before.json", out / "evaluation/after.json")
             if path.exists()]
    return tuple(found) if len(found) == 2 else None


def _problems_path(problems) -> Path | None:
    from ssd_core import data, evaluate

    if problems is None:
        return None
    path = data.demo_problems() if str(problems) == "demo" else Path(problems).expanduser()
    evaluate.load_problems(path)    # a wrong file is told before anything starts
    return path


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def _plain(settings) -> dict:
    """Settings as JSON gives them back."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(settings).items()}


def _differences(section: str, stored: dict, given: dict) -> list[str]:
    names = sorted(name for name in {*stored, *given} if stored.get(name) != given.get(name))
    return [f"{section}.{name}: {stored.get(name)!r} there, {given.get(name)!r} now" for name in names]
