"""Text to token ids, as transformers does it; one copy for all variants that share it."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from blockserve.common.errors import PromptError
from blockserve.router.intake.tokenizer import TokenizerCache, VariantTokenizer
from blockzoo.folders.tokenizers.bounds import MAX_ADDED_TOKENS
from support.edge import byte_fallback_tokenizer, byte_level_tokenizer, tokenizer_json

TEXTS = [
    "In the beginning God created the heaven and the earth.",
    "  two  spaces\tand\n\nnewlines  ",
    "Größe, naïve, 東京, 🦁🏳️‍🌈, \u0000 and \x7f",
    "<|im_start|>user\nhello<|im_end|>\n",
    "x" * 3000,
    "def f(x):\n    return x**2  # 12345 67890",
]


def made(data: bytes | None = None) -> VariantTokenizer:
    return VariantTokenizer.from_bytes(tokenizer_json() if data is None else data)


def test_special_tokens_come_from_the_post_processor_or_not_at_all() -> None:
    tokenizer = VariantTokenizer.from_bytes(tokenizer_json())
    bos = tokenizer.token_id("<s>")
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello", add_special_tokens=True) == (bos, *plain)
    assert bos not in plain


def test_truncation_and_padding_in_the_file_are_not_applied() -> None:
    raw = byte_level_tokenizer()
    raw.enable_truncation(4)
    raw.enable_padding(length=4)
    tokenizer = VariantTokenizer.from_bytes(raw.to_str().encode())
    assert len(tokenizer.encode("q" * 50, add_special_tokens=False)) == 50
    assert len(tokenizer.encode("q", add_special_tokens=False)) == 1


def test_decoders_are_told_apart() -> None:
    assert VariantTokenizer(byte_level_tokenizer()).is_byte_level
    assert not VariantTokenizer(byte_fallback_tokenizer()).is_byte_level


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b'{"model": 5}', b"[" * 5000])
def test_a_file_that_is_no_tokenizer_is_a_typed_error(data: bytes) -> None:
    with pytest.raises(PromptError, match=r"tokenizer\.json"):
        VariantTokenizer.from_bytes(data)


def spelled(**parts: Any) -> bytes:
    """A tokenizer.json that the library takes, with other parts."""
    return json.dumps({**json.loads(tokenizer_json()), **parts}).encode()


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}


def nested(depth: int) -> dict[str, Any]:
    """Sequences in sequences, around a harmless step."""
    step: dict[str, Any] = {"type": "Lowercase"}
    for _ in range(depth):
        step = {"type": "Sequence", "normalizers": [step]}
    return step


def added(count: int) -> list[dict[str, Any]]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return [{"id": 1000 + i, "content": f"<w{i}>", **flags} for i in range(count)]


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 129}}, "133 components"),
        ({"normalizer": nested(9)}, "nested 8 deep"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 1025}}, "a text of 1025 characters"),
        ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "(?:x+y)+"}}}, "a repetition inside a repetition"),
        ({"added_tokens": added(MAX_ADDED_TOKENS + 1)}, "65537 added tokens"),
    ],
    ids=["components", "depth", "text", "pattern", "added tokens"],
)
def test_a_stored_tokenizer_beyond_the_bounds_of_register_is_a_typed_error(
    parts: dict[str, Any], why: str
) -> None:
    """The library would load each of them; nothing is tokenised with it here."""
    data = spelled(**parts)
    Tokenizer.from_buffer(data)
    with pytest.raises(PromptError, match=f"tokenizer.json cannot be used: .*{why}") as caught:
        VariantTokenizer.from_bytes(data)
    assert "token ids" in caught.value.hint


def test_threads_that_want_the_same_tokenizer_make_it_once() -> None:
    cache, reads, barrier = TokenizerCache(4), [], threading.Barrier(6)

    def make() -> VariantTokenizer:
        reads.append(threading.get_ident())
        return made()

    def get() -> VariantTokenizer:
        barrier.wait()
        return cache.get("a", make)

    with ThreadPoolExecutor(6) as pool:
        found = [future.result() for future in [pool.submit(get) for _ in range(6)]]
    assert len(reads) == 1
    assert all(tokenizer is found[0] for tokenizer in found)


def test_the_least_used_tokenizer_is_forgotten() -> None:
    cache, reads = TokenizerCache(2), []

    def get(key: str) -> None:
        cache.get(key, lambda: reads.append(key) or made())

    for key in ("a", "b", "a", "c", "a", "b"):
        get(key)
    assert reads == ["a", "b", "c", "b"]


def test_a_failure_is_not_remembered() -> None:
    cache = TokenizerCache(2)
    with pytest.raises(PromptError):
        cache.get("a", lambda: made(b"broken"))
    assert cache.get("a", made).token_id("<s>") is not None


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer])
def test_made_tokenizers_match_transformers(make: object, tmp_path: Path) -> None:

    raw = make()  # type: ignore[operator]
    raw.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )
    compare(tmp_path)


@pytest.mark.model
def test_smollm2_matches_transformers(smollm2: Path) -> None:
    compare(smollm2)


def compare(folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    ours = VariantTokenizer.from_bytes((folder / "tokenizer.json").read_bytes())
    for text in TEXTS:
        for special in (True, False):
            expected = theirs(text, add_special_tokens=special)["input_ids"]
            assert list(ours.encode(text, add_special_tokens=special)) == expected


def test_one_that_has_been_parsed_is_had_without_blocking() -> None:
    cache = TokenizerCache(4)
    assert cache.ready("a") is None
    tokenizer = cache.get("a", made)
    assert cache.ready("a") is tokenizer


def test_one_that_cannot_be_parsed_is_never_ready() -> None:
    cache = TokenizerCache(4)
    with pytest.raises(PromptError):
        cache.get("a", lambda: made(b"{}"))
    assert cache.ready("a") is None


def test_a_panic_of_the_library_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import tokenizers

    class PanicError(BaseException):
        """What a panic is to Python."""

    def explode(data: bytes) -> None:
        raise PanicError("index out of bounds")

    monkeypatch.setattr(tokenizers, "Tokenizer", type("Broken", (), {"from_buffer": staticmethod(explode)}))
    with pytest.raises(PromptError, match="index out of bounds"):
        VariantTokenizer.from_bytes(tokenizer_json())
