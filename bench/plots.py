"""The plots of a result file, as PNG."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# told apart by the colour-blind; ours are the dark ones, and their lines are solid
OURS = ("#1f5fa8", "#0b3d6e", "#4c8ed9", "#123", "#7aa6d6")
OTHERS = ("#e8a33d", "#c0504d", "#6a994e", "#8d6cab", "#9aa3ad", "#b08968")
INK, MUTED = "#22272e", "#9aa3ad"
STYLE = {
    "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED, "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True, "grid.color": "#e6e9ed", "xtick.color": INK,
    "ytick.color": INK, "legend.frameon": False, "figure.constrained_layout.use": True,
}
AXES = {"N": "tokens", "V": "vocab", "D": "hidden"}
LABELS = {"N": "N, tokens", "V": "V, vocabulary", "D": "D, hidden size"}


def draw(result: dict) -> dict[str, bytes]:
    """PNG by file name."""
    plots = {}
    single = [one for one in result["results"] if not one["axis"]]
    for op in dict.fromkeys(one["op"] for one in single):
        some = [one for one in single if one["op"] == op and _timed(one)]
        if some:
            plots[f"over_floor-{op}.png"] = _over_floor(op, some)
    for what, label in (("time", "median time, ms"), ("memory", "peak extra memory, MiB")):
        for axis in AXES:
            for op in dict.fromkeys(one["op"] for one in result["results"] if one["axis"] == axis):
                some = [one for one in result["results"] if (one["axis"], one["op"]) == (axis, op)]
                lines = _lines(some, axis, what)
                if lines:
                    plots[f"{what}-{axis}-{op}.png"] = _growth(some[0], lines, axis, label)
    return plots


def write(result: dict, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, png in draw(result).items():
        paths.append(folder / name)
        paths[-1].write_bytes(png)
    return paths


def _timed(one: dict) -> list[dict]:
    return [row for row in one["rows"] if row["status"] == "timed"]


def _over_floor(op: str, some: list[dict]) -> bytes:
    """A panel for each case and dtype, a bar for each variant: median, and 20th to 80th percentile."""
    heights = [len(_timed(one)) + 1.6 for one in some]
    with _figure(9.5, 0.28 * sum(heights) + 0.8) as (figure, out):
        panels = figure.subplots(len(some), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, one in zip(panels, some, strict=True):
            rows = _timed(one)[::-1]
            base = one["floor"]["time"]["median"]
            values = [row["over_floor"] for row in rows]
            ends = [[v - row["time"]["p20"] / base for v, row in zip(values, rows, strict=True)],
                    [row["time"]["p80"] / base - v for v, row in zip(values, rows, strict=True)]]
            axes.barh(range(len(rows)), values, 0.7, color=[OURS[0] if row["ours"] else MUTED for row in rows],
                      xerr=[[max(0, e) for e in end] for end in ends], error_kw={"ecolor": INK, "lw": 1})
            for place, (value, above) in enumerate(zip(values, ends[1], strict=True)):
                axes.annotate(f"{value:.2f}", (value + max(0, above), place), xytext=(6, 0),
                              textcoords="offset points", va="center")
            axes.set_yticks(range(len(rows)), [row["variant"] for row in rows])
            axes.set_xscale("log")
            axes.axvline(1, color=INK, lw=1)
            axes.grid(False, axis="y")
            axes.margins(x=0.15)
            frozen = ", head frozen" * one["frozen"]
            axes.set_title(f"{one['case']}, {one['dtype']}: N = {one['tokens']:,}, D = {one['hidden']:,}, "
                           f"V = {one['vocab']:,}{frozen} ({one['device']})", loc="left", fontsize=10)
        panels[-1].set_xlabel(f"{op}: time over that of {some[-1]['floor']['name']} (log scale)")
    return out.getvalue()


def _lines(some: list[dict], axis: str, what: str) -> dict[tuple[str, bool], list[tuple[int, float]]]:
    """(x, y) points of each variant and dtype, where there is something to draw on a log scale."""
    found: dict[tuple[str, bool], list] = {}
    for one in sorted(some, key=lambda one: one[AXES[axis]]):
        x = one[AXES[axis]]
        rows = _timed(one)
        for row in rows:
            y = 1e3 * row["time"]["median"] if what == "time" else (row.get("extra_bytes") or 0) / 2**20
            if y > 0:
                found.setdefault((f"{row['variant']}, {one['dtype']}", row["ours"]), []).append((x, y))
        if what == "time":
            key = (f"{one['floor']['name']}, {one['dtype']}", False)
            found.setdefault(key, []).append((x, 1e3 * one["floor"]["time"]["median"]))
    return found


def _growth(one: dict, lines: dict, axis: str, label: str) -> bytes:
    fixed = {name: f"{name} = {one[field]:,}" for name, field in AXES.items() if name != axis}
    with _figure(7.5, 4.6) as (figure, out):
        axes = figure.subplots()
        colours = {True: iter(OURS * 9), False: iter(OTHERS * 9)}
        for (name, ours), points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", ms=4, lw=2 if ours else 1.4, ls="-" if ours else "--",
                      color=next(colours[ours]), label=name)
        axes.set_xscale("log")
        axes.minorticks_off()
        values = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.set_yscale("log")
        axes.set_xlabel(f"{LABELS[axis]} (log scale)")
        axes.set_ylabel(f"{label} (log scale)")
        axes.set_title(f"{one['op']}, {', '.join(fixed.values())} ({one['device']})", loc="left", fontsize=10)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return out.getvalue()


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple]:
    """A figure to draw on and, after leaving, its PNG. Touches no pyplot state."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure, out = Figure(figsize=(width, height)), io.BytesIO()
        canvas = FigureCanvasAgg(figure)
        yield figure, out
        canvas.figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
