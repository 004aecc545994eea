"""What a tokenizer.json may hold: what people use passes, what has no bound is refused by name."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from blockzoo.errors import InvalidConfigError, UnsupportedFeatureError
from blockzoo.folders.tokenizers import bounds
from blockzoo.folders.tokenizers.bounds import MAX_ADDED_TOKENS, check_tokenizer
from support.edge import (
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    metaspace_tokenizer,
    suffix_tokenizer,
    word_piece_tokenizer,
)

WORDS = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
REST = r"""| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
CASED = (
    r"""[^\r\n\p{L}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re)?|\p{N}{1,3}"""
)
PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
PUBLIC = {
    "GPT-2": r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    "Llama 3": WORDS + REST,
    "o200k": CASED + REST,
    "digits by three": r"""\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))""",
    "DeepSeek": PUNCTUATION + r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    "BLOOM": r""" ?[^(\s|[.,!?…。，、।۔،])]+""",
}


def spelled(**parts: Any) -> bytes:
    return json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}, **parts}).encode()


@pytest.mark.parametrize("pattern", PUBLIC.values(), ids=PUBLIC.keys())
def test_patterns_that_people_use(pattern: str) -> None:
    raw = byte_level_tokenizer()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    check_tokenizer(raw.to_str().encode())


@pytest.mark.parametrize(
    "make",
    [
        byte_level_tokenizer,
        byte_fallback_tokenizer,
        metaspace_tokenizer,
        word_piece_tokenizer,
        suffix_tokenizer,
    ],
)
def test_kinds_of_tokenizers_that_people_use(make: Any) -> None:
    check_tokenizer(make().to_str().encode())


def every(module: Any, base: type) -> set[str]:
    classes = (one for one in vars(module).values() if isinstance(one, type) and issubclass(one, base))
    return {one.__name__ for one in classes} - {base.__name__}


def test_the_library_has_no_component_that_is_not_known() -> None:
    """A later version of the library may bring one: then somebody has to think about its bounds."""
    kinds = {
        "normalizer": (normalizers, normalizers.Normalizer),
        "pre_tokenizer": (pre_tokenizers, pre_tokenizers.PreTokenizer),
        "post_processor": (processors, processors.PostProcessor),
        "decoder": (decoders, decoders.Decoder),
    }
    for kind, (module, base) in kinds.items():
        assert every(module, base) <= bounds._STEPS[kind][1]
    assert every(models, models.Model) <= set(bounds._MODELS)


@pytest.mark.parametrize("kind", bounds._STEPS)
def test_unknown_components_are_refused_by_name(kind: str) -> None:
    for part in ({"type": "Surprise"}, {"content": "x"}, ["x"], "x"):
        with pytest.raises(UnsupportedFeatureError, match=kind):
            check_tokenizer(spelled(**{kind: part}))
    with pytest.raises(UnsupportedFeatureError, match="Surprise"):
        check_tokenizer(spelled(model={"type": "Surprise"}))


def nested(depth: int) -> dict[str, Any]:
    return {"type": "NFC"} if not depth else {"type": "Sequence", "normalizers": [nested(depth - 1)]}


def double(count: int) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    return {"type": "Sequence", "normalizers": [step] * count}


CHARSMAP = base64.b64encode((4).to_bytes(4, "little") + b"tree" + b"a\0" + b"b" * 300 + b"\0").decode()


def split(pattern: str) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}}


EVERYWHERE = {"type": "Replace", "pattern": {"Regex": "x?"}, "content": "y" * 300}
THREE_TIMES = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 3,
    "pair": [],
}
WHITESPACE = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}] * 200}
JOINED = {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteLevel"}]}
STRIPPED = {"type": "Strip", "content": " ", "start": 0, "stop": 1}
BEYOND = {
    "a decoder that joins before it reads bytes": {"decoder": JOINED},
    "a decoder that strips the end": {
        "decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}, STRIPPED]}
    },
    "a text that doubles ten times": {"normalizer": double(10)},
    "a pattern that matches everywhere": {"normalizer": EVERYWHERE},
    "a map of long texts": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}},
    "a decoder that multiplies": {"decoder": {"type": "Sequence", "decoders": double(10)["normalizers"]}},
    "sequences in sequences": {"normalizer": nested(20)},
    "many components": {"pre_tokenizer": WHITESPACE},
    "a long prefix": {"normalizer": {"type": "Prepend", "prepend": "x" * 5000}},
    "a repetition inside a repetition": split("([a-z]+)*!"),
    "the same, deeper": split("((?:[a-z]{2,}|b)c){3,}"),
    "a backreference": split(r"(a)\1"),
    "a long pattern": split("a" * 5000),
    "a long added token": {"added_tokens": [{"content": "x" * 5000}]},
    "many added tokens": {"added_tokens": [{"content": str(n)} for n in range(MAX_ADDED_TOKENS + 1)]},
    "a template that repeats the text": {"post_processor": THREE_TIMES},
}


@pytest.mark.parametrize("parts", BEYOND.values(), ids=BEYOND.keys())
def test_what_has_no_bound_is_refused(parts: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedFeatureError) as caught:
        check_tokenizer(spelled(**parts))
    assert caught.value.hint


@pytest.mark.parametrize("data", [b"[]", b"{", b"\xff", b'{"added_tokens": 5}'])
def test_what_is_no_tokenizer(data: bytes) -> None:
    with pytest.raises(InvalidConfigError):
        check_tokenizer(data)


def test_large_vocabularies_cost_little_and_the_same_file_nothing() -> None:
    vocab = {f"token{n}": n for n in range(100_000)}
    data = spelled(model={"type": "BPE", "vocab": vocab, "merges": []})
    check_tokenizer(data)
    started = time.process_time()
    check_tokenizer(bytes(data))
    assert time.process_time() - started < 0.1


def test_a_folder_with_such_a_tokenizer_is_not_registered(tmp_path: Any) -> None:
    from blockzoo.zoo import Zoo
    from support.folders import write_checkpoint

    folder = write_checkpoint(tmp_path / "base")
    (folder / "tokenizer.json").write_bytes(spelled(**BEYOND["a text that doubles ten times"]))
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    with pytest.raises(UnsupportedFeatureError, match="times as long"):
        zoo.register(folder, name="base")
    assert not list(zoo.store.storage.list("blobs"))


def test_added_tokens_with_all_their_flags_pass() -> None:
    raw = Tokenizer(models.WordLevel({"a": 0}, "a"))
    raw.add_special_tokens([AddedToken(f"<unused{n}>", special=True, lstrip=True) for n in range(6000)])
    check_tokenizer(raw.to_str().encode())
