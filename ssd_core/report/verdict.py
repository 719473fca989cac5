"""The result of a run in words."""

import math
import os
from collections.abc import Iterable

from ssd_core.evaluate import Evaluation
from ssd_core.report.read import Run, number, read_run

NOT_RUN = "not run"


def summary(run: str | os.PathLike) -> str:
    """A few lines for the terminal: what was sampled, trained and measured, and the verdict.

    Reads what :func:`write_report` reads and raises the same errors; a part that does not exist is "not run".
    """
    found = read_run(run)
    lines = verdict(found)
    counts = found.counts
    if "completions" in counts:
        text = ", ".join(f"{value} {name}" for name, value in counts.items() if name != "completions")
        lines.append(f"Completions: {counts['completions']}" + (f" ({text})." if text else "."))
    else:
        lines.append(f"Sampling: {NOT_RUN}.")
    if found.train:
        last = found.train[-1]
        lines.append(f"Training: {int(number(last['step']))} steps, last loss {loss(number(last.get('loss')))}.")
    else:
        lines.append(f"Training: {NOT_RUN}.")
    lines += [f"Note: {note}." for note in found.notes]
    return "\n".join(lines)


def verdict(run: Run) -> list[str]:
    """One sentence or more on the held-out loss and on pass@1."""
    return [_loss_verdict(run), *_pass_verdict(run.before, run.after)]


def _loss_verdict(run: Run) -> str:
    points = [(number(r["step"]), number(r.get("loss"))) for r in run.heldout]
    if not points:
        return f"Held-out loss: {NOT_RUN}."
    if len(points) == 1:
        return f"Held-out loss was measured once, at step {points[0][0]:.0f}: {loss(points[0][1])} nats per token."
    (first_step, first), (last_step, last) = points[0], points[-1]
    if not (math.isfinite(first) and math.isfinite(last)):
        return (
            f"Held-out loss is not a number: {loss(first)} at step {first_step:.0f}, {loss(last)} at {last_step:.0f}."
        )
    if loss(first) == loss(last):
        word = "stayed"
    else:
        word = "fell" if last < first else "rose"
    change = f" ({100 * (last - first) / first:+.1f} %)" if first > 0 else ""
    return (
        f"Held-out loss {word} from {loss(first)} to {loss(last)} nats per token{change.replace('-', '−')}, "
        f"step {first_step:.0f} to {last_step:.0f}."
    )


def _pass_verdict(before: Evaluation | None, after: Evaluation | None) -> Iterable[str]:
    if before is None and after is None:
        yield f"pass@1: {NOT_RUN}."
        return
    if before is None or after is None:
        name, only = ("after", after) if before is None else ("before", before)
        yield f"pass@1 was measured only {name} training: {with_interval(only)}. No comparison."
    else:
        text = f"pass@1 went from {with_interval(before)} to {with_interval(after)}"
        ours, theirs = before.passed, after.passed
        if set(ours) != set(theirs) or before.samples_per_problem != after.samples_per_problem:
            yield f"{text}, but on different problems or numbers of samples: no comparison."
        else:
            low, high = sorted((before, after), key=lambda evaluation: evaluation.pass_at_1)
            overlap = low.interval[1] >= high.interval[0]
            yield f"{text}: the intervals overlap, not significant." if overlap else f"{text}: the intervals are apart."
            gained, lost = changes(before, after)
            what, only = ("solved", "only ") if before.samples_per_problem == 1 else ("solved more often", "")
            yield (
                f"On the same problems: {len(gained)} {what} {only}after training, {len(lost)} {only}before "
                f"(exact sign test: p = {sign_test(len(gained), len(lost)):.2g})."
            )
    errors = [(name, e.statuses.get("error", 0)) for name, e in (("before", before), ("after", after)) if e]
    for name, count in errors:
        if count:
            yield f"Caution: {count} programs could not be run {name} training and count as not passed."


def changes(before: Evaluation, after: Evaluation) -> tuple[list[str], list[str]]:
    """The ``task_id`` of the problems with more right samples after than before, and with fewer."""
    ours, theirs = before.passed, after.passed
    gained = [name for name, count in ours.items() if theirs.get(name, count) > count]
    lost = [name for name, count in ours.items() if theirs.get(name, count) < count]
    return gained, lost


def sign_test(gained: int, lost: int) -> float:
    """Two-sided exact sign test (McNemar's): the probability of a split at least as uneven when both are as likely."""
    total = gained + lost
    tail = sum(math.comb(total, count) for count in range(min(gained, lost) + 1)) / 2**total
    return min(1.0, 2 * tail)


def with_interval(evaluation: Evaluation) -> str:
    low, high = evaluation.interval
    return f"{percent(evaluation.pass_at_1)} (95 % interval {100 * low:.1f} to {percent(high)})"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "NaN" if math.isnan(value) else "infinite"
