"""The engine against transformers and PEFT on SmolLM2-135M-Instruct: base, LoRA, top quarter tuned."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from blockserve.common.api.engine import SamplingParams
from blockserve.worker.limits import EngineConfig
from support.adapters import ATTENTION, AdapterSpec
from support.engine import Ask, EngineHarness
from support.oracle import MANY_TOKENS, MIN_MARGIN, NUM_TOKENS

pytestmark = [pytest.mark.model, pytest.mark.timeout(1800)]

QUESTIONS = (
    "Explain what a lighthouse is in two sentences.",
    "List three colours of the rainbow.",
    "What is the capital of France, and which river runs through it?",
    "Write a haiku about rain on a tin roof.",
    "Translate to German: The cat sleeps on the warm stove.",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "Why do leaves change colour in autumn?",
    "17 + 25 =",
    "Give me a recipe for pancakes with four ingredients.",
    "Hi",
    "Summarise: The meeting was moved from Monday to Thursday because two speakers were ill.",
    "Who wrote Romeo and Juliet?",
    "Name a mammal that lays eggs.",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "SELECT name, COUNT(*) FROM orders",
    "Tell me a joke about computers.",
    "Describe the taste of an apple to someone who has never eaten one.",
    "How far is the moon from the earth?",
    "Is water wet? Argue both sides.",
    "Continue the list: Monday, Tuesday,",
    "What should I pack for a week in the mountains in March?",
    "Rewrite politely: Send me the report now.",
    "In one word: what do bees make?",
)
KINDS = ("base", "lora", "top quarter")
NOTES = Path(__file__).with_name("smollm2_answers.json")
LENGTHS = (1, 5, 8, 11, 35, 60)
LORA = AdapterSpec(
    {"r": 8, "lora_alpha": 4, "target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]}
)


@pytest.fixture(scope="module")
def prompts(smollm2):
    """Every second question as a chat, the others as plain text, cut to a few lengths.

    Equal lengths let the oracle compute logits in batches without padding; one at a time takes ten minutes.
    """
    tokenizer = AutoTokenizer.from_pretrained(smollm2)

    def encode(index, question):
        if index % 2:
            return tokenizer(question)["input_ids"]
        chat = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]

    encoded = [encode(index, question) for index, question in enumerate(QUESTIONS)]
    return [tuple(ids[-max(n for n in LENGTHS if n <= len(ids)) :]) for ids in encoded]


@pytest.fixture(scope="module")
def family(variants, smollm2):
    """Base, LoRA and top-quarter variant."""
    base = variants.existing("smollm2", smollm2)
    return [base, variants.adapter(base, "all-linear", spec=LORA), variants.top_quarter(base, num_layers=30)]


@pytest.fixture(
    scope="module",
    params=[3, pytest.param(20, marks=pytest.mark.long)],
    ids=["three questions", "twenty questions"],
)
def num_questions(request):
    """How many answers of each variant are compared: twenty take two minutes of a core."""
    return request.param


@pytest.fixture(scope="module")
def expected(variants, family, prompts, num_questions):
    """The oracle's answers to questions whose answers float32 can decide, for each variant.

    What it answered once is noted. Its logits decide whether that still holds; if not, it answers anew, which
    takes three times as long. Run the twenty questions with NOTE_ANSWERS=1 to answer anew and note it.
    """
    notes = {} if "NOTE_ANSWERS" in os.environ else _read_notes()
    answers, told = {}, {}
    is_long = num_questions == 20
    asked, num_tokens = (prompts, MANY_TOKENS) if is_long else (prompts[: num_questions + 1], NUM_TOKENS)
    for variant, kind in zip(family, KINDS, strict=True):
        noted = notes.get(kind, {})
        told[kind] = variants.oracle(variant).expect(
            asked,
            num_tokens,
            propose=lambda prompts, count, noted=noted: [noted.get(prompt, ())[:count] for prompt in prompts],
        )
        variants.forget(variant)
        answers[variant] = [one for one in told[kind] if one.margin > MIN_MARGIN][:num_questions]
        assert len(answers[variant]) == num_questions
    if "NOTE_ANSWERS" in os.environ and asked == prompts:
        notes = {kind: [[one.prompt, one.tokens] for one in told[kind]] for kind in KINDS}
        NOTES.write_text(json.dumps(notes) + "\n")
    return answers


def _read_notes():
    notes = json.loads(NOTES.read_text())
    return {kind: {tuple(prompt): tuple(tokens) for prompt, tokens in pairs} for kind, pairs in notes.items()}


@pytest.fixture(scope="module")
def smollm2_engine(tmp_path_factory, family):
    """All three variants loaded in one engine."""
    config = EngineConfig(
        dtype="float32", kv_cache_bytes=512 << 20, max_tokens_per_pass=101, kv_page_tokens=24
    )
    with EngineHarness(tmp_path_factory.mktemp("zoo"), config) as harness:
        for variant in family:
            harness.load(variant)
        yield harness


@pytest.mark.parametrize("index", [0, 1, 2], ids=KINDS)
def test_variant_equals_transformers(smollm2_engine, family, expected, num_questions, index):
    variant = family[index]
    report = smollm2_engine.compare(smollm2_engine.register(variant), expected[variant])
    print(f"{variant.name}: {report.logits_error:.1e}")
    assert report.is_equal, report
    assert report.num_prompts == num_questions


def test_all_variants_together_equal_transformers(smollm2_engine, family, expected, num_questions):
    """All requests of three variants at once, in one base pass where their blocks are the same."""
    places = range(num_questions)
    cases = [(variant, one) for place in places for variant in family for one in [expected[variant][place]]]
    asks = [Ask(smollm2_engine.register(variant), one.prompt, len(one.tokens)) for variant, one in cases]
    assert smollm2_engine.run(asks) == [one.tokens for _, one in cases]
    assert max(one.largest_batch_chains for one in smollm2_engine.report().segments) == 3


@pytest.mark.long  # test_batching.py asks the same of a tiny model
def test_alone_among_32_others_and_after_reload(smollm2_engine, family, prompts):
    """One sampled request of each variant, alone, in company, and after every block was away."""
    sampling = SamplingParams(temperature=0.8, top_k=100, top_p=0.95, seed=11)
    asks = [Ask(smollm2_engine.register(one), prompts[0], 24, sampling) for one in family]
    alone = [smollm2_engine.run([ask])[0] for ask in asks]
    crowd = [replace(asks[i % 3], prompt=prompts[i % 20 + 1], num_tokens=8 + i % 20) for i in range(30)]
    assert smollm2_engine.run([*asks, *crowd])[:3] == alone
    for ask in asks:
        smollm2_engine.unload(ask.chain)
    assert smollm2_engine.report().block_bytes == 0
    for one in family:
        smollm2_engine.load(one)
    assert [smollm2_engine.run([ask])[0] for ask in asks] == alone


def test_variants_answer_differently(family, expected):
    base, lora, tuned = (expected[variant] for variant in family)
    for other in (lora, tuned):
        by_prompt = {one.prompt: one.tokens for one in other}
        assert any(by_prompt.get(one.prompt, one.tokens) != one.tokens for one in base)
