"""One self-contained HTML page of a result file: its tables and its plots."""

from __future__ import annotations

import base64
from pathlib import Path

from ssd_core.bench import machine, plots, table

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ssd-core bench</title>
<style>
body { margin: 0 auto; max-width: 1120px; padding: 28px 32px; color: #22272e; font: 15px/1.5 system-ui, sans-serif; }
h2 { font-size: 18px; margin: 30px 0 8px; padding-top: 12px; border-top: 1px solid #dde1e6; }
p, figcaption { color: #5b6570; }
figure { margin: 0 0 20px; } img { max-width: 100%; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 2px 12px 2px 0; border-bottom: 1px solid #dde1e6; }
tr.ours td { font-weight: 600; }
tr.absent td { color: #8a939d; font-weight: 400; }
</style>
</head>
<body>
<h1>ssd-core bench</h1>
{% for where in places %}
<p>{{ where }}.</p>
{% endfor %}
<p>Calls of all variants are interleaved; a variant whose error is above its bound gets no time. Extra memory is the
peak beyond inputs and what is returned. Errors are relative to float64.</p>
{% for name, png in images.items() %}
<figure><img src="data:image/png;base64,{{ png }}" alt="{{ name }}"><figcaption>{{ name }}</figcaption></figure>
{% endfor %}
{% for one in results %}
<h2>{{ one.op }}, {{ one.case }}, {{ one.dtype }}{{ ", over " + one.axis if one.axis }}</h2>
<p>{{ one.about }}. {{ one.caption }}</p>
<table>
<tr>{% for cell in one.header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for kind, cells in one.lines %}
<tr class="{{ kind }}">{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endfor %}
</body>
</html>
"""


def write_page(result: dict, folder: Path) -> list[Path]:
    """The PNG files and ``index.html`` in ``folder``; their paths."""
    import jinja2

    paths = plots.write(result, folder)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    placed = machine.placed(result)
    results = [{**one, "caption": f"{table.caption(one)} {table.place(one)}.", "header": table.header([one]),
                "lines": _lines(one)} for one in placed]
    page = environment.from_string(TEMPLATE).render(
        places=dict.fromkeys(map(_place, placed)),
        images={path.name: base64.b64encode(path.read_bytes()).decode() for path in paths}, results=results)
    index = folder / "index.html"
    index.write_text(page, encoding="utf-8")
    return [*paths, index]


def _place(one: dict) -> str:
    where = one["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return f"{table.place(one)}. Load average {', '.join(map(str, where['load_average']))}. {versions}"


def _lines(one: dict):
    """(class, cells) of each row of its table."""
    kinds = ["floor", *("absent" if row["status"] != "timed" else "ours" if row["ours"] else "" for row in one["rows"])]
    return list(zip(kinds, table.rows(one, table.error_names([one])), strict=True))
