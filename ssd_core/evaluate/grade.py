"""Grade completions and keep the result."""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from ssd_core.checks import UsageError
from ssd_core.evaluate.passk import pass_at_k, wilson_interval
from ssd_core.evaluate.problems import Problem, program
from ssd_core.evaluate.sandbox import Outcome, run_program
from ssd_core.files import write_atomic

DETAIL_CHARACTERS = 2000


@dataclass(frozen=True)
class Evaluation:
    """What :func:`grade` found.

    ``problems`` and ``samples_per_problem`` are counts; ``pass_at_1`` is the mean over the problems of the share of
    right samples, ``interval`` its 95 % interval ``(low, high)``; ``results`` holds one
    ``{task_id, sample_index, status, detail, seconds}`` for every sample, in the order of the problems.

    The interval is Wilson's, over the problems. With several samples per problem, those of one problem agree with
    each other, so they are not that many independent trials: it is then Wilson's at the effective sample size
    ``P p (1 - p) / v``, where ``v`` is the variance over the P problems of each one's share, which lies between P
    (samples of a problem always agree; also used when p is 0 or 1) and all samples (they are independent).
    """

    problems: int
    samples_per_problem: int
    pass_at_1: float
    interval: tuple[float, float]
    results: list[dict[str, Any]]

    @property
    def statuses(self) -> dict[str, int]:
        """How many samples ended with each status."""
        return dict(Counter(result["status"] for result in self.results))

    @property
    def passed(self) -> dict[str, int]:
        """The number of right samples of each ``task_id``, in the order of the problems."""
        counts: dict[str, int] = {}
        for result in self.results:
            counts[result["task_id"]] = counts.get(result["task_id"], 0) + (result["status"] == "passed")
        return counts

    def pass_at(self, k: int) -> float:
        """The mean over the problems of :func:`pass_at_k`; ``1 <= k <= samples_per_problem``."""
        return fmean(pass_at_k(self.samples_per_problem, right, k) for right in self.passed.values())

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=True) + "\n"

    def save(self, path: str | os.PathLike) -> None:
        """Write ``path`` so that a reader sees the old file or the whole new one, also after a power cut."""
        write_atomic(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Evaluation":
        """Read what :meth:`save` wrote; :class:`UsageError` names the file when it is something else."""
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: expected a saved evaluation, got {error}") from error
        names = [field.name for field in fields(cls)]
        if not isinstance(record, dict) or sorted(record) != sorted(names):
            got = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise UsageError(f"{path}: expected an evaluation with the keys {names}, got {got}")
        try:
            low, high = map(float, record["interval"])
            results = [
                {key: result[key] for key in ("task_id", "sample_index", "status", "detail", "seconds")}
                for result in record["results"]
            ]
            problems, samples = int(record["problems"]), int(record["samples_per_problem"])
            return cls(problems, samples, float(record["pass_at_1"]), (low, high), results)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path}: expected an evaluation, got a value of the wrong kind ({error!r})") from error


def grade(
    problems: Sequence[Problem],
    completions: Mapping[str, Sequence[str]],
    *,
    timeout: float = 6.0,
    workers: int = 2,
    on_result: Callable[[dict[str, Any]], None] | None = None,
) -> Evaluation:
    """Run the test of every problem on every one of its completions.

    ``completions`` maps each ``task_id`` to its samples' text (what follows :func:`problem_prompt`), equally many for
    every problem. ``workers`` programs run at a time, each under the limits of :func:`run_program` and ``timeout``
    seconds. ``on_result`` is called in this thread with each result as it comes, in any order. A sample whose program
    could not be run (status "error") counts as not passed: look at :attr:`Evaluation.statuses`. Raises
    :class:`UsageError` when problems and completions do not match.
    """
    _check(problems, completions, workers)
    results: dict[tuple[int, int], dict[str, Any]] = {}
    executor = ThreadPoolExecutor(workers, thread_name_prefix="ssd-core-grade")
    try:
        jobs = {
            executor.submit(run_program, program(problem, text), timeout=timeout): (place, index)
            for place, problem in enumerate(problems)
            for index, text in enumerate(completions[problem.task_id])
        }
        for job in as_completed(jobs):
            place, index = jobs[job]
            results[place, index] = _result(problems[place].task_id, index, job.result())
            if on_result is not None:
                on_result(results[place, index])
    finally:
        executor.shutdown(cancel_futures=True)

    samples = len(completions[problems[0].task_id])
    shares = [
        fmean(results[place, index]["status"] == "passed" for index in range(samples)) for place in range(len(problems))
    ]
    ordered = [results[key] for key in sorted(results)]
    return Evaluation(len(problems), samples, fmean(shares), _interval(shares, samples), ordered)


def _check(problems: Sequence[Problem], completions: Mapping[str, Sequence[str]], workers: int) -> None:
    if workers < 1:
        raise UsageError(f"workers: expected 1 or more, got {workers}")
    if not problems:
        raise UsageError("problems: expected at least one, got none")
    names = [problem.task_id for problem in problems]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UsageError(f"problems: expected every task_id once, got {repeated[0]!r} again")
    missing = [name for name in names if name not in completions]
    if missing:
        raise UsageError(f"completions: expected every problem, got none for {len(missing)}, first {missing[0]!r}")
    unknown = sorted(set(completions) - set(names))
    if unknown:
        raise UsageError(f"completions: expected the problems' task_ids only, got {unknown[0]!r} too")
    for name in names:
        if isinstance(completions[name], str):
            raise UsageError(f"completions[{name!r}]: expected a list of strings, got one string")
    counts = {name: len(completions[name]) for name in names}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        few, many = min(counts, key=counts.get), max(counts, key=counts.get)
        raise UsageError(
            f"completions: expected equally many (at least one) for every problem, "
            f"got {counts[few]} for {few!r} and {counts[many]} for {many!r}"
        )


def _result(task_id: str, index: int, outcome: Outcome) -> dict[str, Any]:
    return {
        "task_id": task_id,
        "sample_index": index,
        "status": outcome.status,
        "detail": outcome.detail[:DETAIL_CHARACTERS],
        "seconds": round(outcome.seconds, 4),
    }


def _interval(shares: Sequence[float], samples: int) -> tuple[float, float]:
    """Wilson's interval at the effective sample size: see :class:`Evaluation`."""
    problems, p = len(shares), fmean(shares)
    variance = fmean((share - p) ** 2 for share in shares)
    effective = float(problems)
    if samples > 1 and 0 < p < 1:
        most = float(problems * samples)
        effective = min(most, problems * p * (1 - p) / variance) if variance > 0 else most
        effective = max(float(problems), effective)
    if samples == 1:
        return wilson_interval(round(math.fsum(shares)), problems)
    return wilson_interval(p * effective, effective)
