"""README says what is: its code runs as printed, its table is that of the committed JSON, its files exist."""

import ast
import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PRINTED = re.findall(r"test_readme.py -->\n```python\n(.*?)```", README, re.DOTALL)


def test_three_lines_run_as_printed(tmp_path, monkeypatch, model_folder):
    code = PRINTED[0]
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


def test_embedded_losses_run_as_printed(model):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(300, (2, 7), generator=g)
    given = {"model": model, "input_ids": labels, "labels": labels, "count": 12,
             "ids": torch.randint(300, (2, 7, 4), generator=g), "probs": torch.rand(2, 7, 4, generator=g) / 4,
             "teacher_hidden": torch.randn(2, 7, 48, generator=g), "teacher_head": torch.randn(300, 48, generator=g)}
    losses = []
    for statement in ast.parse(PRINTED[1]).body:
        exec(compile(ast.Module([statement], []), "README.md", "exec"), given)
        losses.append(given.pop("loss", None))
    losses = [loss for loss in losses if loss is not None]
    assert len(losses) == 3 and all(loss.requires_grad and loss.isfinite() for loss in losses)
    assert given["policy"].logprob.shape == labels.shape and given["policy"].entropy.requires_grad


def test_every_op_is_named():
    import ssd_core

    for name in ssd_core.__all__:
        if name.islower():
            assert f"`{name}" in README or f" {name}" in README or f".{name}" in README, name


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
