"""Chunks from tokens: text, stops, log-probabilities, and picking up an answer at any token."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockserve.common.api.calls import GenerateCall, SamplingWishes, StoppingWishes
from blockserve.common.api.engine import EngineRequest, TokenEvent
from blockserve.common.api.results import Chunk
from blockserve.common.api.tokens import FinishReason
from blockserve.common.errors import EngineFailedError, ResumeError
from blockserve.router.answers.answer import Answer, stream_answer
from blockserve.router.intake.catalog import VariantCatalog
from blockserve.router.intake.plan import Plan, plan
from blockserve.router.intake.tokenizer import VariantTokenizer
from blockserve.router.limits import RouterConfig
from support.edge import FakeZoo, ScriptedEngine, async_test, byte_level_tokenizer

TOKENIZER = VariantTokenizer(byte_level_tokenizer())
EOS = TOKENIZER.token_id("</s>")
GREEDY = SamplingWishes(temperature=0.0, seed=11)


def make_plan(**values: Any) -> Plan:
    zoo = FakeZoo()
    zoo.add("tale", "chain")
    call = GenerateCall("id", "tale", "hello", **{"sampling": GREEDY, **values})
    prompt = TOKENIZER.encode("hello", add_special_tokens=True)
    return plan(call, VariantCatalog(zoo).get_blocking("tale"), prompt, RouterConfig(), engine_id="id#0")


def events(text: str, finish: FinishReason = FinishReason.LENGTH) -> list[TokenEvent]:
    ids = list(TOKENIZER.encode(text, add_special_tokens=False))
    if finish is FinishReason.STOP:
        ids.append(EOS)
    made = [TokenEvent(i, token) for i, token in enumerate(ids)]
    return [*made[:-1], replace(made[-1], finish=finish)]


def chunks_of(plan: Plan, batches: Sequence[Sequence[TokenEvent]], clock: Any = lambda: 0.0) -> list[Chunk]:
    answer, chunks = Answer(plan, TOKENIZER, arrival=0.0, clock=clock), []
    for batch in batches:
        answer.push(batch)
        if (chunk := answer.take()) is not None:
            chunks.append(chunk)
        if answer.finished:
            break
    return chunks


def text_of(chunks: Sequence[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def test_info_comes_first_finish_last_and_every_chunk_says_where_it_starts() -> None:
    chunks = chunks_of(make_plan(), [[event] for event in events("hello world")])
    assert [chunk.info is not None for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert [chunk.finish is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [chunk.first_token_index for chunk in chunks] == list(range(len(chunks)))
    assert text_of(chunks) == "hello world"
    info, finish = chunks[0].info, chunks[-1].finish
    assert info is not None
    assert (info.ref, info.chain_digest, info.seed, info.prompt_tokens) == ("tale@1", "chain", 11, 3)
    assert finish is not None
    assert (finish.reason, finish.matched) == (FinishReason.LENGTH, None)
    assert (finish.usage.prompt_tokens, finish.usage.completion_tokens) == (3, len(chunks))


def test_usage_says_how_much_of_the_prompt_was_cached() -> None:
    first, *rest = events("hello")
    chunks = chunks_of(make_plan(), [[replace(first, cached_prompt_tokens=2)], rest])
    assert chunks[-1].finish is not None
    assert chunks[-1].finish.usage.cached_prompt_tokens == 2


def test_half_a_character_waits_for_the_other_half() -> None:
    chunks = chunks_of(make_plan(), [[event] for event in events("a€b")])
    assert [chunk.text for chunk in chunks] == ["a", "", "", "€", "b"]


def test_the_end_token_is_reported_without_text() -> None:
    chunks = chunks_of(make_plan(), [events("hello", FinishReason.STOP)])
    finish = chunks[-1].finish
    assert finish is not None
    assert (finish.reason, finish.matched) == (FinishReason.STOP, EOS)
    assert (chunks[-1].token_ids[-1], text_of(chunks)) == (EOS, "hello")


def test_a_stop_token_with_text_is_hidden_unless_wanted() -> None:
    batch = events("ab")
    batch[-1] = replace(batch[-1], finish=FinishReason.STOP)
    assert text_of(chunks_of(make_plan(), [batch])) == "a"
    stopping = StoppingWishes(include_stop=True)
    assert text_of(chunks_of(make_plan(stopping=stopping), [batch])) == "ab"


def test_a_stop_string_ends_the_answer_and_drops_what_follows() -> None:
    plan = make_plan(stopping=StoppingWishes(stop=("STOP",)))
    chunks = chunks_of(plan, [events("so far S")])
    assert text_of(chunks) == "so far S"
    chunks = chunks_of(plan, [events("so far STOP and more")])
    finish = chunks[-1].finish
    assert finish is not None
    assert (finish.reason, finish.matched, text_of(chunks)) == (FinishReason.STOP, "STOP", "so far ")
    consumed = TOKENIZER.raw.decode(list(chunks[-1].token_ids))
    assert consumed == "so far STOP"
    assert finish.usage.completion_tokens == len(chunks[-1].token_ids)


def test_stop_strings_are_looked_for_after_the_least_length() -> None:
    """As in vLLM: text of the first tokens is shown as it is, and no match begins in it."""
    batch = events("abababab")
    plan = make_plan(stopping=StoppingWishes(stop=("ba",), min_tokens=3))
    for batches in ([batch], [[event] for event in batch]):
        chunks = chunks_of(plan, batches)
        finish = chunks[-1].finish
        assert finish is not None
        assert (finish.reason, finish.matched, text_of(chunks)) == (FinishReason.STOP, "ba", "aba")
        assert finish.usage.completion_tokens == 5
    plan = make_plan(stopping=StoppingWishes(stop=("ba",), min_tokens=8))
    assert text_of(chunks_of(plan, [batch])) == "abababab"


def test_time_to_first_token_is_from_arrival_to_the_first_token_shown() -> None:
    times = iter([0.25, 9.0, 9.0])
    chunks = chunks_of(make_plan(), [[event] for event in events("abc")], clock=lambda: next(times))
    assert chunks[-1].finish is not None
    assert chunks[-1].finish.time_to_first_token == 0.25


characters = st.text(st.sampled_from("ab€ 🦁STOP"), min_size=1, max_size=20)


@given(characters, st.data())
def test_an_answer_continues_where_it_was_cut_however_the_engine_groups(
    text: str, data: st.DataObject
) -> None:
    """Text seen before the cut and text after it are the whole: no byte lost, none twice."""
    stopping = StoppingWishes(stop=("STOP", "a€"))
    batch = events(text, FinishReason.STOP)
    whole = chunks_of(make_plan(stopping=stopping), [[event] for event in batch])
    cut = data.draw(st.integers(0, len(whole) - 1))
    seen = sum(len(chunk.token_ids) for chunk in whole[:cut])
    size = data.draw(st.integers(1, len(batch)))
    groups = [batch[i : i + size] for i in range(0, len(batch), size)]
    resumed = chunks_of(make_plan(stopping=stopping, resume_from=seen), groups)
    assert resumed[0].first_token_index == seen
    assert resumed[0].info is not None
    assert text_of(whole[:cut]) + text_of(resumed) == text_of(whole)
    tokens = [token for chunk in (*whole[:cut], *resumed) for token in chunk.token_ids]
    assert tokens == [token for chunk in whole for token in chunk.token_ids]
    assert resumed[-1].finish is not None
    assert whole[-1].finish is not None
    assert resumed[-1].finish.usage == whole[-1].finish.usage


def test_an_answer_shorter_than_what_was_received_is_an_error() -> None:
    with pytest.raises(ResumeError, match="has 3 tokens"):
        chunks_of(make_plan(resume_from=4), [events("abc")])


def test_an_answer_that_was_received_whole_gives_its_end_once_more() -> None:
    (chunk,) = chunks_of(make_plan(resume_from=3), [events("abc")])
    assert (chunk.token_ids, chunk.text, chunk.first_token_index) == ((), "", 3)
    assert chunk.finish is not None


@async_test
async def test_the_engine_is_let_go_before_the_last_chunk_is_handed_out() -> None:
    engine = ScriptedEngine("hello")
    engine.loaded.add(make_plan().request.chain)
    plan = make_plan(stopping=StoppingWishes(stop=("ll",)))
    chunks = stream_answer(engine, plan, Answer(plan, TOKENIZER, arrival=0.0))
    assert (await anext(chunks)).finish is not None
    assert engine.closed == ["id#0"]
    await chunks.aclose()


@async_test
async def test_leaving_early_closes_the_engines_iterator() -> None:
    engine = ScriptedEngine("hello")
    plan = make_plan()
    engine.loaded.add(plan.request.chain)
    chunks = stream_answer(engine, plan, Answer(plan, TOKENIZER, arrival=0.0))
    await anext(chunks)
    assert engine.closed == []
    await chunks.aclose()
    assert engine.closed == ["id#0"]


class BrokenEngine(ScriptedEngine):
    """Ends too early, or skips a token."""

    def __init__(self, batches: list[list[TokenEvent]]) -> None:
        super().__init__()
        self.batches = batches

    async def generate(self, request: EngineRequest) -> AsyncIterator[Sequence[TokenEvent]]:
        for batch in self.batches:
            yield batch


@pytest.mark.parametrize("batches", [[], [[TokenEvent(0, 1)]], [[TokenEvent(1, 1)]]])
@async_test
async def test_an_engine_that_breaks_its_promise_is_an_error(batches: list[list[TokenEvent]]) -> None:
    plan = make_plan()
    answer = Answer(plan, TOKENIZER, arrival=0.0)
    with pytest.raises(EngineFailedError):
        _ = [chunk async for chunk in stream_answer(BrokenEngine(batches), plan, answer)]
