"""README says what is: its code runs as printed, its table is that of the committed JSON, its files exist."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_three_lines_run_as_printed(tmp_path, monkeypatch, model_folder):
    code = re.search(r"test_readme.py -->\n```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) == 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/model").symlink_to(model_folder)
    prompts = [{"prompt": f"Write a function that adds {n}."} for n in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    model, report, *_ = printed.getvalue().split()
    assert (tmp_path / model / "config.json").exists() and (tmp_path / report).exists()
    assert re.search(r"\(\d+\.\d+, \d+\.\d+\)", printed.getvalue())


def test_the_table_is_that_of_the_committed_json():
    from ssd_core.bench.run import BEGIN, END, table

    shown = README.partition(BEGIN)[2].partition(END)[0].strip()
    files = list((ROOT / "bench/results").glob("*/linear_cross_entropy.json"))
    assert shown and shown in [table(json.loads(file.read_text())) for file in files]


def test_listed_files_exist():
    tree = README.split("## Files")[1].split("```")[1]
    top, names = None, []
    for line in tree.strip().splitlines():
        entry = line.split("  ")[0] if not line.startswith(" ") else line.strip().split("  ")[0]
        for name in entry.split():
            if not line.startswith(" "):
                top = name
                names.append(name)
            else:
                names.append(top + name)
    assert len(names) > 20
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", ["make demo", "make test", "ssd-core info", "ssd-core run", "requirements-torch.txt"])
def test_names_are_mentioned(name):
    assert name in README


def test_commands_of_the_command_line_are_the_real_ones():
    from ssd_core.cli import app

    shown = set(re.findall(r"^ssd-core (\w+) +[-#]", README, re.MULTILINE))
    real = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert shown == real
