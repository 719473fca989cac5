"""The command line, from a real tiny run to its table, plots, page and comparison."""

import copy
import json
import re

import pytest
from ssd_core.bench import compare, machine, table
from ssd_core.bench import run as command
from typer.testing import CliRunner

from ssd_core.checks import UsageError

TINY = ["--tokens", "50", "--batch", "8", "--samples", "3", "--no-memory", "--devices", "cpu"]


def invoke(*arguments, code=0):
    done = CliRunner().invoke(command.app, [str(a) for a in arguments])
    if done.exit_code != code:
        raise done.exception or AssertionError(done.output)
    return done.output


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Two ops in two dtypes, and three points of a plot."""
    folder = tmp_path_factory.mktemp("bench")
    invoke("run", "--ops", "linear_cross_entropy,sample", "--cases", "97x16", "--dtypes", "float32,bfloat16",
           "--peers", "eager,HF,quack,ssd-core torch", *TINY, "--out", folder / "run.json")
    invoke("scale", "--case", "97x16", "--tokens", "40", "--values-n", "32,64", "--values-v", "128",
           "--values-d", "8", "--peers", "eager", "--samples", "2", "--no-memory", "--out", folder / "scale.json")
    both = json.loads((folder / "run.json").read_text())
    both["results"] += json.loads((folder / "scale.json").read_text())["results"]
    (folder / "both.json").write_text(json.dumps(both))
    return folder / "both.json"


@pytest.fixture
def result(file):
    return json.loads(file.read_text())


def test_the_file_says_where_and_what(result):
    assert {"commit", "date", "versions", "cpu", "threads", "load_average", "load_average_after"} <= result[
        "machine"].keys()
    keys = [(one["op"], one["dtype"], one["axis"], one["tokens"]) for one in result["results"]]
    assert keys[:4] == [("linear_cross_entropy", "float32", "", 50), ("linear_cross_entropy", "bfloat16", "", 50),
                        ("sample", "float32", "", 8), ("sample", "bfloat16", "", 8)]
    assert [key[2:] for key in keys[4:]] == [("N", 32), ("N", 64), ("V", 40), ("D", 40)]
    statuses = {row["variant"]: row["status"] for row in result["results"][0]["rows"]}
    assert statuses["PyTorch eager"] == "timed" and statuses["quack"] == "missing"


def test_the_table_has_every_variant_and_reason(result):
    text = table.table(result)
    assert "random: normal states and weights" in text and "N = 50, D = 16, V = 97" in text
    assert re.search(r"\| three bare GEMMs \| float32 \| 1\.00 \(\d+ GFLOP/s\) \|", text)
    assert re.search(r"\| PyTorch eager \| bfloat16 \| \d+\.\d\d \| [\d.]+ \([\d.]+ - [\d.]+\) \|", text)
    assert "| quack | float32 | (runs on cuda only) |" in text and text.count("| dtype |") == 2
    assert len({line.count("|") for line in text.split("\n\n")[1].splitlines()}) == 1


def test_a_wrong_variant_shows_its_error_in_place_of_its_time(result):
    row = result["results"][0]["rows"][0]
    del row["time"], row["over_floor"]
    row |= {"status": "wrong", "reason": "its error is above the bound", "errors": {"d_input": 0.5, "d_weight": 0.25}}
    (line,) = (line for line in table.table(result).splitlines() if "its error is above the bound" in line)
    assert line == ("| PyTorch eager | float32 | (wrong: its error is above the bound) |  |  | 5.0e-01 | 2.5e-01 |")


def test_each_result_has_the_commit_of_its_own_run(file, result, tmp_path):
    """Of several files, and of one that was resumed with another commit."""
    now = result["machine"]["commit"]
    result["machine"] |= {"commit": "0ldc0de"}
    (tmp_path / "old.json").write_text(json.dumps({**result, "results": result["results"][2:4]}))
    text = invoke("table", file, tmp_path / "old.json")
    assert [f"commit {commit}" in section for commit in (now, "0ldc0de") for section in text.split("\n\n`")] == [
        True, True, False, False, False, True]
    invoke("run", "--ops", "sample", "--cases", "97x16", "--batch", "8", "--dtypes", "float32,bfloat16,float16",
           "--peers", "eager,top k", "--samples", "2", "--no-memory", "--out", tmp_path / "old.json", "--resume")
    resumed = json.loads((tmp_path / "old.json").read_text())
    assert [machine.placed(resumed)[k]["machine"]["commit"] for k in range(3)] == ["0ldc0de", "0ldc0de", now]
    assert len(table.table(resumed).split("\n\n`")) == 2


def test_readme_gets_the_table_and_keeps_the_rest(file, result, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    invoke("table", file, "--readme", readme)
    assert readme.read_text() == f"before\n{table.BEGIN}\n{table.table(result)}\n{table.END}\nafter\n"


def test_plots_and_a_page_that_needs_nothing_else(file, tmp_path):
    invoke("plots", file, "--out", tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"index.html", "over_floor-linear_cross_entropy.png", "over_floor-sample.png",
                     *(f"time-{axis}-linear_cross_entropy.png" for axis in "NVD")}
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and "quack" in page and "runs on cuda only" in page
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page


def test_memory_is_plotted_where_it_was_measured(result, tmp_path):
    from ssd_core.bench import plots

    for one in result["results"]:
        for row in one["rows"]:
            row["extra_bytes"] = 1 << 20
    assert {f"memory-{axis}-linear_cross_entropy.png" for axis in "NVD"} <= plots.draw(result).keys()


def test_nothing_changed(file):
    assert invoke("compare", file, file).startswith("0 worse")


def slower(result, factor):
    row = result["results"][0]["rows"][0]
    row["time"] |= {name: factor * row["time"][name] for name in ("median", "p20", "p80")}
    return row


@pytest.mark.parametrize(("change", "expected"), [
    (lambda row: row["time"].update(dict.fromkeys(("median", "p20", "p80"), 9 * row["time"]["p80"])), "time x"),
    (lambda row: row.update(extra_bytes=99 << 20), "extra memory 1 -> 99 MiB"),
    (lambda row: row["errors"].update(d_input=0.5), "error d_input"),
    (lambda row: row.update(status="failed", reason="no room"), "timed -> failed no room"),
])
def test_each_regression_is_seen(file, result, tmp_path, change, expected):
    result["results"][0]["rows"][0]["extra_bytes"] = 1 << 20
    before = copy.deepcopy(result)
    change(result["results"][0]["rows"][0])
    found = compare.differences(before, result)
    assert len(found) == 1 and found[0].startswith("worse: linear_cross_entropy 97x16 50 float32 cpu PyTorch eager")
    assert expected in found[0]
    (tmp_path / "after.json").write_text(json.dumps(result))
    (tmp_path / "before.json").write_text(json.dumps(before))
    invoke("compare", tmp_path / "before.json", tmp_path / "after.json", code=1)


def test_what_is_within_the_spread_or_faster_is_no_regression(result):
    before = copy.deepcopy(result)
    row = result["results"][0]["rows"][0]
    row["time"]["median"] = row["time"]["p80"]
    assert compare.differences(before, result) == []
    slower(result, 0.01)
    (line,) = compare.differences(before, result)
    assert line.startswith("better")


def test_a_slower_machine_is_no_regression_relative_to_its_floor(result):
    result["results"] = result["results"][:1]
    result["results"][0]["rows"] = result["results"][0]["rows"][:1]
    result["results"][0]["rows"][0]["time"] |= {"p20": 0.9, "median": 1.0, "p80": 1.1}     # whatever this machine did
    before = copy.deepcopy(result)
    slower(result, 10)
    result["results"][0]["floor"]["time"]["median"] *= 10
    assert compare.differences(before, result) and compare.differences(before, result, relative=True) == []


def test_an_interrupted_run_goes_on(file, tmp_path):
    out = tmp_path / "out.json"
    arguments = ["run", "--ops", "cross_entropy", "--cases", "97x16", "--peers", "eager", *TINY, "--out", out]
    invoke(*arguments, "--dtypes", "float32")
    first = json.loads(out.read_text())["results"]
    assert "2/2 cross_entropy" in invoke(*arguments, "--dtypes", "float32,bfloat16", "--resume")
    both = json.loads(out.read_text())["results"]
    assert both[0] == first[0] and both[1]["dtype"] == "bfloat16" and len(both) == 2
    invoke(*arguments, "--dtypes", "float32")
    assert len(json.loads(out.read_text())["results"]) == 1     # without --resume it starts anew


@pytest.mark.parametrize(("arguments", "message"), [
    (["run", "--ops", "nothing"], "ops: expected some of linear_cross_entropy"),
    (["run", "--cases", "nothing"], "cases: expected"),
    (["run", "--dtypes", "int8"], "dtypes: expected"),
    (["run", "--tokens", "many"], "tokens: expected whole numbers"),
    (["scale", "--axes", "K"], "axes: expected"),
    (["table", "nowhere.json"], "nowhere.json: expected a result file"),
])
def test_wrong_use_is_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        invoke(*arguments)


def test_it_is_a_command_of_the_package(monkeypatch):
    from ssd_core import cli

    found = CliRunner().invoke(cli.app, ["bench", "--help"])
    assert found.exit_code == 0 and "compare" in found.output and "memory-probe" not in found.output
    assert CliRunner().invoke(cli.app, ["bench", "run", "--ops", "nothing"]).exit_code == 2
