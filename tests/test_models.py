"""What is read off a transformers model, and what is refused."""

import json
import shutil

import pytest
import torch
import transformers
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file, save_file

from ssd_core import models
from ssd_core.checks import UsageError
from ssd_core.models import NonFiniteError

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 0, "bos_token_id": None,
    "pad_token_id": None, "initializer_range": 0.3}


def make(family, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(model_folder, tmp_path):
    """The tiny model's folder, to be damaged."""
    return shutil.copytree(model_folder, tmp_path / "model")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_loaded(tied, dtype, tmp_path):
    """A tied head is not in the file, and is not missing either."""
    saved = make_model(tie_word_embeddings=tied)
    saved.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = models.load_model(tmp_path, dtype)
    assert model.dtype == dtype and not model.training
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight.to(dtype))
    assert tokenizer.eos_token == "</s>"


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "~/nowhere", "a/b/c"])
def test_a_folder_that_is_not_there(path):
    with pytest.raises(UsageError, match=f"model: expected a folder that from_pretrained loads, got '{path}'"):
        models.load_model(path, torch.float32)


def test_a_folder_without_a_model(tmp_path, copy):
    with pytest.raises(UsageError, match=r"model: .* holds no config\.json"):
        models.load_model(tmp_path, torch.float32)
    (copy / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model: .* cannot be loaded: "):
        models.load_model(copy, torch.float32)


@pytest.mark.parametrize("data", [b"", b"\x00" * 50, b"half"])
def test_damaged_weights(data, copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:3000] if data == b"half" else data)
    with pytest.raises(UsageError, match=r"model: .* cannot be loaded: "):
        models.load_model(copy, torch.float32)


def test_weights_of_another_shape(copy):
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name][:-1].clone()}, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"model: .* cannot be loaded: "):
        models.load_model(copy, torch.float32)


def test_missing_weights_are_not_filled_with_random_ones(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"model: .* lacks 1 of the weights, such as model\.layers\.1\.mlp\.up_proj"):
        models.load_model(copy, torch.float32)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(value, copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"NaN or infinity, first in model\.layers\.1\.mlp\.up_proj\.weight"):
        models.load_model(copy, torch.float32)


def test_a_config_of_an_unknown_kind(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    with pytest.raises(UsageError, match=r"model: .* cannot be loaded: "):
        models.load_model(copy, torch.float32)


# -- facts ------------------------------------------------------------------------------------------------------------


def test_fingerprints_tell_models_apart(model_folder):
    base = models.fingerprint(make_model())
    assert models.fingerprint(models.load_model(model_folder, torch.float32)[0]) == base
    assert models.fingerprint(make_model(seed=1)) != base
    assert models.fingerprint(make_model(vocab=301)) != base
    changed = make_model()
    changed.model.norm.weight.data[-1] += 1e-3
    assert models.fingerprint(changed) != base
    half = make_model().bfloat16()          # rounded already: the same numbers in both, other logits
    assert models.fingerprint(half) != models.fingerprint(make_model().bfloat16().float())


def test_end_tokens_come_from_all_that_name_them(model, tokenizer):
    assert models.eos_token_ids(model, tokenizer) == [0]
    model.generation_config.eos_token_id = [9, 7]
    model.config.eos_token_id = 5
    assert models.eos_token_ids(model, tokenizer) == [0, 5, 7, 9]
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    with pytest.raises(UsageError, match="tokenizer: expected an end-of-sequence token, got none"):
        models.eos_token_ids(model, tokenizer)


def test_context_length(model):
    assert models.context_length(model) == 128
    assert models.context_length(make("GPT2")) == 64
    model.config = transformers.BloomConfig()       # says nothing about it
    assert models.context_length(model) is None


def test_evaluating_restores_each_module_also_after_an_error(model):
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(KeyError), models.evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == modes


# -- the head ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "changes", "scale", "softcap"), [
    ("Llama", {}, 1.0, None), ("Qwen3", {"head_dim": 8}, 1.0, None), ("GPT2", {}, 1.0, None), ("Phi", {}, 1.0, None),
    ("Cohere", {"logit_scale": 0.25}, 0.25, None), ("Granite", {"logits_scaling": 4.0}, 0.25, None),
    ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 5.0}, 1.0, 5.0), ("Gemma3Text", {"head_dim": 8}, 1.0, None),
    ("Qwen3Moe", {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, 1.0, None),
])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_body_and_head_give_the_logits_of_the_model(family, changes, scale, softcap, dtype):
    model = make(family, **changes).to(dtype)
    found = models.head(model)
    assert (found.logit_scale, found.softcap) == (scale, softcap)
    assert found.weight is model.get_output_embeddings().weight
    assert (found.bias is not None) == (family == "Phi")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        hidden = models.body(model)(input_ids=ids).last_hidden_state
        logits = scale * torch.nn.functional.linear(hidden, found.weight, found.bias).float()
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        expected = model(ids).logits.float()
    assert (logits - expected).norm() < (2e-2 if dtype == torch.bfloat16 else 1e-5) * expected.norm()


def test_a_head_that_does_more_is_refused(model, monkeypatch):
    forward = model.forward

    def scaled(**options):
        output = forward(**options)
        output.logits = output.logits * 1.01
        return output

    monkeypatch.setattr(model, "forward", scaled)
    model.train()
    with pytest.raises(UsageError, match=r"LlamaForCausalLM does not compute its logits as .* differ by 9\.9e-03"):
        models.head(model)
    assert model.training


def test_a_model_without_a_head_is_refused(model):
    with pytest.raises(UsageError, match="model: expected a causal language model of transformers, got LlamaModel"):
        models.head(model.model)
