"""Whole completions: against transformers' generate, against a plain forward pass, and alone against together."""

import random

import pytest
import torch
import transformers
from conftest import make_model, make_tokenizer

from ssd_core import Sampler, SamplingParams
from ssd_core.checks import UsageError
from ssd_core.models import NonFiniteError
from ssd_core.sampler.cache import PreallocatedLayer
from ssd_core.sampler.sampler import sequence_seed

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": 0, "bos_token_id": None,
    "pad_token_id": None, "initializer_range": 0.3}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "Llama": {}, "Qwen3": {"head_dim": 8}, "Mistral": {"sliding_window": 8}, "Granite": {"logits_scaling": 2.0},
    "Gemma2": {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 5.0},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 8}, "Cohere": {}, "Cohere2": {"sliding_window": 8},
    "Qwen3Moe": {"num_experts": 4, "head_dim": 8, **EXPERTS}, "GptOss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "head_dim": 8},
    "GPT2": {"n_inner": 64}, "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}
PROMPTS = [list(range(5, 5 + length)) for length in (3, 17, 9, 1)]


def complete(model, tokenizer, prompts, *, batch_size=32, **params):
    """Completions by (prompt index, sample index)."""
    sampler = Sampler(model, tokenizer, SamplingParams(**params), batch_size=batch_size)
    return {(c.prompt_index, c.sample_index): c for c in sampler.generate(prompts)}


def tokens(completions):
    return {key: c.token_ids for key, c in completions.items()}


def watch(model, monkeypatch):
    """The shapes of ``input_ids`` of each forward pass from now on."""
    shapes, forward = [], model.forward

    def watched(**options):
        shapes.append(tuple(options["input_ids"].shape))
        assert options["logits_to_keep"] == 1
        return forward(**options)

    monkeypatch.setattr(model, "forward", watched)
    return shapes


def follow(model, monkeypatch, script, start):
    """Make the model predict ``script[i]`` at the i-th place after ``start`` tokens, whatever it would say itself."""
    forward = model.forward

    def scripted(**options):
        output = forward(**options)
        places = (options["position_ids"][:, -1] + 1 - start).clamp(0, len(script) - 1)
        output.logits = 50.0 * torch.nn.functional.one_hot(torch.tensor(script)[places], 300).float().unsqueeze(1)
        return output

    monkeypatch.setattr(model, "forward", scripted)


# -- against transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family, tokenizer):
    """A left-padded batch gives each prompt what generate gives it alone, past any sliding window."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family]})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    found = complete(model, tokenizer, PROMPTS, temperature=0, max_new_tokens=24)
    for index, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=0)
        assert found[index, 0].token_ids == expected[0, len(prompt) :].tolist()


def test_repetition_penalty_equals_transformers(model, tokenizer):
    plain = complete(model, tokenizer, PROMPTS, temperature=0, max_new_tokens=24)
    found = complete(model, tokenizer, PROMPTS, temperature=0, max_new_tokens=24, repetition_penalty=1.8)
    for index, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24,
                                  pad_token_id=0, repetition_penalty=1.8)
        assert found[index, 0].token_ids == expected[0, len(prompt) :].tolist()
    assert tokens(found) != tokens(plain)


@pytest.mark.parametrize("params", [
    {}, {"temperature": 0.7, "top_k": 10, "top_p": 0.9}, {"temperature": 1.2, "top_p": 0.5}, {"min_p": 0.05}], ids=str)
def test_everything_recorded_equals_a_plain_forward_pass(params, model, tokenizer):
    """Without cache, padding and batch: no token is off by one, no statistic belongs to its neighbour."""
    found = complete(model, tokenizer, PROMPTS, max_new_tokens=20, num_return_sequences=2, **params)
    assert len(found) == 8
    for (index, _), c in found.items():
        assert c.prompt_ids == PROMPTS[index] and 1 <= len(c.token_ids) <= 20
        with torch.no_grad():
            logits = model(torch.tensor([c.prompt_ids + c.token_ids])).logits[0, len(c.prompt_ids) - 1 : -1].double()
        drawn = torch.tensor(c.token_ids).unsqueeze(1)
        log_p = logits.log_softmax(-1)
        torch.testing.assert_close(c.logprob.double(), log_p.gather(1, drawn).squeeze(1), rtol=0, atol=1e-4)
        torch.testing.assert_close(c.entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=0, atol=1e-4)
        tempered = (logits / params.get("temperature", 1.0)).softmax(-1)
        support = torch.zeros_like(tempered).scatter_add(1, c.support.ids.long(), c.support.probs.double())
        assert support.gather(1, drawn).gt(0).all()
        torch.testing.assert_close(support.sum(1), torch.ones(len(drawn)).double(), rtol=0, atol=1e-5)
        if params:
            inside = support > 0        # at most 64 tokens are kept here, so the record is the distribution itself
            kept = tempered.where(inside, 0).sum(-1, keepdim=True)
            torch.testing.assert_close(support, tempered.where(inside, 0) / kept, rtol=0, atol=1e-4)
            torch.testing.assert_close(c.kept_mass.double(), kept.squeeze(1), rtol=0, atol=1e-4)
            expected = support.gather(1, drawn).log().squeeze(1)
            torch.testing.assert_close(c.sampling_logprob.double(), expected, rtol=0, atol=1e-4)
        else:
            torch.testing.assert_close(c.sampling_logprob, c.logprob, rtol=0, atol=1e-4)
            assert c.kept_mass.sub(1).abs().max() < 1e-5
        if "top_k" in params:
            assert c.support.ids.shape[1] <= 10


# -- the same draws ---------------------------------------------------------------------------------------------------


def test_a_sequence_alone_in_a_batch_and_in_another_order(model, tokenizer):
    """Also while rows finish at different times and others move into their places."""
    params = {"temperature": 1.2, "max_new_tokens": 20, "num_return_sequences": 2, "seed": 5, "repetition_penalty": 1.1}
    model.generation_config.eos_token_id = list(range(0, 300, 12))
    together = tokens(complete(model, tokenizer, PROMPTS, **params))
    assert len({len(ids) for ids in together.values()}) > 3
    assert tokens(complete(model, tokenizer, PROMPTS, batch_size=1, **params)) == together
    assert tokens(complete(model, tokenizer, PROMPTS, batch_size=3, **params)) == together
    back = tokens(complete(model, tokenizer, PROMPTS[::-1], **params))
    assert {(3 - index, sample): ids for (index, sample), ids in back.items()} == together
    for index, prompt in enumerate(PROMPTS):
        alone = tokens(complete(model, tokenizer, [prompt], **params))
        assert alone == {(0, sample): together[index, sample] for sample in range(2)}


def test_skip_draws_the_remaining_groups_bit_for_bit(model, tokenizer):
    sampler = Sampler(model.bfloat16(), tokenizer, SamplingParams(max_new_tokens=12, top_k=20), batch_size=3)
    prompts = [list(range(5, 6 + i % 5)) + [50 + i] for i in range(10)]
    whole = list(sampler.groups(prompts))
    assert [len(group) for group in whole] == [3, 3, 3, 1]
    for skip in range(5):
        rest = list(sampler.groups(prompts, skip=skip))
        assert len(rest) == 4 - skip
        for group, expected in zip(rest, whole[skip:], strict=True):
            for c, other in zip(group, expected, strict=True):
                assert (c.prompt_index, c.sample_index, c.token_ids) == (
                    other.prompt_index, other.sample_index, other.token_ids)
                assert torch.equal(c.logprob, other.logprob) and torch.equal(c.support.probs, other.support.probs)


def test_seed_round_and_purpose_change_the_draws_and_nothing_else_does(model, tokenizer):
    def draw(seed=0, **options):
        sampler = Sampler(model, tokenizer, SamplingParams(max_new_tokens=16, seed=seed))
        return [c.token_ids for c in sampler.generate(PROMPTS, **options)]

    base = draw()
    state = torch.get_rng_state()
    random.seed(1)
    torch.manual_seed(1)
    assert draw() == base
    torch.set_rng_state(state)
    draw()
    assert torch.equal(torch.get_rng_state(), state)        # no generator of anyone else is used
    others = [draw(seed=1), draw(round=1), draw(purpose="evaluate")]
    assert all(other != base for other in others)


def test_sequence_seeds_differ_in_every_part():
    base = (0, 0, "sample", (1, 2), 0)
    changed = [(1, 0, "sample", (1, 2), 0), (0, 1, "sample", (1, 2), 0), (0, 0, "other", (1, 2), 0),
               (0, 0, "sample", (12,), 0), (0, 0, "sample", (1, 2), 1)]
    seeds = {sequence_seed(*parts) for parts in [base, *changed]}
    assert len(seeds) == 6 and all(-(2**63) <= seed < 2**63 for seed in seeds)


def test_equal_prompts_get_completions_of_their_own(model, tokenizer):
    found = tokens(complete(model, tokenizer, [[5, 6, 7]] * 4, max_new_tokens=12, num_return_sequences=2))
    assert len({tuple(ids) for ids in found.values()}) == 8
    once = tokens(complete(model, tokenizer, [[5, 6, 7]], max_new_tokens=12, num_return_sequences=2))
    assert found[0, 0] == once[0, 0] and found[0, 1] == once[0, 1]


# -- the work that is done --------------------------------------------------------------------------------------------


def test_samples_of_a_prompt_share_the_prefill_and_differ(model, tokenizer, monkeypatch):
    shapes = watch(model, monkeypatch)
    found = complete(model, tokenizer, PROMPTS, max_new_tokens=10, num_return_sequences=3)
    assert shapes[0] == (4, 17)                                 # each prompt once
    assert all(length == 1 for _, length in shapes[1:]) and shapes[1][0] <= 12
    for index in range(4):
        assert len({tuple(found[index, sample].token_ids) for sample in range(3)}) == 3


def test_finished_rows_are_not_decoded(model, tokenizer, monkeypatch):
    """One row a token, except for the last token of each sequence."""
    shapes = watch(model, monkeypatch)
    model.generation_config.eos_token_id = list(range(0, 300, 12))      # sequences end at different times
    found = complete(model, tokenizer, PROMPTS * 4, max_new_tokens=30)
    lengths = [len(c.token_ids) for c in found.values()]
    assert len(set(lengths)) > 4
    assert sum(rows for rows, _ in shapes[1:]) == sum(lengths) - len(lengths)


def test_the_cache_is_not_copied_at_each_token(model, tokenizer, monkeypatch):
    copies = []
    grow = PreallocatedLayer._grow
    monkeypatch.setattr(PreallocatedLayer, "_grow", lambda self, *args: (copies.append(1), grow(self, *args)))
    found = complete(model, tokenizer, [[5] * 40], max_new_tokens=40, min_new_tokens=40)
    assert len(found[0, 0].token_ids) == 40
    assert len(copies) == 2         # at the prefill, once a layer


def test_progress_is_told(model, tokenizer):
    steps = []
    model.generation_config.eos_token_id = list(range(0, 300, 12))
    sampler = Sampler(model, tokenizer, SamplingParams(max_new_tokens=15), batch_size=5)
    found = list(sampler.generate(PROMPTS * 2, on_step=lambda drawn, finished: steps.append((drawn, finished))))
    assert sum(drawn for drawn, _ in steps) == sum(len(c.token_ids) for c in found)
    assert sum(finished for _, finished in steps) == len(found) == 8


def test_short_prompts_come_first_in_groups_of_the_batch_size(model, tokenizer):
    sampler = Sampler(model, tokenizer, SamplingParams(max_new_tokens=2), batch_size=2)
    groups = [[c.prompt_index for c in group] for group in sampler.groups(PROMPTS)]
    assert groups == [[3, 0], [2, 1]]


def test_each_module_keeps_its_mode(model, tokenizer):
    """Evaluation mode while tokens are drawn, and only then: a consumer may train between two groups."""
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    seen = []
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    for _ in Sampler(model, tokenizer, SamplingParams(max_new_tokens=3), batch_size=1).groups(PROMPTS):
        assert [module.training for module in model.modules()] == modes
    handle.remove()
    assert seen and not any(seen)
    model.model.embed_tokens.weight.data.fill_(torch.nan)
    with pytest.raises(NonFiniteError):
        complete(model, tokenizer, PROMPTS)
    assert [module.training for module in model.modules()] == modes


def test_half_precision_models_work(model, tokenizer):
    found = complete(model.bfloat16(), tokenizer, PROMPTS, max_new_tokens=8, top_k=5)
    assert all(c.logprob.dtype == torch.float32 and c.logprob.isfinite().all() for c in found.values())


# -- how completions end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eos", [0, 7, 9])
def test_any_of_several_end_tokens_ends(eos, model, tokenizer, monkeypatch):
    """The tokenizer's own and those of the generation config; in the ids, not in the text."""
    model.generation_config.eos_token_id = [7, 9]
    follow(model, monkeypatch, [100, 101, eos, 102], start=3)
    c = complete(model, tokenizer, [[5, 6, 8]], max_new_tokens=20)[0, 0]
    assert c.token_ids == [100, 101, eos]
    assert c.text == tokenizer.decode([100, 101])
    assert c.finish_reason == "stop"


def test_the_length_limit(model, tokenizer, monkeypatch):
    follow(model, monkeypatch, [100] * 50, start=3)
    c = complete(model, tokenizer, [[5, 6, 8]], max_new_tokens=20)[0, 0]
    assert c.token_ids == [100] * 20 and c.finish_reason == "length"


def test_an_end_at_the_length_limit_is_an_end(model, tokenizer, monkeypatch):
    follow(model, monkeypatch, [100, 101, 0], start=3)
    c = complete(model, tokenizer, [[5, 6, 8]], max_new_tokens=3)[0, 0]
    assert c.token_ids == [100, 101, 0] and c.finish_reason == "stop"


def test_the_context_limits_each_sequence_by_itself(model, tokenizer):
    """A long prompt in the batch takes nothing from a short one."""
    prompts = [[5] * 120, [5] * 127, [5, 6, 7]]
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = "<|user|>"
    found = complete(model, tokenizer, prompts, max_new_tokens=30, min_new_tokens=30)
    assert [len(found[i, 0].token_ids) for i in range(3)] == [8, 1, 30]
    assert {c.finish_reason for c in found.values()} == {"length"}


def test_min_new_tokens_puts_off_the_end(model, tokenizer, monkeypatch):
    follow(model, monkeypatch, [0] * 9, start=3)
    c = complete(model, tokenizer, [[5, 6, 8]], max_new_tokens=20, min_new_tokens=4)[0, 0]
    assert len(c.token_ids) == 5 and c.token_ids[-1] == 0 and 0 not in c.token_ids[:-1]
    assert 0 not in c.support.ids[:4][c.support.probs[:4] > 0].tolist()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_stop_string_across_tokens(batch, model, tokenizer, monkeypatch):
    """The text ends before it, the ids hold it; what the same token says after it is in the ids too."""
    script = tokenizer("return a + b\nclass Other").input_ids
    until = next(i for i in range(len(script)) if "\nclass" in tokenizer.decode(script[: i + 1])) + 1
    assert len(tokenizer("\nclass").input_ids) > 3
    follow(model, monkeypatch, script, start=3)
    found = complete(model, tokenizer, [[5, 6, 8]] * batch, max_new_tokens=60, stop_strings=("never", "\nclass"))
    for c in found.values():
        assert c.token_ids == script[:until]
        assert c.text == "return a + b" and c.finish_reason == "stop"
        assert len(c.logprob) == len(c.support.ids) == until


def test_the_first_of_two_stop_strings_cuts_the_text(model, tokenizer, monkeypatch):
    follow(model, monkeypatch, tokenizer("xyabcz").input_ids, start=3)
    c = complete(model, tokenizer, [[5, 6, 8]], max_new_tokens=60, stop_strings=("c", "abc"))[0, 0]
    assert c.text == "xy" and tokenizer.decode(c.token_ids) == "xyabc"


def test_a_stop_string_in_the_prompt_does_not_stop(model, tokenizer, monkeypatch):
    prompt = tokenizer("a\nclass").input_ids
    follow(model, monkeypatch, tokenizer("b").input_ids * 30, start=len(prompt))
    c = complete(model, tokenizer, [prompt], max_new_tokens=6, stop_strings=("\nclass",))[0, 0]
    assert c.finish_reason == "length" and len(c.token_ids) == 6


@pytest.mark.parametrize("lead", range(6))
@pytest.mark.parametrize("stop", ["。\n", "終", "🙂", "b終"])
def test_stop_strings_after_characters_of_many_tokens(lead, stop, model, tokenizer, monkeypatch):
    """A byte-level tokenizer takes a token a byte here; the tail that is looked at may begin within a character."""
    script = tokenizer("a" * lead + "é🙂終é" * 3 + "ab" + stop + "tail").input_ids
    first = tokenizer.decode(script).index(stop)
    follow(model, monkeypatch, script, start=3)
    c = complete(model, tokenizer, [[5, 6, 8]], max_new_tokens=100, stop_strings=(stop,))[0, 0]
    assert c.finish_reason == "stop" and c.text == tokenizer.decode(script)[:first]
    assert tokenizer.decode(c.token_ids).endswith(stop)


def byte_fallback_tokenizer():
    """As sentencepiece does it: an unknown character is a run of byte tokens, and a run is text only as a whole."""
    from tokenizers import Tokenizer, decoders, models

    vocab = {"</s>": 0, "<unk>": 1, **{f"<0x{i:02X}>": i + 2 for i in range(256)}, "a": 258, "b": 259, "\n": 260}
    inner = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


@pytest.mark.parametrize("lead", range(4))
def test_stop_strings_after_a_long_run_of_byte_tokens(lead, monkeypatch):
    """Cut within a character, the whole run would decode to U+FFFD and hide the stop string at its end."""
    model, tokenizer = make_model(max_position_embeddings=512), byte_fallback_tokenizer()
    script = tokenizer("a" * lead + "é" * lead + "好" * 60 + "終" + "好" * 8).input_ids
    follow(model, monkeypatch, script, start=3)
    c = complete(model, tokenizer, [[5, 6, 8]], max_new_tokens=300, stop_strings=("終",))[0, 0]
    assert c.text == "a" * lead + "é" * lead + "好" * 60
    assert len(c.token_ids) == len(tokenizer(c.text + "終").input_ids) and c.finish_reason == "stop"


def test_a_stop_string_that_ends_within_a_long_token(model, tokenizer, monkeypatch):
    tokenizer.add_tokens([" " * 40])
    script = [*tokenizer("xabcdefg").input_ids, tokenizer.convert_tokens_to_ids(" " * 40), 100]
    follow(model, monkeypatch, script, start=3)
    c = complete(model, tokenizer, [[5, 6, 8]], max_new_tokens=60, stop_strings=("abcdefg ",))[0, 0]
    assert c.token_ids == script[:-1] and c.text == "x" and c.finish_reason == "stop"


def test_text_is_not_cleaned_up(model, monkeypatch):
    """Some tokenizers would turn "a ." into "a." and "do n't" into "don't", which is another program."""
    from tokenizers import Tokenizer, decoders, models

    words = ["</s>", "a", " .", " ,", " do", " n't"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="</s>"))
    inner.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", clean_up_tokenization_spaces=True)
    assert tokenizer.decode([1, 2]) == "a."
    follow(model, monkeypatch, [1, 2, 3, 4, 5, 0], start=3)
    assert complete(model, tokenizer, [[5, 6, 8]], max_new_tokens=60)[0, 0].text == "a . , do n't"


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_strings_messages_and_ids(model, tokenizer):
    messages = [{"role": "user", "content": "add"}]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids).endswith("<|assistant|>")
    prompts = ["def add(", messages, [5, 6, 7], torch.tensor([5, 6, 8]), (5, 6, 9)]
    found = complete(model, tokenizer, prompts, max_new_tokens=2)
    expected = [tokenizer("def add(").input_ids, ids, [5, 6, 7], [5, 6, 8], [5, 6, 9]]
    assert [found[i, 0].prompt_ids for i in range(5)] == expected
    assert all(type(token) is int for c in found.values() for token in c.prompt_ids + c.token_ids)


@pytest.mark.parametrize(("prompt", "message"), [
    ("", r"prompts\[1\]: expected at least one token, got none"),
    ([], r"prompts\[1\]: expected at least one token, got none"),
    ([5] * 128, r"prompts\[1\]: expected less than the context's 128 tokens, got 128"),
    ([5, 300], r"prompts\[1\]: expected ids in \[0, 300\), got 5 to 300"),
    ([5, -1], r"prompts\[1\]: expected ids in \[0, 300\), got -1 to 5"),
])
def test_prompts_that_cannot_be_continued_are_named(prompt, message, model, tokenizer, monkeypatch):
    shapes = watch(model, monkeypatch)
    with pytest.raises(UsageError, match=message):
        complete(model, tokenizer, [[5, 6], prompt])
    assert not shapes                   # before anything is drawn


def test_no_prompts_give_no_completions(model, tokenizer):
    assert complete(model, tokenizer, []) == {}


def test_a_tokenizer_without_an_end_token():
    model, tokenizer = make_model(eos_token_id=None), make_tokenizer()
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(UsageError, match="tokenizer: expected an end-of-sequence token, got none"):
        Sampler(model, tokenizer, SamplingParams())
    model.generation_config.eos_token_id = 3
    assert complete(model, tokenizer, [[5]], max_new_tokens=2)


def test_batch_size_must_be_positive(model, tokenizer):
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        Sampler(model, tokenizer, SamplingParams(), batch_size=0)


def test_weights_that_are_not_finite_name_the_prompts(tokenizer):
    model = make_model(tie_word_embeddings=False)
    model.model.embed_tokens.weight.data[77] = torch.nan
    with pytest.raises(NonFiniteError, match=r"not finite after prompt \[1, 3\]: logits: expected finite values"):
        complete(model, tokenizer, [[5, 6], [77, 3], [4], [2, 77]], max_new_tokens=4)


def test_another_error_of_the_draw_is_not_taken_for_bad_weights(model, tokenizer, monkeypatch):
    def refuses(*args, **options):
        raise UsageError("sample: no backend serves this call")

    monkeypatch.setattr("ssd_core.sampler.sampler.sample", refuses)
    with pytest.raises(UsageError, match="no backend serves"):
        complete(model, tokenizer, PROMPTS)
