"""A result file as Markdown."""

from __future__ import annotations

from pathlib import Path

from ssd_core.bench import machine

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"    # around README's table
SHARED = ("op", "case", "tokens", "device", "frozen")


def table(result: dict) -> str:
    """A table for each op on each case, its dtypes together if they are of one machine and commit."""
    sections: dict[tuple, list[dict]] = {}
    for one in machine.placed(result):
        if not one["axis"]:
            sections.setdefault((*(one[name] for name in SHARED), place(one)), []).append(one)
    return "\n\n".join(map(_section, sections.values()))


def replace_in(readme: Path, result: dict) -> None:
    before, _, rest = readme.read_text().partition(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{table(result)}\n{END}{rest.partition(END)[2]}")


def caption(one: dict) -> str:
    """What was measured."""
    parts = [f"`{one['op']}` on {one['case']}: N = {one['tokens']:,}, D = {one['hidden']:,}, V = {one['vocab']:,}",
             one["inputs"]]
    if one["frozen"]:
        parts.append("head frozen")
    if one["softcap"] is not None:
        parts.append(f"softcap {one['softcap']:g}")
    if one["scaled"]:
        parts.append(one["scaled"])
    if one["unchecked"]:
        parts.append(f"{', '.join(one['unchecked'])} unchecked: no room for it in float64")
    return "; ".join(parts) + "."


def place(one: dict) -> str:
    """Where, and what of."""
    return machine.line(one["machine"], one["device"])


def _section(some: list[dict]) -> str:
    first = some[0]
    counts = sorted({one["floor"]["time"]["samples"] for one in some if "time" in one["floor"]} or {0})
    samples = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} - {counts[-1]}"
    names = error_names(some)
    lines = [f"{caption(first)} {place(first)}, {samples} samples.", "",
             _line(header(some)), "|" + "---|" * len(header(some))]
    lines += [_line(cells) for one in some for cells in rows(one, names)]
    return "\n".join(lines)


def header(some: list[dict]) -> list[str]:
    first = some[0]
    return [first["op"], "dtype", f"time / {first['floor']['name']}", "median (p20 - p80), ms", "extra memory, MiB",
            *(f"error {name}" for name in error_names(some))]


def error_names(some: list[dict]) -> list[str]:
    """Gradients in norm; of a sampler, what was tested of its draws."""
    found = next((row["errors"] for one in some for row in one["rows"] if "errors" in row), {})
    return [name for name in found if "_row_" not in name and name != "value"]


def rows(one: dict, names: list[str]):
    """The cells of its floor and of its variants."""
    floor = one["floor"]
    unit = "GFLOP/s" if floor["flops"] else "GB/s"
    timed = [f"1.00 ({floor['rate'] / 1e9:.0f} {unit})", _ms(floor["time"])] if "time" in floor else ["", ""]
    yield [floor["name"], one["dtype"], *timed, "", *[""] * len(names)]
    for row in one["rows"]:
        errors = [f"{row['errors'][name]:.1e}" if name in row.get("errors", {}) else "" for name in names]
        if row["status"] == "timed":
            extra = row.get("extra_bytes")
            cells = [f"{row['over_floor']:.2f}", _ms(row["time"]), "" if extra is None else f"{extra / 2**20:.0f}"]
        else:
            status = "" if row["status"] == "missing" else f"{row['status']}: "
            cells = [f"({status}{row['reason']})", "", ""]
        yield [row["variant"], one["dtype"], *cells, *errors]


def _ms(time: dict) -> str:
    values = [1e3 * time[name] for name in ("median", "p20", "p80")]
    digits = 0 if values[0] >= 100 else 1 if values[0] >= 10 else 2
    return "{:.{d}f} ({:.{d}f} - {:.{d}f})".format(*values, d=digits)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"
