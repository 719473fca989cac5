"""report.html: one self-contained page."""

import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssd_core.evaluate import Evaluation
from ssd_core.report.read import Completions, Run, number, read_run, section
from ssd_core.report.verdict import NOT_RUN, changes, verdict

from . import plots

TEMPLATE = Path(__file__).with_name("template.html")
TEXT_CHARACTERS = 1600
VALUE_CHARACTERS = 300
PROBLEM_COLUMNS = 4
COUNTS = {
    "completions": "sampled",
    "empty": "empty",
    "truncated": "cut at the length limit",
    "dropped": "left out of training",
    "trained": "trained on",
}


def write_report(run: str | os.PathLike) -> Path:
    """Write ``run/report.html`` and return its path.

    Reads ``config.json`` (the only part that has to exist), ``metrics.jsonl``, ``samples/completions.jsonl``,
    ``summary.json`` and ``evaluation/{before,after}.json``; what does not exist is shown as "not run". The page loads
    nothing from elsewhere and runs no script; model output is escaped. An existing report is replaced in one step.
    Raises :class:`UsageError` when ``run`` has no usable ``config.json``.
    """
    import jinja2
    from markupsafe import Markup

    found = read_run(run)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=_title(found.config),
        version=found.config.get("version"),
        verdict=verdict(found),
        notes=found.notes,
        not_run=NOT_RUN,
        plots={name: Markup(svg) if svg else None for name, svg in _plots(found).items()},
        no_loss="No finite loss was recorded." if found.train or found.heldout else f"Training: {NOT_RUN}.",
        completions=found.completions,
        counts=_counts(found),
        training=_training(found.train),
        speed=_speed(found.summary),
        problems=_problems(found.before, found.after),
        samples=[_sample(record) for record in found.completions.shown] if found.completions else [],
        settings=_settings(found.config),
    )
    path = found.path / "report.html"
    descriptor, temporary = tempfile.mkstemp(dir=found.path, prefix=".report.html.")
    try:
        with open(descriptor, "wb") as file:
            file.write(page.encode("utf-8", "replace"))  # a model may emit half a surrogate pair
            os.fchmod(descriptor, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def _title(config: dict[str, Any]) -> str:
    model = config.get("model")
    if isinstance(model, dict):
        model = next((model[key] for key in ("name", "path", "model", "name_or_path", "id") if model.get(key)), None)
    # A local path ends with the model's name.
    return f"Self-distillation of {str(model).rstrip('/').rsplit('/', 1)[-1]}" if model else "Self-distillation"


def _plots(run: Run) -> dict[str, str | None]:
    completions = run.completions or Completions()
    return {
        "loss": plots.loss_curve(run),
        "lengths": plots.lengths(completions),
        "entropy": plots.histogram(completions.entropy, "mean entropy, nats per token", "entropy"),
        "kept_mass": plots.histogram(completions.kept_mass, "mean kept probability mass", "kept"),
        "pass_at_1": plots.pass_bars(run.before, run.after),
    }


def _counts(run: Run) -> list[tuple[str, str, str]]:
    """Rows of (name, count, share)."""
    counts = run.counts
    total = number(counts.get("completions"))
    rows = []
    for key, name in COUNTS.items():
        count = number(counts.get(key))
        share = f"{count / total:.1%}".replace("%", " %") if total > 0 and math.isfinite(count) else ""
        rows.append((name, _number(count), share if key != "completions" else ""))
    return rows


def _training(train: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    if not train:
        return []
    tokens = [number(record.get("tokens")) for record in train]
    last = train[-1]
    return [
        ("optimizer steps", _number(number(last["step"]))),
        ("tokens", _number(math.fsum(tokens))),  # NaN when a step has none
        ("last loss", _number(number(last.get("loss")))),
        ("last gradient norm", _number(number(last.get("grad_norm")))),
        ("last learning rate", _number(number(last.get("learning_rate")))),
    ]


def _speed(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of (phase, seconds, tokens per second)."""
    seconds, rates = section(summary, "seconds"), section(summary, "tokens_per_second")
    return [
        (name, _number(number(seconds.get(name))), _number(number(rates.get(name)))) for name in {**seconds, **rates}
    ]


def _problems(before: Evaluation | None, after: Evaluation | None) -> dict[str, Any] | None:
    """The per-problem table, cut into columns of rows (task_id, before, after, "gained" | "lost" | "")."""
    if before is None and after is None:
        return None
    gained, lost = changes(before, after) if before and after else ([], [])
    names = list(dict.fromkeys([*(before.passed if before else ()), *(after.passed if after else ())]))
    cells = [_cells(evaluation) for evaluation in (before, after)]
    rows = [
        (
            name,
            *(cell.get(name, NOT_RUN) for cell in cells),
            "gained" if name in gained else "lost" if name in lost else "",
        )
        for name in names
    ]
    height = math.ceil(len(rows) / PROBLEM_COLUMNS)
    columns = [rows[start : start + height] for start in range(0, len(rows), max(1, height))]
    return {"columns": columns, "gained": gained, "lost": lost}


def _cells(evaluation: Evaluation | None) -> dict[str, str]:
    """What the table says of each problem: the status of its only sample, or ``3 of 10``."""
    if evaluation is None:
        return {}
    if evaluation.samples_per_problem == 1:
        return {result["task_id"]: result["status"] for result in evaluation.results}
    return {name: f"{count} of {evaluation.samples_per_problem}" for name, count in evaluation.passed.items()}


def _sample(record: dict[str, Any]) -> dict[str, Any]:
    text = record.get("text")
    text = text if isinstance(text, str) else ""
    tokens = record.get("token_ids")
    facts = [
        f"prompt {record.get('prompt_index', '?')}, sample {record.get('sample_index', '?')}",
        f"{len(tokens) if isinstance(tokens, list) else '?'} tokens",
        {"stop": "ended by itself", "length": "cut at the limit"}.get(record.get("finish_reason"), "end unknown"),
    ]
    for key, name in (("entropy", "entropy"), ("kept_mass", "kept mass"), ("logprob", "log-probability")):
        value = number(record.get(key))
        if math.isfinite(value):
            facts.append(f"{name} {value:.3f}")
    return {"facts": facts, "text": text[:TEXT_CHARACTERS], "more": max(0, len(text) - TEXT_CHARACTERS)}


def _settings(config: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Sections of (name, value); nested names joined by dots, settings outside a section first."""
    general: list[tuple[str, str]] = []
    sections = []
    for name, value in config.items():
        if isinstance(value, dict):
            sections.append((name, _flat(value)))
        else:
            general.append((name, _value(value)))
    return ([("general", general)] if general else []) + sections


def _flat(record: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in record.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", _value(value)))
    return rows


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= VALUE_CHARACTERS else f"{text[:VALUE_CHARACTERS]} …"


def _number(value: float) -> str:
    """``12 345``, ``0.0123``, or a dash for what is not known."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "infinite"
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.4g}"
