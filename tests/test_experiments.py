"""The studies of experiments/, on the tiny model: they run, resume, compare and conclude."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
from conftest import make_model, make_tokenizer

from ssd_core.checks import UsageError
from ssd_core.files import AppendOnly

FILE = Path(__file__).resolve().parents[1] / "experiments/grad_filter.py"
WIDER = 10
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def study():
    if not FILE.exists():
        pytest.skip("experiments/ is in the repository only")
    spec = importlib.util.spec_from_file_location("grad_filter_study", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module     # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with room for the demo prompts, whose vocabulary is several tiles of the filter."""
    folder = tmp_path_factory.mktemp("study-model")
    make_model(vocab=1500, max_position_embeddings=1024).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def run(study, folder, out, work, **options):
    study.run(out, folder, work, **{
        "seeds": 1, "steps": 2, "sequences": 2, "learning_rate": 1e-3, "samples": 1, "max_new_tokens": 4,
        "head": list(study.HEADS), **options})
    return AppendOnly(out).read()


@pytest.fixture(scope="module")
def lines(study, folder, tmp_path_factory):
    """Of a run that was interrupted and went on, in which every bound is wider: the tiny model has few tiles, and
    bfloat16 hides little errors."""
    work = tmp_path_factory.mktemp("study")
    trained = []

    def train(arm, *arguments):
        trained.append((arm.head, arm.name))
        if len(trained) == 4:
            raise KeyboardInterrupt
        return train_arm(arm, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        train_arm = study.train
        patch.setattr(study, "train", train)
        patch.setattr(study, "ARMS", tuple(dataclasses.replace(
            arm, grad_filter=WIDER * arm.grad_filter) for arm in study.ARMS))
        with pytest.raises(KeyboardInterrupt):
            run(study, folder, work / "results.jsonl", work / "work")
        found = run(study, folder, work / "results.jsonl", work / "work")
    assert trained[3] == trained[4] and len(trained) == len(study.ARMS) + 1
    return found, work


def test_every_arm_runs_and_what_is_done_is_not_run_again(study, folder, lines):
    lines, work = lines
    assert [(line["head"], line["arm"]) for line in lines] == [(arm.head, arm.name) for arm in study.ARMS]
    assert not list((work / "work").glob("exact-*.pt"))
    assert run(study, folder, work / "results.jsonl", work / "work") == lines
    with pytest.raises(UsageError, match="other settings"):
        run(study, folder, work / "results.jsonl", work / "work", steps=3)


def test_arms_differ_as_they_should(study, lines):
    found = {(line["head"], line["arm"]): line for line in lines[0]}
    start = found["trained", "exact"]["before"]
    for (head, name), line in found.items():
        assert line["before"] == start and all(line["after"][loss] != start[loss] for loss in study.LOSSES)
        arm = next(arm for arm in study.ARMS if (arm.head, arm.name) == (head, name))
        if name != "exact":
            assert line["distance"] < 1, (head, name)
            assert ("unseen_rows" in line) == (head == "trained")
        if arm.filtered:
            assert 0 < line["active"] < 1 and 0 < line["skipped_mean"] <= line["skipped_max"] <= WIDER * arm.grad_filter
        else:
            assert "active" not in line
    for head in study.HEADS:
        distance = {name: found[head, name]["distance"] for name in ("float32", "0.001", "0.01", "0.01 dropped")}
        assert all(distance.values()) and distance["0.01"] != distance["0.01 dropped"]
    unseen = [found["trained", name]["unseen_rows"] for name in ("0.01, exact dW", "0.001", "0.01", "0.03")]
    assert unseen == sorted(unseen)


def line_of(head, arm, seed, loss, **more):
    machine = {"cpu": "a processor", "threads": 1, "gpu": [], "versions": {"torch": "2"}, "commit": "c",
               "uncommitted": False, "date": "d"}
    settings = dict.fromkeys(("train_completions", "train_tokens", "held_out_completions", "held_out_tokens",
                              "rare_tokens", "other_tokens", "max_steps", "per_device_train_batch_size",
                              "learning_rate", "min_lr"), 1)
    return {"head": head, "arm": arm, "seed": seed, "before": {"held_out": 1.0, "rare": 2.0, "other": 3.0},
            "after": {"held_out": loss, "rare": 1.5, "other": 3.5}, "seconds": 1.0, "settings": settings,
            "device": "cpu", "machine": machine, **more}


def test_conclusion_follows_the_rule(study, tmp_path, capsys):
    after = {"exact": 0.9, "float32": 0.9031, "0.01, exact dW": 0.9029, "0.001": 0.897, "0.01": 0.9032, "0.03": 0.9}
    lines = [line_of("trained", arm, seed, loss + seed / 100, distance=0.1)
             for arm, loss in after.items() for seed in (0, 1)]
    lines.append(line_of("trained", "0.001", 7, 5.0))       # no exact run to pair it with
    frozen = [line_of("frozen", arm, 0, 0.9 + apart) for arm, apart in
              {"exact": 0.0, "0.001": 0.003, "0.01": -0.0032}.items()]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in frozen))
    study.summary([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out/convergence")
    result = json.loads((tmp_path / "out/convergence.json").read_text())
    # float32 makes 0.0031 of the held-out loss, and nothing of the others: there the limit is 2 % of 0.1
    assert result["limits"]["trained"] == pytest.approx({"held_out": 0.0031, "rare": 0.0019, "other": 0.0019})
    assert result["limits"]["frozen"] == pytest.approx({"held_out": 0.0031, "rare": 0.002, "other": 0.002})
    assert result["conclusion"] == {        # 0.03 is the same again, but 0.01 is worse
        "trained": {"both": {"same": 0.001, "no_worse": 0.001}, "d_input": {"same": 0.01, "no_worse": 0.01}},
        "frozen": {"both": {"same": 0.001, "no_worse": 0.01}}}
    row = next(row for row in result["arms"] if row["arm"] == "0.001" and row["head"] == "trained")
    assert row["seeds"] == [0, 1] and row["difference"]["held_out"]["mean"] == pytest.approx(-0.003)
    text = (tmp_path / "out/convergence.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "frozen head: grad_filter leaves training the same up to 0.001 and no worse up to 0.01." in text
    assert "| 0.01 | +32.0 (+32.0, +32.0) **worse** |" in text and "| 0.01 | -32.0 (-32.0, -32.0) *lower* |" in text


def test_table_of_gradients(study, folder, tmp_path, capsys):
    study.table(folder, 128, [0.1, 0.01], tmp_path / "table.json")
    wide, narrow, rounded = json.loads((tmp_path / "table.json").read_text())["rows"]
    for row in (wide, narrow):
        assert row["skipped_max"] <= row["delta"] and 0 < row["active"] < 1
        for name in ("d_input", "d_weight"):
            assert row["matched"][name] < row["dropped"][name] < row["delta"] * 2
    assert wide["active"] < narrow["active"] and wide["dropped"]["d_input"] > narrow["dropped"]["d_input"]
    assert 1e-4 < rounded["rounded"]["d_input"] < 0.1
    assert capsys.readouterr().out.count("\n") == 5
