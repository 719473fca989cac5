"""The training loop: exact resume, exact means, what is trained and what is not."""

import dataclasses
import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, make_tokenizer
from tolerances import error

from ssd_core import Sampler, SamplingParams, models
from ssd_core.models import NonFiniteError
from ssd_core.store import STATISTICS, Completion
from ssd_core.targets import SparseTarget
from ssd_core.train.batches import collate
from ssd_core.train.config import TrainConfig
from ssd_core.train.loop import MasterWeights, _loss, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def samples(one_thread):
    """24 completions of the tiny model, of very different lengths."""
    sampler = Sampler(make_model(), make_tokenizer(), SamplingParams(top_k=8, max_new_tokens=40, seed=3))
    drawn = sorted(sampler.generate([f"prompt {'x' * (n % 7)} {n}" for n in range(24)]), key=lambda c: c.prompt_index)
    return [cut(c, 3 + 11 * n % 37) for n, c in enumerate(drawn)]


def cut(c, length):
    """The first tokens of a completion."""
    statistics = {name: getattr(c, name)[:length] for name in STATISTICS}
    return dataclasses.replace(c, token_ids=c.token_ids[:length], support=c.support[:length], **statistics)


def config(**changes):
    return TrainConfig(**{"learning_rate": 1e-3, "per_device_train_batch_size": 4, "save_steps": 2, "bf16": False,
                          "eval_fraction": 0.0, **changes})


def run(samples, out, config, held_out=(), model=None, **options):
    model = model or make_model()
    train(model, list(samples), list(held_out), config, out, **options)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class Killed(Exception):
    pass


def kill_at(step):
    def on_step(progress):
        if progress.step == step:
            raise Killed

    return on_step


# -- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("targets", ["soft", "hard"])
def test_resumed_runs_equal_one_run_bit_for_bit(samples, tmp_path, bf16, targets):
    """N steps == k + resume + (N - k), with dropout, at a step with a checkpoint and at one without."""
    settings = config(bf16=bf16, targets=targets, num_train_epochs=2.0)
    dropout = {"attention_dropout": 0.3}
    whole = run(samples, tmp_path / "whole", settings, samples[:4], make_model(**dropout))
    assert not same(whole, dict(make_model().to(torch.bfloat16 if bf16 else torch.float32).named_parameters()))
    for step in (1, 5, 6, 8):
        with pytest.raises(Killed):
            run(samples, tmp_path / "parts", settings, samples[:4], make_model(**dropout), on_step=kill_at(step))
    parts = run(samples, tmp_path / "parts", settings, samples[:4], make_model(**dropout))
    assert same(whole, parts)
    volatile = ("tokens_per_second",)
    strip = [[{k: v for k, v in line.items() if k not in volatile} for line in metrics(tmp_path / name)]
             for name in ("whole", "parts")]
    assert strip[0] == strip[1]
    assert [line["step"] for line in strip[0] if line["kind"] == "train"] == list(range(1, 13))


def test_a_finished_run_has_nothing_left_to_do(samples, tmp_path):
    settings = config()
    first = run(samples, tmp_path, settings)
    steps = []
    assert same(first, run(samples, tmp_path, settings, on_step=steps.append)) and not steps


def test_dropout_differs_between_steps(samples, tmp_path):
    """The generator's state is part of a checkpoint: without it, dropout would repeat after a resume."""
    from safetensors.torch import load_file

    run(samples, tmp_path, config(save_total_limit=3), model=make_model(attention_dropout=0.3))
    states = [load_file(path / "state.safetensors")["rng"] for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert len(states) == 3 and not torch.equal(states[0], states[1])


# -- means ------------------------------------------------------------------------------------------------------------


def test_the_mean_is_over_the_tokens_of_the_step_whatever_the_micro_batches(samples, tmp_path):
    """transformers #34191 and others: a mean of means weights short micro-batches too much."""
    lengths = {len(c.token_ids) for c in samples[:8]}
    assert max(lengths) > 2 * min(lengths)
    found = {}
    for size in (8, 4, 2, 1):
        # a large epsilon: Adam's first step is the gradient's sign, rounding included, wherever it is near 0
        settings = config(
            per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, adam_epsilon=1e-3)
        found[size] = run(samples[:8], tmp_path / str(size), settings)
    for size in (4, 2, 1):
        for name in found[8]:
            torch.testing.assert_close(found[size][name], found[8][name], rtol=1e-4, atol=2e-6)
    losses = [metrics(tmp_path / str(size))[0]["loss"] for size in (8, 4, 2, 1)]
    assert max(losses) - min(losses) < 1e-5


def step_gradients(samples, targets, **options):
    model = make_model()
    head = models.head(model)
    batch = collate(samples, targets, torch.device("cpu"))
    from ssd_core import linear_cross_entropy

    hidden = models.body(model)(input_ids=batch.input_ids).last_hidden_state
    loss = linear_cross_entropy(hidden, head.weight, batch.target, num_items_in_batch=batch.tokens, **options)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def test_hard_targets_equal_transformers_own_loss(samples):
    loss, grads = step_gradients(samples[:5], "hard")
    model = make_model()
    batch = collate(samples[:5], "hard", torch.device("cpu"))
    labels = torch.full_like(batch.input_ids, -100)
    labels[:, 1:] = batch.target[:, :-1]
    expected = model(input_ids=batch.input_ids, labels=labels).loss
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-6)


def completion(prompt, tokens, ids, probs, finish="stop"):
    zeros = torch.zeros(len(tokens))
    return Completion(0, 0, list(prompt), list(tokens), "text", finish, zeros, zeros, zeros, zeros,
                      SparseTarget(torch.tensor(ids, dtype=torch.int32), torch.tensor(probs)))


def test_soft_gradient_is_the_expected_hard_gradient():
    """For a fixed prefix, training on the recorded distribution is the mean over draws of training on the draw."""
    prompt, ids, probs = [5, 6, 7], [11, 12, 13], [0.5, 0.3, 0.2]
    _, soft = step_gradients([completion(prompt, [11], [ids], [probs])], "soft")
    mean = None
    for token, p in zip(ids, probs, strict=True):
        _, hard = step_gradients([completion(prompt, [token], [[token]], [[1.0]])], "hard")
        mean = {name: p * g + (0 if mean is None else mean[name]) for name, g in hard.items()}
    for name in soft:
        assert error(soft[name], mean[name].double()) < 1e-5, name


def test_one_hot_records_equal_hard_targets(samples):
    chosen = [dataclasses.replace(c, support=SparseTarget(
        torch.tensor(c.token_ids, dtype=torch.int32).unsqueeze(1), torch.ones(len(c.token_ids), 1)))
        for c in samples[:4]]
    soft, hard = step_gradients(chosen, "soft"), step_gradients(chosen, "hard")
    assert torch.equal(soft[0], hard[0]) and same(soft[1], hard[1])


# -- what is trained --------------------------------------------------------------------------------------------------


def test_end_of_sequence_is_trained_even_where_it_pads():
    """trl #3091, unsloth #416: masking by id (padding == end of sequence) teaches a model not to stop."""
    short = completion([5, 6], [7, 0], [[7], [0]], [[1.0], [1.0]])
    long = completion([5, 6], [7] * 9, [[7]] * 9, [[1.0]] * 9)
    for targets in ("hard", "soft"):
        batch = collate([short, long], targets, torch.device("cpu"))
        assert batch.tokens == 11
        row = batch.target[0] if targets == "hard" else batch.target.probs[0].sum(-1)
        if targets == "hard":
            assert row.tolist() == [-100, 7, 0] + [-100] * 8
        else:
            assert row.tolist() == [0, 1, 1] + [0] * 8
            assert batch.target.ids[0, 1:3, 0].tolist() == [7, 0]


def test_neither_padding_nor_prompts_are_trained(samples):
    """Other tokens in the padding change nothing."""
    model = make_model()
    batch = collate([samples[0], max(samples, key=lambda c: len(c.token_ids))], "hard", torch.device("cpu"))
    ids = batch.input_ids.clone()
    padding = len(samples[0].prompt_ids) + len(samples[0].token_ids)
    assert padding < ids.shape[1]
    ids[0, padding:] = 17
    losses = []
    for each in (batch.input_ids, ids):
        hidden = models.body(model)(input_ids=each).last_hidden_state
        logits = F.linear(hidden, model.lm_head.weight)
        losses.append(F.cross_entropy(logits.flatten(0, 1), batch.target.flatten()))
    assert torch.equal(*losses)
    assert (batch.target[0, : len(samples[0].prompt_ids) - 1] == -100).all()


def test_held_out_samples_are_never_trained_on(samples, tmp_path, monkeypatch):
    from ssd_core.train import loop

    seen = []
    original = loop.collate
    monkeypatch.setattr(loop, "collate", lambda chosen, *rest: (seen.append(chosen), original(chosen, *rest))[1])
    run(samples[4:], tmp_path, config(), held_out=samples[:4])
    # held-out ones appear alone, in evaluations
    held = {id(c) for c in samples[:4]}
    assert all(held.isdisjoint(map(id, chosen)) or held.issuperset(map(id, chosen)) for chosen in seen)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [0, 5]


def test_the_evaluated_loss_falls(samples, tmp_path):
    """On samples like those trained on: here, the same ones."""
    run(samples, tmp_path, config(num_train_epochs=6.0, eval_steps=10, learning_rate=3e-4), held_out=samples[:8])
    lines = [line for line in metrics(tmp_path) if line["kind"] == "eval"]
    assert [line["step"] for line in lines] == [0, 10, 20, 30, 36]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.02


# -- safety -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_batch(samples, tmp_path, bf16):
    """The weights in memory are those of the step before, on disk those of the last checkpoint."""
    model = make_model()
    before = {}

    def poison(progress):
        if progress.step == 3:
            before.update({name: p.detach().clone() for name, p in model.named_parameters()})
            model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, out: out * float("nan"))

    with pytest.raises(NonFiniteError, match=r"step 4: loss nan.* the batch holds completions of prompts \[\d+, \d+"):
        run(samples, tmp_path, config(bf16=bf16), model=model, on_step=poison)
    assert same(before, dict(model.named_parameters()))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000002"]
    assert metrics(tmp_path)[-1]["step"] == 3


# -- details ----------------------------------------------------------------------------------------------------------


def test_masters_keep_updates_below_bfloat16_resolution(samples, tmp_path):
    """100 updates of 1e-5 on a weight near 1: each is lost in bfloat16, together they are not."""
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    weights = MasterWeights(model)
    for _ in range(500):
        weights.masters[0].data -= 1e-5
        weights.publish()
    assert abs(weights.masters[0].item() - 0.995) < 1e-4 and model.weight.item() == torch.tensor(0.995).bfloat16()


def test_gradients_of_micro_batches_add_up_in_float32():
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    weights = MasterWeights(model)
    for value in (256.0, *[0.5] * 8):       # 256 + 0.5 is 256 in bfloat16
        model.weight.grad = torch.full((1, 1), value, dtype=torch.bfloat16)
        weights.collect()
    assert weights.masters[0].grad.item() == 260.0 and model.weight.grad is None


def test_rotary_frequencies_stay_in_float32(samples, tmp_path):
    model = make_model()
    before = model.model.rotary_emb.inv_freq.clone()
    run(samples, tmp_path, config(bf16=True), model=model)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_norms_are_not_decayed(samples, tmp_path):
    """A huge decay with a learning rate of (nearly) nothing else moves matrices only."""
    model = make_model()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(samples[:4], tmp_path, config(learning_rate=1e-6, weight_decay=1e4, max_steps=1), model=model)
    for name, p in model.named_parameters():
        ratio = (p / frozen[name]).detach().median()
        assert abs(ratio - (1.0 if p.ndim == 1 else 0.99)) < 1e-3, name


def test_gradients_are_clipped(samples, tmp_path):
    free, clipped = config(max_grad_norm=0.0, max_steps=1), config(max_grad_norm=1e-6, max_steps=1, adam_epsilon=1e-3)
    assert not same(run(samples[:4], tmp_path / "a", free), run(samples[:4], tmp_path / "b", clipped))
    start = dict(make_model().named_parameters())
    for name, p in run(samples[:4], tmp_path / "c", dataclasses.replace(clipped, weight_decay=0.0)).items():
        torch.testing.assert_close(p, start[name].detach(), rtol=0, atol=1e-5)
    assert metrics(tmp_path / "a")[0]["grad_norm"] == pytest.approx(metrics(tmp_path / "b")[0]["grad_norm"])


def test_checkpointed_activations_give_the_same_weights(samples, tmp_path):
    plain = run(samples[:8], tmp_path / "a", config())
    model = make_model()
    for name, p in run(samples[:8], tmp_path / "b", config(gradient_checkpointing=True), model=model).items():
        torch.testing.assert_close(p, plain[name])
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_only_one_micro_batch_is_made_at_a_time(samples, tmp_path, monkeypatch):
    """Soft targets of a long step take gigabytes."""
    from ssd_core.train import loop

    alive, most = weakref.WeakSet(), []
    original = loop.collate

    def counting(*args):
        batch = original(*args)
        alive.add(batch)
        most.append(len(alive))
        return batch

    monkeypatch.setattr(loop, "collate", counting)
    run(samples[4:], tmp_path, config(gradient_accumulation_steps=5, per_device_train_batch_size=1), samples[:4])
    assert max(most) <= 3       # the last ones of a loop are let go when the next one is there


@pytest.mark.parametrize("family", ["Gemma2", "Granite", "Cohere"])
def test_scaled_and_capped_heads_equal_the_models_own_loss(family):
    """unsloth #11277, TRL #6629: a logit scale or softcap that is dropped trains on a wrong loss."""
    import transformers

    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 0, "bos_token_id": 1,
             "pad_token_id": 0, "initializer_range": 0.5}
    extra = {"Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0}, "Granite": {"logits_scaling": 4.0},
             "Cohere": {"logit_scale": 0.25}}[family]
    torch.manual_seed(0)
    network = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**shape, **extra)).eval()
    head = models.head(network)
    assert head.softcap == 3.0 if family == "Gemma2" else head.logit_scale == 0.25
    ids = torch.randint(1, 97, (2, 9)).tolist()
    batch = collate([completion(row[:1], row[1:], [[t] for t in row[1:]], [[1.0]] * 8) for row in ids], "hard",
                    torch.device("cpu"))
    labels = torch.tensor([[-100, *row[1:]] for row in ids])
    expected = network(input_ids=batch.input_ids, labels=labels).loss
    torch.testing.assert_close(_loss(network, head, batch, config(), batch.tokens), expected, rtol=1e-4, atol=1e-5)


def test_the_loss_has_the_temperature_of_the_settings(samples):
    model = make_model()
    batch = collate(samples[:3], "hard", torch.device("cpu"))
    settings = config(targets="hard", loss_temperature=0.7)
    logits = model(input_ids=batch.input_ids).logits / 0.7
    expected = F.cross_entropy(logits.flatten(0, 1), batch.target.flatten())
    torch.testing.assert_close(_loss(model, models.head(model), batch, settings, batch.tokens), expected)


def test_steps_have_the_learning_rate_of_the_schedule(samples, tmp_path):
    settings = config(warmup_steps=2, min_lr=1e-5)
    run(samples, tmp_path, settings)
    assert [line["learning_rate"] for line in metrics(tmp_path)] == [settings.learning_rate_at(n, 6) for n in range(6)]
