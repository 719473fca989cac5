"""The plots of the page, as inline SVG."""

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ssd_core.evaluate import Evaluation
from ssd_core.report.read import Completions, Run, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart in grey print and by the colour-blind: a dark blue and a light orange.
MAIN, OTHER, MUTED, INK = "#1f5fa8", "#e8a33d", "#9aa3ad", "#22272e"
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e9ed",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def loss_curve(run: Run) -> str | None:
    """Training loss by step and held-out points; None when there is nothing finite to draw."""
    train = [(number(r["step"]), number(r.get("loss"))) for r in run.train]
    heldout = [(number(r["step"]), number(r.get("loss"))) for r in run.heldout]
    if not any(math.isfinite(value) for _, value in [*train, *heldout]):
        return None
    with _plot(10.4, 3.4, "loss") as (axes, out):
        if train:
            axes.plot(
                *zip(*train, strict=True), color=MUTED, lw=1.2, marker="." if len(train) < 30 else "", label="training"
            )
        if heldout:
            axes.plot(*zip(*heldout, strict=True), color=MAIN, lw=1.6, ls="--", marker="o", ms=6, label="held-out")
            finite = [point for point in heldout if math.isfinite(point[1])]
            for (step, value), side in zip((finite[0], finite[-1]), ("left", "right"), strict=True) if finite else ():
                axes.annotate(
                    f"{value:.3f}", (step, value), textcoords="offset points", xytext=(0, 9), ha=side, color=MAIN
                )
            axes.margins(x=0.04, y=0.14)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss, nats per token")
        axes.locator_params(axis="x", integer=True)
        axes.legend(loc="upper right", ncols=2, bbox_to_anchor=(1, 1.12))
    return out[0]


def lengths(completions: Completions) -> str | None:
    """Histogram of completion lengths, stacked by finish reason."""
    if not completions:
        return None
    groups = [
        [length for length, stop in zip(completions.lengths, completions.stopped, strict=True) if stop == kind]
        for kind in (1, 0)
    ]
    top = max(completions.lengths)
    width = max(1, math.ceil((top + 1) / 30))  # whole tokens, so that no bin covers more integers than another
    edges = [start - 0.5 for start in range(0, top + width + 1, width)]
    names = [f"ended by itself ({len(groups[0])})", f"cut at the limit ({len(groups[1])})"]
    with _plot(10.4, 2.7, "lengths") as (axes, out):
        axes.hist(groups, edges, stacked=True, color=[MAIN, OTHER], label=names, edgecolor="white", linewidth=0.5)
        axes.set_xlabel("completion length, tokens")
        axes.set_ylabel("completions")
        axes.locator_params(axis="y", integer=True)
        axes.legend(loc="upper right", ncols=2, bbox_to_anchor=(1, 1.16))
    return out[0]


def histogram(values: Sequence[float], label: str, name: str) -> str | None:
    """Histogram of the finite values with their median marked."""
    finite = sorted(value for value in values if math.isfinite(value))
    if not finite:
        return None
    with _plot(5.1, 2.5, name) as (axes, out):
        axes.hist(finite, 30 if finite[0] < finite[-1] else 1, color=MAIN, edgecolor="white", linewidth=0.5)
        middle = finite[len(finite) // 2]
        axes.axvline(middle, color=OTHER, lw=2)
        axes.set_title(f"median {middle:.3g}", loc="right", fontsize=10, color=INK)
        axes.set_xlabel(label)
        axes.set_ylabel("completions")
        axes.locator_params(axis="y", integer=True)
    return out[0]


def pass_bars(before: Evaluation | None, after: Evaluation | None) -> str | None:
    """pass@1 before and after as bars with their intervals."""
    bars = [(name, e) for name, e in (("after", after), ("before", before)) if e is not None]
    if not bars:
        return None
    with _plot(10.4, 0.9 + 0.5 * len(bars), "pass") as (axes, out):
        for place, (name, evaluation) in enumerate(bars):
            low, high = (100 * bound for bound in evaluation.interval)
            share = 100 * evaluation.pass_at_1
            axes.barh(place, share, 0.55, color=MAIN if name == "after" else MUTED)
            axes.errorbar(
                share, place, xerr=[[max(0, share - low)], [max(0, high - share)]], color=INK, capsize=5, lw=1.4
            )
            axes.annotate(f"{share:.1f} %", (high, place), textcoords="offset points", xytext=(9, 0), va="center")
        axes.set_yticks(range(len(bars)), [name for name, _ in bars])
        axes.set_xlim(0, min(108, 1.25 * max(100 * e.interval[1] for _, e in bars) + 2))
        axes.grid(False, axis="y")
        axes.set_xlabel("pass@1 with 95 % interval, %")
    return out[0]


@contextmanager
def _plot(width: float, height: float, name: str) -> Iterator[tuple["Axes", list[str]]]:
    """Axes to draw on; on leaving, the list holds the SVG. Touches no pyplot state."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # hashsalt: the same run gives the same page, and no two plots of a page share an id.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": f"ssd-core {name}"}):
        figure = Figure(figsize=(width, height))
        canvas = FigureCanvasSVG(figure)
        out: list[str] = []
        yield figure.subplots(), out
        buffer = io.StringIO()
        canvas.print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)  # an HTML parser knows them
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # figure_1, axes_1: the same in every plot, and nothing refers to them
    out.append(svg)
