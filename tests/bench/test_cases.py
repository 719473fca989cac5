"""Heads, token counts, real inputs."""

import pytest
import torch
from ssd_core.bench import cases, states

from ssd_core.checks import UsageError


def test_the_real_heads():
    assert cases.head("llama-3-8b") == cases.Head(128256, 4096) and cases.head("gemma-2-2b").softcap == 30
    assert cases.head("smollm2@4096") == cases.Head(49152, 4096) and cases.head("100x8") == cases.Head(100, 8)
    for name in ("llama", "smollm2@100", "100", "x"):
        with pytest.raises(UsageError, match="cases: expected"):
            cases.head(name)


def test_tokens_are_scaled_by_the_stated_rule():
    assert cases.scale(8192, 10.0, None, "FLOP") == (8192, "")
    assert cases.scale(100, 10.0, 1000.0, "FLOP") == (100, "")
    tokens, about = cases.scale(8192, 10.0, 2000.0, "FLOP")
    assert tokens == 192 and about.startswith("N 8192 -> 192: at most 2e+03 FLOP")
    assert cases.scale(8192, 10.0, 1.0, "FLOP")[0] == 64 and cases.scale(10, 10.0, 1.0, "FLOP")[0] == 10


def test_random_inputs_say_so_and_supports_are_distributions():
    case = cases.find("97x16", 50, cache=None)
    assert case.about.startswith("random") and case.input.shape == (50, 16) and case.weight.shape == (97, 16)
    assert all(len(row.unique()) == cases.SUPPORT for row in case.ids) and case.ids.max() < 97
    torch.testing.assert_close(case.probs.sum(-1), torch.ones(50))
    assert cases.find("7x4", 5, cache=None).ids.shape == (5, 7)


@pytest.fixture
def tiny(monkeypatch, model, tokenizer):
    """The tiny model of the tests in SmolLM2's place. Returns the list of loads."""
    model.config.max_position_embeddings = 512      # the demo's prompts are long in its tokens
    loads = []

    def load(cache):
        loads.append(cache)
        return model, tokenizer

    monkeypatch.setattr(states, "_load", load)
    monkeypatch.setattr(states, "LENGTH", 8)
    return loads


def test_real_states_are_those_of_the_models_own_samples(tiny, tmp_path):
    found = states.real(60, tmp_path)
    assert found["input"].shape == (60, 32) and found["weight"].shape == (300, 32)
    assert (found["ids"] == found["target"].unsqueeze(1)).any(-1).all()     # drawn from the recorded support
    log_q = (found["input"] @ found["weight"].T / 0.8).log_softmax(-1)
    values, ids = log_q.topk(20)
    torch.testing.assert_close(values.softmax(-1), found["probs"], rtol=1e-3, atol=1e-5)
    assert (ids == found["ids"]).float().mean() > 0.99


def test_states_are_kept_and_only_what_lacks_is_drawn(tiny, tmp_path):
    few = states.real(60, tmp_path)
    loads = len(tiny)
    again = states.real(60, tmp_path)
    assert len(tiny) == loads and all(torch.equal(few[name], again[name]) for name in few)
    more = states.real(200, tmp_path)
    assert len(tiny) == loads + 1 and len(more["target"]) == 200 and torch.equal(more["target"][:60], few["target"])
    assert not torch.equal(more["input"][-60:], few["input"])


def test_an_embedded_head_has_the_same_logits(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(cases.HEADS, "smollm2", cases.Head(300, 32))
    narrow, wide = (cases.find(name, 60, tmp_path) for name in ("smollm2", "smollm2@48"))
    assert wide.input.shape == (60, 48) and wide.weight.shape == (300, 48)
    torch.testing.assert_close(wide.input @ wide.weight.T, narrow.input @ narrow.weight.T, rtol=1e-4, atol=1e-4)
    assert "real" in narrow.about and "orthonormal" in wide.about and "orthonormal" not in narrow.about
