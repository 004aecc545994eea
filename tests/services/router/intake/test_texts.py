"""What is tokenised: nothing that no context holds, long texts one at a time, other threads undisturbed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from blockserve.common.api.calls import Conversation
from blockserve.common.errors import PromptTooLongError
from blockserve.router.intake.catalog import VariantCatalog
from blockserve.router.intake.texts import (
    NORMALISED,
    REFUSED_BYTES_PER_SECOND,
    TextThreads,
    check_beginning,
    check_text,
    size_of,
)
from blockserve.router.intake.tokenizer import VariantTokenizer
from support.edge import (
    FakeZoo,
    async_test,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    metaspace_tokenizer,
    serving,
    tokenizer_json,
    word_piece_tokenizer,
)

WORDS = ("two", " words", "\n", "  ", "1234567890", ", ", "aaaaaaaaaaaa", " ", "x", "é", "東", "<s>")
PLAIN = "two words and a full stop. "


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("", 0),
        ("abc", 3),
        ("é東🦁", 9),
        ([{"role": "user", "content": ["é"]}], 17),
        (None, 0),
        (7, 0),
        ("\ud800", 1),
    ],
)
def test_sizes_are_bytes_of_all_texts(value: object, size: int) -> None:
    assert size_of(value) == size


def test_a_text_of_the_longest_tokens_only_is_still_taken() -> None:
    check_text(10 * 6 * NORMALISED, "tale@1", 10, 6)
    with pytest.raises(PromptTooLongError, match="241 bytes") as caught:
        check_text(10 * 6 * NORMALISED + 1, "tale@1", 10, 6)
    assert caught.value.metadata["max_text_bytes"] == "240"


def test_the_longest_token_is_that_of_the_vocabulary_and_the_added_ones() -> None:
    raw = byte_level_tokenizer()
    assert VariantTokenizer(raw).longest_token == len("<|im_start|>")
    raw.add_tokens(["x" * 40])
    assert VariantTokenizer(raw).longest_token == 40


def test_other_threads_go_on_while_a_text_is_tokenised() -> None:
    tokenizer = VariantTokenizer.from_bytes(tokenizer_json())
    encoding = threading.Thread(
        target=tokenizer.encode, args=(PLAIN * 40_000,), kwargs={"add_special_tokens": False}
    )
    started = longest = time.perf_counter()
    encoding.start()
    longest, last = 0.0, time.perf_counter()
    while encoding.is_alive():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    taken = time.perf_counter() - started
    assert taken > 0.1
    assert longest < taken / 2


@async_test
async def test_a_text_that_no_context_holds_is_never_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(*_: object, **__: object) -> tuple[int, ...]:
        raise AssertionError("tokenised")

    monkeypatch.setattr(VariantTokenizer, "encode", encode)
    async with serving() as rig:
        long = PLAIN * 10_000
        for call in (
            rig.client.generate("tale", long, max_tokens=1).result(),
            rig.client.chat("tale", long, max_tokens=1).result(),
            rig.client.tokenize("tale", long),
            rig.client.tokenize("tale", [{"role": "user", "content": long}]),
        ):
            with pytest.raises(PromptTooLongError, match="bytes"):
                await call


@pytest.mark.parametrize(
    "make", [byte_level_tokenizer, byte_fallback_tokenizer, metaspace_tokenizer, word_piece_tokenizer]
)
@given(
    text=st.lists(
        st.sampled_from([*WORDS, " ", "x", "é", "東", "<|im_start|>"]), min_size=1, max_size=400
    ).map("".join),
    context=st.integers(1, 12),
)
def test_no_text_that_fits_is_refused_by_its_beginning(
    make: Callable[[], Tokenizer], text: str, context: int
) -> None:
    tokenizer = VariantTokenizer(make())
    try:
        check_beginning(text, size_of(text), "tale@1", context, tokenizer.count)
    except PromptTooLongError:
        assert len(tokenizer.encode(text, add_special_tokens=True)) > context


def test_of_a_text_far_beyond_the_context_the_beginning_is_tokenised_only() -> None:
    counted = []

    def count(text: str) -> int:
        counted.append(len(text))
        return len(text) // 2

    check_beginning("word " * 6, 30, "tale@1", 1, count)
    assert counted == []
    with pytest.raises(PromptTooLongError, match="first 160 of the text's 4000 bytes have 40 tok") as caught:
        check_beginning("é" * 2000, 4000, "tale@1", 10, count)
    assert counted == [80]
    assert caught.value.metadata["text_bytes"] == "4000"
    check_beginning(" " * 4000, 4000, "tale@1", 10, lambda _: 20)


@async_test
async def test_a_text_that_long_tokens_could_make_fit_is_refused_by_its_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(VariantTokenizer, "encode", lambda *_, **__: pytest.fail("tokenised as a whole"))
    zoo = FakeZoo()
    zoo.add("tale")
    catalog = VariantCatalog(zoo)
    variant = await catalog.get("tale")
    text = PLAIN * (variant.chain.context_length * 40 // len(PLAIN))
    with pytest.raises(PromptTooLongError, match=r"have \d+ tokens already"):
        await catalog.encode(variant, text, add_special_tokens=True)


@async_test
async def test_tools_count_as_text() -> None:
    zoo = FakeZoo()
    zoo.add("tale")
    catalog = VariantCatalog(zoo)
    talk = Conversation([{"role": "user", "content": "hi"}], tools=[{"description": PLAIN * 10_000}])
    with pytest.raises(PromptTooLongError):
        await catalog.check_conversation(await catalog.get("tale"), talk)


@async_test
async def test_long_texts_take_turns_and_short_ones_do_not_wait() -> None:
    threads, running, most = TextThreads(10), 0, 0
    release, lock = threading.Event(), threading.Lock()

    def work(text: str) -> str:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        release.wait(30)
        with lock:
            running -= 1
        return text

    long = [asyncio.create_task(threads.run(11, work, str(n))) for n in range(3)]
    assert await threads.run(10, str.upper, "short") == "SHORT"
    long[1].cancel()
    release.set()
    assert [await long[0], await long[2]] == ["0", "2"]
    assert long[1].cancelled()
    assert most == 1
    threads.close()


@async_test
async def test_refusals_of_long_texts_come_one_by_one() -> None:
    threads, ended = TextThreads(10), []

    async def refused(size: int) -> None:
        await threads.pause(size)
        ended.append(time.monotonic())

    started = time.monotonic()
    await refused(10)
    await asyncio.gather(*(refused(REFUSED_BYTES_PER_SECOND // 20) for _ in range(4)))
    assert ended[0] - started < 0.04
    assert [later - started >= 0.05 * n for n, later in enumerate(ended)] == [True] * 5
    threads.close()
