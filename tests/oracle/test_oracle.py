"""The oracle against itself: what every other comparison rests on."""

import math

import pytest
import torch
from transformers import AutoTokenizer

from support.adapters import ADAPTERS
from support.models import SPECS, checkpoint_tensors, load_model, top_quarter
from support.oracle import NUM_TOKENS, Expected, compare, logits_error


@pytest.mark.parametrize("name", SPECS)
def test_greedy_with_cache_equals_greedy_without(variants, name):
    """Logits were computed whole, tokens with transformers' cache: each token is their maximum."""
    variant = variants.checkpoint(name)
    cases = variants.cases(variant, count=4)
    steps = variants.oracle(variant).greedy([case.prompt for case in cases], NUM_TOKENS)
    assert steps == [case.tokens for case in cases]
    for case in cases:
        answer = case.logits[len(case.prompt) - 1 : -1].argmax(-1).tolist()
        assert tuple(answer) == case.tokens


def test_greedy_equals_transformers_generate(variants):
    variant = variants.checkpoint("qwen3")
    model = load_model(variant.path)
    for case in variants.cases(variant, count=4):
        prompt = torch.tensor([case.prompt])
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            eos_token_id=[-1],
            pad_token_id=0,
        )
        assert tuple(output[0, len(case.prompt) :].tolist()) == case.tokens


def test_a_note_counts_where_todays_logits_say_the_same_and_not_otherwise(variants):
    variant = variants.checkpoint("llama-gqa")
    cases = variants.cases(variant, count=4)
    prompts, oracle = [case.prompt for case in cases], variants.oracle(variant)
    truth = [case.tokens for case in cases]
    steps = oracle.greedy
    try:
        oracle.greedy = None  # with true notes it is not asked
        assert [one.tokens for one in oracle.expect(prompts, propose=lambda *_: truth)] == truth
        asked = []
        oracle.greedy = lambda prompts, num_tokens: asked.append(prompts) or steps(prompts, num_tokens)
        for place in (0, NUM_TOKENS // 2, NUM_TOKENS - 1):  # a lie about any token is found out
            tokens = list(cases[2].tokens)
            tokens[place] = (tokens[place] + 1) % oracle.vocab_size
            lie = [*truth[:2], tuple(tokens), *truth[3:]]
            assert not oracle._check(prompts, lie)[2].is_greedy
            assert [one.tokens for one in oracle.expect(prompts, propose=lambda *_, lie=lie: lie)] == truth
        short = [*truth[:2], truth[2][:-1], *truth[3:]]
        assert [one.tokens for one in oracle.expect(prompts, propose=lambda *_: short)] == truth
        assert asked == [[prompts[2]]] * 4
    finally:
        oracle.__dict__.pop("greedy", None)


@pytest.mark.parametrize("name", SPECS)
def test_answers_are_not_degenerate(variants, name):
    """A model that repeats itself would agree with a broken engine."""
    cases = variants.cases(variants.checkpoint(name), count=20)
    varied = sorted(len(set(case.tokens)) for case in cases)
    assert varied[0] >= NUM_TOKENS // 5
    assert varied[len(varied) // 2] >= NUM_TOKENS // 2
    assert len({case.tokens[-16:] for case in cases}) == len(cases)


@pytest.mark.parametrize("base", ["llama-gqa", "llama-gqa-tied"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_change_the_answers(variants, base, name):
    checkpoint = variants.checkpoint(base)
    adapter = variants.adapter(checkpoint, name)
    before, after = (variants.cases(one, count=4) for one in (checkpoint, adapter))
    assert [case.prompt for case in before] == [case.prompt for case in after]
    assert all(old.tokens != new.tokens for old, new in zip(before, after, strict=True))
    for old, new in zip(before, after, strict=True):
        rows = len(old.prompt)
        if rows > 1:  # with one token there is nothing to choose from, so a query cannot matter
            assert logits_error(new.logits[:rows], old.logits[:rows]) > 0.01


def test_window_is_smaller_than_the_prompts_and_matters(variants):
    windowed = variants.checkpoint("mistral-window")
    assert load_model(windowed.path).config.sliding_window < 33
    plain = load_model(windowed.path)
    plain.config.sliding_window = None
    for case in variants.cases(windowed, count=4):
        sequence = torch.tensor([case.prompt + case.tokens])
        with torch.inference_mode():
            ours = plain(input_ids=sequence, use_cache=False).logits[0]
        assert logits_error(ours[:19], case.logits[:19]) < 1e-6
        assert logits_error(ours, case.logits) > 0.01


def test_llama3_rope_reaches_past_its_original_context(variants):
    rope = load_model(variants.checkpoint("llama-rope-llama3").path).config.rope_parameters
    assert rope["rope_type"] == "llama3"
    assert rope["original_max_position_embeddings"] < 70 + NUM_TOKENS


def test_top_quarter_changes_the_top_layers_only(variants):
    base = variants.checkpoint("llama-bf16-sharded")
    tuned = variants.top_quarter(base)
    old, new = checkpoint_tensors(base.path), checkpoint_tensors(tuned.path)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert old.keys() == new.keys()
    assert {int(name.split(".")[2]) for name in changed} == set(top_quarter(4)) == {3}
    assert all(old[name].dtype == new[name].dtype == torch.bfloat16 for name in old)


def test_checkpoints_have_the_promised_forms(variants):
    assert len(list(variants.checkpoint("llama-bf16-sharded").path.glob("*.safetensors"))) > 2
    tied = checkpoint_tensors(variants.checkpoint("llama-gqa-tied").path)
    assert "lm_head.weight" not in tied
    assert (
        checkpoint_tensors(variants.checkpoint("llama-fp16").path)["model.norm.weight"].dtype == torch.float16
    )
    assert "model.layers.0.self_attn.q_norm.weight" in checkpoint_tensors(variants.checkpoint("qwen3").path)
    biased = checkpoint_tensors(variants.checkpoint("llama-biases").path)
    assert {"model.layers.0.mlp.down_proj.bias", "model.layers.0.self_attn.o_proj.bias"} <= biased.keys()


def test_tokenizer_reads_back_what_it_wrote_and_renders_chats(variants):
    tokenizer = AutoTokenizer.from_pretrained(variants.checkpoint("llama-gqa").path)
    text = "Where the river bends: schön, 2653 lighthouses — 🚢"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < len(tokenizer) <= SPECS["llama-gqa"].config().vocab_size
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_distribution_is_the_softmax_after_the_warpers(variants):
    variant = variants.checkpoint("llama-gqa")
    oracle, prompt = variants.oracle(variant), (5, 6, 7)
    plain = oracle.distribution(prompt, temperature=1.0)
    torch.testing.assert_close(
        plain, oracle.logits([prompt])[0][-1].to(torch.float64).softmax(-1), atol=1e-7, rtol=0
    )
    filtered = oracle.distribution(prompt, temperature=1.0, top_k=7)
    assert int((filtered > 0).sum()) == 7
    assert filtered.sum().item() == pytest.approx(1.0, abs=1e-6)


# The comparison itself.


def _expected() -> list[Expected]:
    generator = torch.Generator().manual_seed(0)
    return [Expected((1, 2), (3, 4), torch.randn(4, 9, generator=generator), 1.0) for _ in range(3)]


def _compare(expected, *, change_logits=lambda rows: rows, change_tokens=lambda tokens: tokens):
    return compare(
        expected,
        logits=lambda sequences: [change_logits(one.logits.clone()) for one in expected],
        tokens=lambda prompts, num_tokens: [change_tokens(one.tokens) for one in expected],
    )


def test_compare_accepts_what_is_equal():
    report = _compare(_expected())
    assert report.is_equal
    assert report.logits_error == 0.0
    assert report.num_prompts == 3


def test_compare_asks_for_whole_sequences_and_for_prompts():
    expected, seen = _expected(), []
    compare(
        expected,
        logits=lambda sequences: seen.append(sequences) or [one.logits for one in expected],
        tokens=lambda prompts, num_tokens: (
            seen.append((prompts, num_tokens)) or [one.tokens for one in expected]
        ),
    )
    assert seen == [[(1, 2, 3, 4)] * 3, ([(1, 2)] * 3, 2)]


@pytest.mark.parametrize(("share", "equal"), [(0.9e-4, True), (1.2e-4, False)])
def test_compare_measures_against_the_largest_logit(share, equal):
    def change(rows):
        rows[1, 3] += share * rows.abs().max()
        return rows

    report = _compare(_expected(), change_logits=change)
    assert report.is_equal is equal
    assert report.logits_error == pytest.approx(share, rel=1e-2)
    assert report.num_different_logits == (0 if equal else 3)
    assert report.num_different_tokens == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_compare_refuses_what_is_not_finite(value):
    def change(rows):
        rows[0, 0] = value
        return rows

    report = _compare(_expected(), change_logits=change)
    assert report.num_different_logits == 3
    assert report.logits_error == math.inf


def test_compare_refuses_logits_of_another_shape():
    assert _compare(_expected(), change_logits=lambda rows: rows[:-1]).num_different_logits == 3


@pytest.mark.parametrize(("tokens", "first"), [((3, 5), 1), ((9, 4), 0), ((3,), 1), ((3, 4, 5), 2), ((), 0)])
def test_compare_finds_the_first_different_token(tokens, first):
    report = _compare(_expected(), change_tokens=lambda _: tokens)
    assert [one.first_token for one in report.mismatches] == [first] * 3
    assert not report.is_equal
    assert f"first token {first}" in str(report)
