"""Checkpoints whose tokenizer has another form than tokenizer.json: prompts are those of AutoTokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from blockserve.router.intake.tokenizer import VariantTokenizer
from blockserve.router.intake.variant_files import VariantFiles
from blockzoo.errors import InvalidConfigError
from blockzoo.folders.tokenizers.conversion import CONVERTED, source_of
from blockzoo.registering.recheck import Pushed, recheck
from blockzoo.zoo import Zoo
from support.edge import byte_level_tokenizer
from support.folders import write_adapter, write_checkpoint
from support.variants import VariantFactory

SENTENCES = [
    "In the beginning God created the heaven and the earth.",
    "Where the river bends, the miller's daughter keeps three white geese.",
    "größer, schöner, 東京",
]


def sentence_piece(folder: Path, **config: object) -> Path:
    import sentencepiece

    (folder / "text").write_text("\n".join(SENTENCES * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=340, model_type="bpe",
        byte_fallback=True, character_coverage=0.99, minloglevel=2,
    )  # fmt: skip
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    return configured(folder, **(names | config))


def vocab_and_merges(folder: Path, **config: object) -> Path:
    model = json.loads(byte_level_tokenizer().to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return configured(folder, **({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"} | config))


def configured(folder: Path, **config: object) -> Path:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


SENTENCE_PIECE = ("LlamaTokenizerFast", "GemmaTokenizer", "GemmaTokenizerFast", "PreTrainedTokenizerFast")
MERGES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "GPT2TokenizerFast", "GPTNeoXTokenizerFast")
"""What checkpoints of the supported families name, and transformers makes from such files."""
CASES = {
    "sentencepiece": (sentence_piece, {"unk_token": "<unk>", "add_bos_token": True}),
    "sentencepiece, no bos": (sentence_piece, {"unk_token": "<unk>", "add_bos_token": False}),
    "sentencepiece, more tokens": (sentence_piece, {"additional_special_tokens": ["<|tool|>"]}),
    "vocab and merges": (vocab_and_merges, {}),
    "vocab and merges, more tokens": (vocab_and_merges, {"extra_special_tokens": ["<|tool|>"]}),
    **{f"sentencepiece of {name}": (sentence_piece, {"tokenizer_class": name}) for name in SENTENCE_PIECE},
    **{f"vocab and merges of {name}": (vocab_and_merges, {"tokenizer_class": name}) for name in MERGES},
}


Make = Callable[..., Path]
FAMILIES = [
    ("llama-gqa", sentence_piece, "LlamaTokenizer"),
    ("llama-gqa-tied", vocab_and_merges, "GPT2Tokenizer"),
    ("mistral-window", sentence_piece, "LlamaTokenizer"),
    ("phi3-window", sentence_piece, "LlamaTokenizer"),
    ("gemma2", sentence_piece, "GemmaTokenizer"),
    ("gemma3", sentence_piece, "GemmaTokenizer"),
    ("qwen2-tied", vocab_and_merges, "Qwen2Tokenizer"),
    ("qwen3", vocab_and_merges, "Qwen2Tokenizer"),
    ("smollm3", vocab_and_merges, "GPT2Tokenizer"),
]
"""What checkpoints of each family name in tokenizer_config.json."""


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    return Zoo.open(tmp_path / "zoo", create=True)


@pytest.mark.parametrize("case", CASES)
def test_prompts_and_answers_are_those_of_transformers(zoo: Zoo, tmp_path: Path, case: str) -> None:
    make, config = CASES[case]
    assert_prompts_are_those_of_transformers(zoo, make(write_checkpoint(tmp_path / "m"), **config))


@pytest.mark.parametrize(("family", "make", "tokenizer"), FAMILIES)
def test_prompts_of_every_family_are_those_of_transformers(
    zoo: Zoo, tmp_path: Path, factory: VariantFactory, family: str, make: Make, tokenizer: str
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(factory.checkpoint(family).path, folder)
    assert_prompts_are_those_of_transformers(zoo, make(folder, tokenizer_class=tokenizer))


@pytest.mark.parametrize("family", ["granite", "olmo2", "glm4"])
def test_families_that_transformers_reads_from_tokenizer_json_only_are_refused(
    zoo: Zoo, tmp_path: Path, factory: VariantFactory, family: str
) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "m"
    shutil.copytree(factory.checkpoint(family).path, folder)
    vocab_and_merges(folder)
    with pytest.raises(ValueError, match="backend tokenizer"):
        AutoTokenizer.from_pretrained(folder)
    with pytest.raises(InvalidConfigError, match=r"vocab\.json cannot be converted") as caught:
        zoo.register(folder, name="m")
    assert "\n" not in str(caught.value)


def assert_prompts_are_those_of_transformers(zoo: Zoo, folder: Path) -> None:
    """What was converted at register encodes and decodes as what transformers reads of the folder."""
    from transformers import AutoTokenizer

    record = zoo.register(folder, name="m").record
    assert "was made of" in record.provenance["notes"]
    source = VariantFiles(record, lambda name: zoo.read_file(record, name)).tokenizer()
    assert source is not None
    ours = VariantTokenizer.from_bytes(zoo.read_file(record, source.filename), source.facts)
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in [*SENTENCES, "Hello <|tool|> hello", " ", "  x\n\ny"]:
        for special in (True, False):
            expected = theirs(text, add_special_tokens=special)["input_ids"]
            assert list(ours.encode(text, add_special_tokens=special)) == expected, text
            assert ours.raw.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
    # The folder comes back as it was; the server's check of a push lets the converted file through.
    out = Path(zoo.export("m", folder.with_name("out")).path)
    assert not (out / "tokenizer.json").exists()
    chain = zoo.chain(record.chain)
    blocks = {one.base: zoo.block(one.base) for one in chain.links}
    pushed = Pushed("checkpoint", chain, blocks, record.files, None)
    assert recheck(zoo.store, pushed)["notes"] == record.provenance["notes"]


def test_adapters_take_a_converted_tokenizer_over_or_bring_their_own(zoo: Zoo, tmp_path: Path) -> None:
    zoo.register(vocab_and_merges(write_checkpoint(tmp_path / "m")), name="base")
    adapter = write_adapter(tmp_path / "a")
    record = zoo.register(adapter, name="a", base="base").record
    assert record.files[CONVERTED] == zoo.resolve("base").files[CONVERTED]
    (adapter / "tokenizer.json").write_text(byte_level_tokenizer().to_str())
    assert CONVERTED not in zoo.register(adapter, name="a", base="base").record.files


def test_a_folder_does_not_read_files_elsewhere(zoo: Zoo, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({f"SECRET{i}": i for i in range(400)}))
    names = {key: str(secret) for key in ("vocab", "vocab_file", "tokenizer_file", "merges_file")}
    folder = vocab_and_merges(write_checkpoint(tmp_path / "m"), **names)
    record = zoo.register(folder, name="m").record
    assert b"SECRET" not in zoo.read_file(record, CONVERTED)


def test_an_adapter_with_another_small_file_keeps_the_converted_tokenizer(zoo: Zoo, tmp_path: Path) -> None:
    zoo.register(vocab_and_merges(write_checkpoint(tmp_path / "m")), name="base")
    adapter = write_adapter(tmp_path / "a")
    (adapter / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    assert CONVERTED in zoo.register(adapter, name="a", base="base").record.files


def test_what_cannot_be_converted_is_refused_or_said(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = configured(write_checkpoint(tmp_path / "m"), tokenizer_class="LlamaTokenizer")
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(InvalidConfigError, match=r"tokenizer\.model cannot be converted"):
        zoo.register(folder, name="m")
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    record = zoo.register(folder, name="m").record
    assert "blockzoo[convert]" in record.provenance["notes"]
    assert CONVERTED not in record.files


def test_nothing_is_converted_where_there_is_a_tokenizer_or_none_at_all() -> None:
    assert source_of(["tokenizer.json", "tokenizer.model"]) is None
    assert source_of(["vocab.json"]) is None
    assert source_of(["config.json"]) is None
    assert source_of(["vocab.json", "merges.txt"]) == "vocab.json"
