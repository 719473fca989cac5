"""What certified gradient filtering (``grad_filter``) costs in gradient error and in training: see README.md here.

``python -P experiments/grad_filter.py run --out FILE`` trains, a JSON line a run; ``summary FILE`` compares the runs
and concludes; ``table`` measures the error of the gradients themselves.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import inspect
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from ssd_core.bench import machine

from ssd_core import models, presets
from ssd_core.checks import UsageError
from ssd_core.files import AppendOnly, write_atomic, write_json
from ssd_core.ops.linear_cross_entropy import linear_cross_entropy
from ssd_core.pipeline import Run, default_device
from ssd_core.prompts import load_prompts
from ssd_core.store import Completion, SampleStore
from ssd_core.train.batches import IGNORED, collate, plan_steps, select
from ssd_core.train.config import TrainConfig
from ssd_core.train.loop import MasterWeights, cast

RARE = 2                # a token is rare if the training samples hold it at most so often
OTHER_TOKENS = 1024     # of text that is nobody's sample
HEADS = ["trained", "frozen"]
LOSSES = ("held_out", "rare", "other")
WIDE = "float32"
SHARE = 0.02            # of what training changes in the held-out loss: a difference that does not matter


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to take the gradient of the head. A trained head is tied to the embeddings, a frozen one freezes them."""

    head: str                           # "trained" or "frozen"
    name: str
    grad_filter: float = 0.0
    grad_filter_weight: float | None = None
    match: bool = True                  # False: what is skipped is dropped

    @property
    def wide(self) -> bool:
        """Plain PyTorch in float32: what rounding to bfloat16 does to training."""
        return self.name == WIDE

    @property
    def filtered(self) -> bool:
        return self.grad_filter > 0


ARMS = (
    Arm("trained", "exact"),
    Arm("trained", WIDE),
    Arm("trained", "0.01, exact dW", 0.01, 0.0),
    Arm("trained", "0.001", 0.001),
    Arm("trained", "0.01", 0.01),
    Arm("trained", "0.03", 0.03),
    Arm("trained", "0.01 dropped", 0.01, match=False),
    Arm("frozen", "exact"),
    Arm("frozen", WIDE),
    Arm("frozen", "0.001", 0.001),
    Arm("frozen", "0.01", 0.01),
    Arm("frozen", "0.03", 0.03),
    Arm("frozen", "0.01 dropped", 0.01, match=False),
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
Model = Annotated[Path, typer.Option(help="folder of the model; python -P -m ssd_core.data.smollm2 FOLDER makes it")]
Work = Annotated[Path, typer.Option(help="folder of samples, and of weights to compare with")]
MODEL, WORK = Path("demo/SmolLM2-135M-Instruct"), Path("build/experiments/grad_filter")


# -- training ----------------------------------------------------------------------------------------------------------


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="results, a JSON line a run; what is there already is not run again")],
    model: Model = MODEL, work: Work = WORK, seeds: int = 3, steps: int = 20,
    sequences: Annotated[int, typer.Option(help="sequences of a step")] = 4, learning_rate: float = 2e-5,
    samples: Annotated[int, typer.Option(help="completions of a prompt")] = 4, max_new_tokens: int = 128,
    head: Annotated[list[str], typer.Option(help="trained, frozen, or both")] = HEADS,
):
    """Train every arm with every seed, seed by seed; a run that was killed is repeated."""
    completions = draw(model, work, samples, max_new_tokens)
    training = presets.resolve("demo", {}, {
        "targets": "hard", "max_steps": steps, "per_device_train_batch_size": sequences, "eval_fraction": 3 / 16,
        "learning_rate": learning_rate, "min_lr": learning_rate / 10}, {})[1]
    data = Data.split(completions, training, model)
    settings = {"samples": samples, "max_new_tokens": max_new_tokens, **dataclasses.asdict(training), **data.counts}
    results = AppendOnly(out)
    lines = results.read()
    if any(line["settings"] != settings for line in lines):
        raise UsageError(f"{out}: holds results of other settings: name another file")
    done = {(line["head"], line["arm"], line["seed"]) for line in lines}
    before = None
    for seed in range(seeds):
        for arm in ARMS:
            if arm.head not in head or (arm.head, arm.name, seed) in done:
                continue
            before = before or losses(load(model), data)
            start = time.perf_counter()
            found = train(arm, dataclasses.replace(training, seed=seed), model, data, work)
            line = {"head": arm.head, "arm": arm.name, "seed": seed, "before": before, **found,
                    "seconds": round(time.perf_counter() - start, 1), "settings": settings, "device": default_device(),
                    "machine": machine.describe()}
            out.parent.mkdir(parents=True, exist_ok=True)
            results.append([line])
            print(f"{arm.head:8} {arm.name:14} seed {seed}  {line['seconds']:.0f} s  " + "  ".join(
                f"{name} {before[name]:.4f} -> {found['after'][name]:.4f}" for name in LOSSES), flush=True)
        for name in head:
            exact_weights(work, name, seed).unlink(missing_ok=True)


def draw(model: Path, work: Path, samples: int, max_new_tokens: int) -> list[Completion]:
    """The model's own samples of the demo prompts, drawn once."""
    sampling, training, decoding = presets.resolve(
        "demo", {"num_return_sequences": samples, "max_new_tokens": max_new_tokens}, {}, {})
    drawn = Run(work, model, load_prompts("demo"), sampling=sampling, training=training, decoding=decoding, resume=True,
                sections=("sampling",))
    drawn.sample()
    return list(SampleStore(work / "samples"))


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """Samples of prompts to train on and of others, and a text that is nobody's sample."""

    train: list[Completion]
    held_out: list[Completion]
    other: torch.Tensor         # (R, T) ids
    frequency: torch.Tensor     # (V,) of each token among the completions to train on

    @classmethod
    def split(cls, completions: list[Completion], training: TrainConfig, model: Path) -> Data:
        train, held_out, _ = select(completions, training)
        frequency = torch.zeros(models.head(load(model)).weight.shape[0], dtype=torch.int64)
        for token, count in collections.Counter(t for c in train for t in c.token_ids).items():
            frequency[token] = count
        return cls(train, held_out, source_ids(model, OTHER_TOKENS, 128), frequency)

    @property
    def counts(self) -> dict[str, int]:
        tokens = torch.tensor([t for c in self.held_out for t in c.token_ids])
        return {"train_completions": len(self.train), "train_tokens": int(self.frequency.sum()),
                "held_out_completions": len(self.held_out), "held_out_tokens": len(tokens),
                "rare_tokens": int((self.frequency[tokens] <= RARE).sum()), "other_tokens": self.other[:, 1:].numel(),
                "rare_rows": int(((self.frequency > 0) & (self.frequency <= RARE)).sum()),
                "unseen_rows": int((self.frequency == 0).sum()), "vocab": len(self.frequency)}


def train(arm: Arm, config: TrainConfig, folder: Path, data: Data, work: Path) -> dict:
    """Train as ``ssd_core.train`` does, with the arm's loss; losses afterwards, certificates, and the distance of the
    weights from those of the exact arm of this head and seed, which comes first."""
    model = load(folder)
    device = next(model.parameters()).device
    weight = models.head(model).weight
    weight.requires_grad_(arm.head == "trained")
    model.train()
    weights = MasterWeights(model)
    start = [master.detach().clone() for master in weights.masters]
    decayed = [p for p in weights.masters if p.ndim >= 2]
    others = [p for p in weights.masters if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon, fused=True)
    steps = plan_steps(data.train, config)
    torch.manual_seed(config.seed)
    certificates = []
    for step, micro_batches in enumerate(steps):
        tokens = sum(len(data.train[i].token_ids) for chosen in micro_batches for i in chosen)
        for chosen in micro_batches:
            batch = collate([data.train[i] for i in chosen], config.targets, device)
            hidden = models.body(model)(input_ids=batch.input_ids, use_cache=False).last_hidden_state
            loss, stats = arm_loss(arm, hidden, weight, batch.target, tokens)
            loss.backward()
            weights.collect()
            if arm.filtered:
                certificates.append([float(stats.active), float(stats.skipped_mean), float(stats.skipped_max)])
        torch.nn.utils.clip_grad_norm_(weights.masters, config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step, len(steps))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        weights.publish()
    for parameter, master in zip(weights.parameters, weights.masters, strict=True):
        parameter.data = master.data
    found = {"after": losses(model, data)}
    if certificates:
        active, mean, most = zip(*certificates, strict=True)
        found |= {"active": statistics.fmean(active), "skipped_mean": statistics.fmean(mean), "skipped_max": max(most)}
    exact = exact_weights(work, arm.head, config.seed)
    if arm.name == "exact":
        torch.save([master.detach() for master in weights.masters], exact)
        return found
    return found | distances(weights, start, torch.load(exact, map_location=device), weight, data.frequency)


def exact_weights(work: Path, head: str, seed: int) -> Path:
    return work / f"exact-{head}-{seed}.pt"


def arm_loss(arm: Arm, hidden, weight, target, tokens):
    if arm.wide:
        valid = target != IGNORED
        logits = F.linear(hidden[valid].float(), weight.float())
        return F.cross_entropy(logits, target[valid], reduction="sum") / tokens, None
    with matching(arm.match):
        return linear_cross_entropy(
            hidden, weight, target, num_items_in_batch=tokens, grad_filter=arm.grad_filter,
            grad_filter_weight=arm.grad_filter_weight, backend="torch", return_stats=True)


@contextlib.contextmanager
def matching(match: bool) -> Iterator[None]:
    """Whether what the filter skips is moment-matched, as it should be, or dropped."""
    if match:
        yield
        return
    from ssd_core.chunked import grad_filter

    grad_filter.MATCH = False
    try:
        yield
    finally:
        grad_filter.MATCH = True


@torch.no_grad()
def losses(model, data: Data) -> dict[str, float]:
    """Mean losses of held-out samples, of their rare tokens and of the other text, by plain PyTorch in float32, so that
    rounding the weights does not hide what differs."""
    cast(model.eval(), TrainConfig(bf16=False))
    weight = models.head(model).weight
    device = weight.device

    def token_losses(ids, target):
        valid = target != IGNORED
        hidden = models.body(model)(input_ids=ids, use_cache=False).last_hidden_state[valid]
        return F.cross_entropy(F.linear(hidden, weight), target[valid], reduction="none").cpu(), target[valid].cpu()

    ordered = sorted(data.held_out, key=lambda c: len(c.prompt_ids) + len(c.token_ids))
    batches = [collate(ordered[i : i + 4], "hard", device) for i in range(0, len(ordered), 4)]
    parts = [token_losses(batch.input_ids, batch.target) for batch in batches]
    loss, token = (torch.cat(part) for part in zip(*parts, strict=True))
    other = [token_losses(rows[:, :-1].to(device), rows[:, 1:].to(device))[0] for rows in data.other.split(4)]
    values = (loss, loss[data.frequency[token] <= RARE], torch.cat(other))
    return {name: value.double().mean().item() for name, value in zip(LOSSES, values, strict=True)}


@torch.no_grad()
def distances(weights: MasterWeights, start, exact, head, frequency) -> dict[str, float]:
    """|w - w_exact| / |w_exact - w_start| of all trained weights, and of the head's rows of rare and unseen tokens."""
    def relative(pairs):
        apart, travelled = (sum(d.square().sum().item() for d in side) for side in zip(*pairs, strict=True))
        return (apart / travelled) ** 0.5

    pairs = [(w - e, e - s) for w, e, s in zip(weights.masters, exact, start, strict=True)]
    found = {"distance": relative(pairs)}
    for parameter, pair in zip(weights.parameters, pairs, strict=True):
        if parameter is head:
            for name, rows in (("rare_rows", (frequency > 0) & (frequency <= RARE)), ("unseen_rows", frequency == 0)):
                found[name] = relative([tuple(d[rows.to(d.device)] for d in pair)])
    return found


def load(folder: Path):
    model, _ = models.load_model(folder, torch.bfloat16)
    cast(model, TrainConfig(bf16=True))
    return model.to(default_device())


def source_ids(folder: Path, tokens: int, length: int) -> torch.Tensor:
    """(tokens / length, length) ids of the standard library's source."""
    import argparse
    import json.decoder

    from transformers import AutoTokenizer

    text = "".join(inspect.getsource(module) for module in (statistics, argparse, json.decoder))
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text).input_ids)
    if len(ids) < tokens:
        raise UsageError(f"tokens: expected at most {len(ids)}, got {tokens}")
    return ids[:tokens].view(-1, length)


# -- the comparison ----------------------------------------------------------------------------------------------------


@app.command()
def summary(
    files: Annotated[list[Path], typer.Argument(help="results of `run`: of both heads, or a file each")],
    out: Annotated[Path | None, typer.Option(help="also write there, as .json and .md")] = None,
):
    """Compare every arm with the exact one of the same seed, and conclude."""
    lines = [line for file in files for line in AppendOnly(file).read()]
    if not lines:
        raise UsageError(f"{', '.join(map(str, files))}: expected results of `run`, found none")
    if any(line["settings"] != lines[0]["settings"] for line in lines):
        raise UsageError(f"{', '.join(map(str, files))}: expected results of equal settings")
    result = compare(lines)
    text = markdown(result)
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out.with_suffix(".json"), result)
        write_atomic(out.with_suffix(".md"), text + "\n")


def compare(lines: list[dict]) -> dict:
    """Paired differences to the exact arm, limits, and on which side of them each arm is."""
    by_arm: dict[tuple, dict[int, dict]] = collections.defaultdict(dict)
    for line in lines:
        by_arm[line["head"], line["arm"]][line["seed"]] = line
    rows, shares = [], {}
    for arm in ARMS:
        runs, exact = by_arm[arm.head, arm.name], by_arm[arm.head, "exact"]
        seeds = sorted(runs.keys() & exact.keys())
        if not seeds:
            continue
        row = {"head": arm.head, "arm": arm.name, "seeds": seeds,
               "before": runs[seeds[0]]["before"],
               "after": {name: spread([runs[s]["after"][name] for s in seeds]) for name in LOSSES}}
        if arm.name != "exact":
            row["difference"] = {
                name: spread([runs[s]["after"][name] - exact[s]["after"][name] for s in seeds]) for name in LOSSES}
        for key in ("distance", "rare_rows", "unseen_rows", "active", "skipped_mean", "skipped_max", "seconds"):
            values = [runs[s][key] for s in seeds if key in runs[s]]
            if values:
                row[key] = max(values) if key == "skipped_max" else statistics.fmean(values)
        if arm.name == "exact":
            shares[arm.head] = SHARE * abs(row["after"]["held_out"]["mean"] - row["before"]["held_out"])
        rows.append(row)
    rounding = {name: max([abs(row["difference"][name][end]) for row in rows if row["arm"] == WIDE
                           for end in ("min", "max")], default=0.0) for name in LOSSES}
    limits = {head: {name: max(share, rounding[name]) for name in LOSSES} for head, share in shares.items()}
    for row in rows:
        if "difference" in row:
            row["verdict"] = {
                name: verdict(row["difference"][name]["mean"], limits[row["head"]][name]) for name in LOSSES}
    result = {"device": lines[0]["device"], "machines": [line["machine"] for line in lines],
              "settings": lines[0]["settings"], "rare_at_most": RARE, "share": SHARE, "limits": limits, "arms": rows}
    return result | {"conclusion": conclude(result), "runs": lines}


def verdict(difference: float, limit: float) -> str:
    return "same" if abs(difference) <= limit else "worse" if difference > 0 else "lower"


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


def conclude(result: dict) -> dict[str, dict[str, dict[str, float]]]:
    """For each head the largest bound whose arm, and those of all smaller ones, end with the ``same`` losses as exact
    training, and with none that is worse (``no_worse``); 0: none does. A trained head: for the filter of ``both``
    gradients, and for that of the hidden states alone (``d_input``)."""
    found: dict = {}
    for head in result["limits"]:
        verdicts = {row["arm"]: set(row["verdict"].values()) for row in result["arms"]
                    if row["head"] == head and "verdict" in row}
        found[head] = {}
        for kind, weight_bound in (("both", None), ("d_input", 0.0)):
            arms = [arm for arm in ARMS if arm.head == head and arm.filtered and arm.match
                    and arm.grad_filter_weight == weight_bound]
            if arms:
                found[head][kind] = {"same": _widest(arms, verdicts, {"same"}),
                                     "no_worse": _widest(arms, verdicts, {"same", "lower"})}
    return found


def _widest(arms: list[Arm], verdicts: dict[str, set], allowed: set) -> float:
    bound = 0.0
    for arm in arms:        # bounds ascend
        if arm.name not in verdicts or not verdicts[arm.name] <= allowed:
            break
        bound = arm.grad_filter
    return bound


def markdown(result: dict) -> str:
    s = result["settings"]
    lines = [
        f"{'; '.join(sorted({machine.line(one, result['device']) for one in result['machines']}))}.", "",
        f"SmolLM2-135M-Instruct on its own samples: {s['train_completions']} completions of {s['train_tokens']:,} "
        f"tokens to train on, {s['held_out_completions']} of {s['held_out_tokens']:,} held out by prompt; "
        f"{s['max_steps']} steps of {s['per_device_train_batch_size']} sequences, hard labels, AdamW, learning rate "
        f"{s['learning_rate']:g} to {s['min_lr']:g}, bfloat16 with float32 masters. Rare: the {s['rare_tokens']} "
        f"held-out tokens that the completions to train on hold at most {result['rare_at_most']} times. Other: "
        f"{s['other_tokens']:,} tokens of the standard library's source. A cell is the difference to the exact run of "
        "the same seed, mean (least, most) over seeds, in 1e-4 nats.", "",
    ]
    for head in result["limits"]:
        lines += [*_table_of(head, result), ""]
    found = [f"{head} head: {_said(kinds)}" for head, kinds in result["conclusion"].items()]
    return "\n".join([
        *lines,
        f"Limit: {result['share']:.0%} of what exact training changes in the held-out loss, or the largest difference "
        "that a loss in float32 makes with either head, whichever is larger. A bound leaves training the same if the "
        "mean differences of all three losses, with it and with every smaller bound, are within the limit, and no "
        "worse if none is above it (**worse**, *lower*: outside). Distance: from the exact run's weights, relative to "
        "the way those went; rows: the same for rows of the head whose tokens the completions to train on hold 1 to "
        f"{result['rare_at_most']} times, or never.", "",
        f"**Conclusion**: {'; '.join(found)}."])


def _table_of(head: str, result: dict) -> list[str]:
    exact, *rows = [row for row in result["arms"] if row["head"] == head]
    title = {"trained": "Trained head, tied to the embeddings", "frozen": "Frozen head and embeddings"}[head]
    columns = ("arm", "held-out loss", "rare-token loss", "other text", "distance", "rare rows", "unseen rows",
               "active", "skipped mean", "skipped max")
    rest = " |" * (len(columns) - 4)
    lines = [f"**{title}**, seeds {', '.join(map(str, exact['seeds']))}.", "", f"| {' | '.join(columns)} |",
             "|" + "---|" * len(columns)]
    cells = []
    for name in LOSSES:
        after = exact["after"][name]
        apart = 1e4 * (after["max"] - after["min"])
        cells.append(f"{exact['before'][name]:.4f} to {after['mean']:.4f} (seeds apart by {apart:.1f})")
    lines.append(f"| exact | {' | '.join(cells)} |{rest}")
    for row in rows:
        cells = [row["arm"]]
        for name in LOSSES:
            mean, least, most = (1e4 * row["difference"][name][key] for key in ("mean", "min", "max"))
            mark = {"same": "", "worse": " **worse**", "lower": " *lower*"}[row["verdict"][name]]
            cells.append(f"{mean:+.1f} ({least:+.1f}, {most:+.1f}){mark}")
        for key, form in (("distance", ".3f"), ("rare_rows", ".3f"), ("unseen_rows", ".3f"), ("active", ".1%"),
                          ("skipped_mean", ".1e"), ("skipped_max", ".1e")):
            cells.append(format(row[key], form) if key in row else "")
        lines.append(f"| {' | '.join(cells)} |")
    limits = " | ".join(f"{1e4 * result['limits'][head][name]:.1f}" for name in LOSSES)
    return [*lines, f"| *limit* | {limits} |{rest}"]


def _said(kinds: dict[str, dict[str, float]]) -> str:
    names = {"both": "grad_filter", "d_input": "grad_filter with grad_filter_weight=0"}
    words = {"same": "the same", "no_worse": "no worse"}
    return ", ".join(
        f"{names[kind]} leaves training " + " and ".join(
            f"{words[way]} up to {bound:g}" if bound else f"{words[way]} at no bound" for way, bound in bounds.items())
        for kind, bounds in kinds.items())


# -- the gradients -----------------------------------------------------------------------------------------------------


@app.command()
def table(
    model: Model = MODEL, tokens: int = 2048, deltas: list[float] = [0.03, 0.01, 0.001],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
):
    """Active pairs and gradient errors on real hidden states in float32, the vocabulary ordered by held-out ones."""
    result = {"machine": machine.describe(), "tokens": tokens, "rows": gradient_errors(model, tokens, deltas)}
    lines = ["| delta | active pairs | dX dropped / matched | dX median row | dW dropped / matched | dW median row |",
             "|" + "---|" * 6]
    for row in result["rows"]:
        cells = [f"{row['delta']:g}" if row["delta"] else "0 (bfloat16 logits)",
                 f"{row['active']:.1%}" if "active" in row else "100 %"]
        for name in ("d_input", "d_weight"):
            for key in (name, f"{name}_row_median"):
                cells.append(" / ".join(f"{row[way][key]:.1e}" for way in ("dropped", "matched") if way in row)
                             or f"{row['rounded'][key]:.1e}")
        lines.append("| " + " | ".join(cells) + " |")
    print("\n".join(lines))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, result)


def gradient_errors(model: Path, tokens: int, deltas: list[float]) -> list[dict]:
    hidden, ordering, target, weight = states(model, tokens)
    with torch.no_grad():
        order = (ordering @ weight.t()).softmax(-1).mean(0).argsort(descending=True, stable=True)

    def gradients(function):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss, stats = function(x, w)
        loss.backward()
        return (x.grad, w.grad), stats

    def filtered(delta):
        return gradients(lambda x, w: linear_cross_entropy(
            x, w, target, grad_filter=delta, vocab_order=order if delta else None, backend="torch", return_stats=True))

    def errors(found):
        out = {}
        for name, value, reference in zip(("d_input", "d_weight"), found, exact, strict=True):
            difference = value - reference
            out[name] = (difference.norm() / reference.norm()).item()
            out[f"{name}_row_median"] = (difference.norm(dim=1) / reference.norm(dim=1)).nanmedian().item()
        return out

    exact, _ = filtered(0.0)
    rows = []
    for delta in deltas:
        with matching(False):
            dropped, _ = filtered(delta)
        matched, stats = filtered(delta)
        rows.append({"delta": delta, "active": float(stats.active), "skipped_mean": float(stats.skipped_mean),
                     "skipped_max": float(stats.skipped_max), "dropped": errors(dropped), "matched": errors(matched)})
    with torch.no_grad():
        grad = (hidden.bfloat16() @ weight.bfloat16().t()).float().softmax(-1)
        grad[torch.arange(len(target)), target] -= 1
        grad /= len(target)
        rounded = errors((grad @ weight, grad.t() @ hidden))
    return [*rows, {"delta": 0.0, "rounded": rounded}]


@torch.no_grad()
def states(folder: Path, tokens: int) -> tuple[torch.Tensor, ...]:
    """Hidden states (tokens, D) of the standard library's source in float32, those of half as many tokens after them,
    targets and the head."""
    length = min(512, tokens // 2)
    model, _ = models.load_model(folder, torch.float32)
    ids = source_ids(folder, tokens + tokens // 2, length)
    hidden = models.body(model)(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    target = torch.cat((ids[:, 1:], ids[:, -1:]), 1).flatten()
    return hidden[:tokens], hidden[tokens:], target[:tokens], models.head(model).weight.detach()


if __name__ == "__main__":
    app()
