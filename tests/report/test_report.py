import json
import math
import random
import re
from html.parser import HTMLParser

import pytest

from ssd_core.checks import UsageError
from ssd_core.evaluate import Evaluation, wilson_interval
from ssd_core.report import summary, write_report

EVIL = "</pre><script>alert(1)</script><img src=https://evil.example/x onerror=alert(1)>"
CONFIG = {
    "version": "0.1.0",
    "seed": 0,
    "model": {"path": "models/Tiny<u>Coder", "dtype": "bfloat16", "lora": {"rank": 8, "targets": ["q", "v"]}},
    "prompts": {"file": "prompts.jsonl", "sha256": "ab" * 400},
    "sampling": {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "max_new_tokens": 128, "note": EVIL},
    "training": {"learning_rate": 5e-6, "targets": "soft"},
}


def jsonl(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def evaluation(passed, total=164, samples=1):
    results = [
        {
            "task_id": f"HumanEval/{i}",
            "sample_index": j,
            "status": "passed" if i in passed else ("timeout" if i % 17 == 0 else "failed"),
            "detail": "",
            "seconds": 0.1,
        }
        for i in range(total)
        for j in range(samples)
    ]
    return Evaluation(total, samples, len(passed) / total, wilson_interval(len(passed), total), results)


def completion(index, **changes):
    rng = random.Random(index)
    length = min(128, int(rng.gammavariate(4, 18)) + 1)
    return {
        "prompt_index": index // 2,
        "sample_index": index % 2,
        "prompt_ids": [1, 2],
        "token_ids": list(range(length)),
        "text": f'    """{index}"""\n    return x & {EVIL}\n',
        "finish_reason": "length" if length == 128 else "stop",
        "entropy": rng.gammavariate(6, 0.06),
        "kept_mass": 1 - rng.gammavariate(2, 0.01),
        "logprob": -0.4,
        **changes,
    }


@pytest.fixture
def bare(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.fixture
def full(bare):
    train = [
        {
            "kind": "train",
            "step": step,
            "loss": 0.9 + 0.5 * math.exp(-step / 40) + random.Random(step).gauss(0, 0.04),
            "grad_norm": 1.0,
            "learning_rate": 5e-6,
            "tokens": 2048,
            "tokens_per_second": 190.0,
        }
        for step in range(1, 201)
    ]
    heldout = [{"kind": "eval", "step": s, "loss": v, "tokens": 999} for s, v in ((0, 1.41), (100, 1.1), (200, 1.02))]
    jsonl(bare / "metrics.jsonl", [heldout[0], *train[:100], heldout[1], *train[100:], heldout[2]])
    jsonl(bare / "samples" / "completions.jsonl", map(completion, range(400)))
    counts = {"completions": 400, "empty": 0, "truncated": 31, "dropped": 31, "trained": 369}
    times = {"seconds": {"sample": 1234.5, "train": 2345.6}, "tokens_per_second": {"sample": 260.1, "train": 190.0}}
    (bare / "summary.json").write_text(json.dumps({"counts": counts, **times}))
    (bare / "evaluation").mkdir()
    evaluation({1, 5, 9, 22, 40, 77}).save(bare / "evaluation" / "before.json")
    evaluation({1, 5, 9, 22, 41, 78, 100, 101, 130, 150}).save(bare / "evaluation" / "after.json")
    return bare


class Page(HTMLParser):
    """Text, tags and balance of a page."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.text, self.open, self.pre = [], "", [], []
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)
        if tag == "pre":
            self.pre.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.text += " "

    def handle_data(self, data):
        if not {"style", "title", "svg"} & set(self.open):
            self.text += data
        if "pre" in self.open:
            self.pre[-1] += data

    @property
    def words(self):
        return " ".join(self.text.split())


def check_safe(page):
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "image", "u"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "data", "action"):
            assert attributes.get(name, "#").startswith("#")
        assert "url(#" in attributes.get("style", "url(#") or "url(" not in attributes["style"]
    # Neither the page nor its styles point anywhere; the escaped model text may.
    assert not re.search(r"https?://|@import", page.source.replace("https://evil.example", ""))


def test_everything(full):
    path = write_report(full)
    assert path == full / "report.html" and sorted(p.name for p in full.iterdir() if "report" in p.name) == [path.name]
    page = Page(path)
    check_safe(page)
    assert sum(tag == "svg" for tag, _ in page.tags) == 5
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "Self-distillation of Tiny<u>Coder" in page.words and "not run" not in page.words
    assert "Held-out loss fell from 1.4100 to 1.0200 nats per token (−27.7 %), step 0 to 200." in page.words
    assert "pass@1 went from 3.7 % (95 % interval 1.7 to 7.8 %) to 6.1 % (95 % interval 3.3 to 10.9 %)" in page.words
    assert "the intervals overlap, not significant" in page.words
    assert "6 solved only after training, 2 only before (exact sign test: p = 0.29)" in page.words
    assert "Gained: HumanEval/41, HumanEval/78, HumanEval/100" in page.words
    assert "HumanEval/40 passed failed −" in page.words and "HumanEval/163 failed failed Settings" in page.words
    assert "cut at the length limit 31 7.8 %" in page.words and "trained on 369 92.2 %" in page.words
    assert "sample 1 234 260.1" in page.words
    assert 'lora.targets ["q", "v"]' in page.words and "abab …" in page.words
    assert len(page.pre) == 3 and page.pre[0].strip("\n") == completion(0)["text"].strip("\n")
    assert "prompt 199, sample 1" in page.words


def test_same_run_same_page(full):
    first = write_report(full).read_bytes()
    assert write_report(full).read_bytes() == first


def test_only_config(bare):
    page = Page(write_report(bare))
    check_safe(page)
    assert not [tag for tag, _ in page.tags if tag == "svg"]
    for part in ("Held-out loss: not run", "pass@1: not run", "Training: not run", "Evaluation: not run"):
        assert part in page.words
    assert "Sampling: not run" in page.words and "sampled not run" in page.words and "trained on not run" in page.words
    assert not re.search(r"\b0\b", page.words.split("Settings")[0])  # never shown as zeros


def test_zero_completions(bare):
    jsonl(bare / "samples" / "completions.jsonl", [])
    page = Page(write_report(bare))
    assert "No completion was sampled" in page.words and "sampled 0" in page.words
    assert "Completions: 0" in summary(bare)


def test_empty_and_unrecorded_values(bare):
    nan = float("nan")
    jsonl(
        bare / "samples" / "completions.jsonl",
        [
            completion(0, token_ids=[], text="", entropy=nan, kept_mass=None),
            {"prompt_index": 1},
            completion(2, entropy=float("inf"), text="\n\n\ud800end"),
            completion(3, entropy=0.25, kept_mass=1.0),
        ],
    )
    jsonl(
        bare / "metrics.jsonl",
        [
            {"kind": "eval", "step": 0, "loss": 2.0},
            {"kind": "train", "step": 1, "loss": nan},
            {"kind": "train", "step": 2, "loss": 1.5, "tokens": None},
            {"kind": "train", "step": 3},
            {"kind": "eval", "step": 3, "loss": nan},
            {"kind": "other"},
        ],
    )
    (bare / "summary.json").write_text(
        '{"counts": {"trained": null}, "seconds": {"sample": NaN}, "tokens_per_second": 3}'
    )
    page = Page(write_report(bare))
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert "Held-out loss is not a number: 2.0000 at step 0, NaN at 3." in page.words
    assert "sampled 4" in page.words and "empty 2" in page.words and "trained on not run" in page.words
    assert page.pre[0] == "\n\n\n?end"  # one newline is dropped by browsers, half a surrogate pair replaced


def test_no_finite_loss(bare):
    jsonl(bare / "metrics.jsonl", [{"kind": "train", "step": 1, "loss": float("nan")}])
    page = Page(write_report(bare))
    assert "No finite loss was recorded." in page.words and "Training: not run" not in page.words


@pytest.mark.parametrize("field", ["entropy", "kept_mass"])
def test_nothing_finite(bare, field):
    jsonl(bare / "samples" / "completions.jsonl", [completion(i, **{field: None}) for i in range(3)])
    assert "not recorded" in Page(write_report(bare)).words


def test_torn_lines(full):
    for name in ("metrics.jsonl", "samples/completions.jsonl"):
        path = full / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
    page = Page(write_report(full))
    assert "metrics.jsonl: 1 line did not parse" in page.words
    assert "samples/completions.jsonl: 1 line did not parse" in page.words
    assert "to 1.1000 nats per token" in page.words  # the last held-out record is the torn one
    with open(full / "metrics.jsonl", "ab") as file:  # a resumed run: one bad line in the middle, one record twice
        file.write(
            b'\n{"kind": "eval", "step": 100, "loss": 1.2}\n\xff\n{"kind": "eval", "step": 200, "loss": 1.0}\n[]'
        )
    text = summary(full)
    assert "fell from 1.4100 to 1.0000" in text and "metrics.jsonl: 3 lines did not parse" in text


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (evaluation(set(range(5))), evaluation(set(range(60))), "the intervals are apart."),
        (evaluation(set(range(9))), evaluation(set(range(5))), "the intervals overlap, not significant."),
        (evaluation({1}), evaluation({1}, total=100), "no comparison"),
        (evaluation({1}, samples=2), evaluation({1, 2}, samples=2), "1 solved more often after training, 0 before"),
        (evaluation({1}), None, "measured only before training"),
        (None, evaluation({1}), "measured only after training"),
    ],
)
def test_verdicts(bare, before, after, words):
    (bare / "evaluation").mkdir()
    for name, value in (("before", before), ("after", after)):
        if value is not None:
            value.save(bare / "evaluation" / f"{name}.json")
    page = Page(write_report(bare))
    assert words in page.words and words in summary(bare)
    assert ("overlap" in page.words) == ("overlap" in words or "more often" in words)


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ({0: 1.0}, "measured once, at step 0: 1.0000"),
        ({0: 1.0, 9: 1.25}, "rose from 1.0000 to 1.2500 nats per token (+25.0 %)"),
        ({0: 1.0, 9: 1.0}, "stayed from 1.0000 to 1.0000"),
    ],
)
def test_loss_verdicts(bare, losses, words):
    jsonl(bare / "metrics.jsonl", [{"kind": "eval", "step": step, "loss": value} for step, value in losses.items()])
    assert words in summary(bare) and words in Page(write_report(bare)).words


def test_programs_that_could_not_run(bare):
    broken = evaluation({1})
    broken.results[0]["status"] = "error"
    (bare / "evaluation").mkdir()
    broken.save(bare / "evaluation" / "after.json")
    assert "1 programs could not be run after training" in summary(bare)


def test_broken_parts(full):
    (full / "summary.json").write_text("[]")
    (full / "evaluation" / "after.json").write_text("{")
    page = Page(write_report(full))
    assert "summary.json could not be read" in page.words and "evaluation/after.json could not be read" in page.words
    assert str(full) not in page.source


def test_summary(full):
    lines = summary(full).splitlines()
    assert 3 <= len(lines) <= 6 and all(len(line) < 200 for line in lines)
    assert "Completions: 400 (0 empty, 31 truncated, 31 dropped, 369 trained)." in lines


@pytest.mark.parametrize("text", [None, "[]", "{"])
def test_config_is_needed(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    for function in (write_report, summary):
        with pytest.raises(UsageError, match="config"):
            function(tmp_path)
