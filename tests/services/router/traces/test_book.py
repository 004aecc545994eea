"""What a router remembers of its calls, over a real server with a scripted engine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from blockserve.common.api.call_trace import CallTrace, ChoiceTrace
from blockserve.common.api.cluster import Run, WorkerId
from blockserve.common.api.spans import PathTrace, SpanTimes, StepTrace
from blockserve.common.errors import EngineFailedError, RequestNotFoundError
from blockserve.common.wire.call_trace import call_from_message, call_to_message
from support.edge import ScriptedEngine, async_test, serving, until

PATHS = (PathTrace(0, (StepTrace(WorkerId("w.1"), "w", Run(0, 4), SpanTimes(queued=1.0)),), running=2.0),)


class Remembering(ScriptedEngine):
    """An engine that knows a path of every request."""

    async def trace(self, request_ids: Sequence[str]) -> Mapping[str, tuple[PathTrace, ...]]:
        """See `TracesRequests`."""
        return dict.fromkeys(request_ids, PATHS)


@async_test
async def test_a_finished_call_with_its_path() -> None:
    async with serving(engine=Remembering()) as rig:
        answer = await rig.client.generate("tale", "once", max_tokens=5, request_id="r-1").result()
        (call,) = await rig.client.trace("r-1")
        assert (call.request_id, call.model, call.version, call.outcome) == ("r-1", "tale", 1, "finished")
        assert call.prompt_tokens == answer.info.prompt_tokens
        (choice,) = call.choices
        assert choice.engine_request_id == rig.engine.requests[0].request_id
        assert (choice.tokens, choice.paths) == (5, PATHS)
        assert choice.first_token is not None
        assert 0 < call.resolving + call.tokenising <= choice.begun <= choice.first_token <= choice.seconds
        assert choice.seconds <= call.seconds <= call.age
        (named,) = await rig.client.trace(choice.engine_request_id)
        assert named.choices == call.choices


@async_test
async def test_all_choices_of_a_call_are_told_by_its_id() -> None:
    async with serving() as rig:
        await rig.client.generate("tale", "once", max_tokens=3, n=3, seed=1, request_id="r").results()
        (call,) = await rig.client.trace("r")
        assert [choice.choice for choice in call.choices] == [0, 1, 2]
        assert [choice.tokens for choice in call.choices] == [3, 3, 3]
        assert len({choice.engine_request_id for choice in call.choices}) == 3
        assert all(choice.engine_request_id.startswith("r#") for choice in call.choices)
        assert all(choice.paths == () for choice in call.choices)  # this engine remembers none


@async_test
async def test_a_running_call_and_one_that_its_caller_left() -> None:
    async with serving() as rig:
        rig.engine.hold_at = 2
        chunks = aiter(rig.client.generate("tale", "once", max_tokens=5, request_id="r"))
        await anext(chunks)
        await anext(chunks)
        (call,) = await rig.client.trace("r")
        assert (call.outcome, call.choices[0].tokens) == ("running", 2)
        assert call.seconds == call.age
        await chunks.aclose()  # type: ignore[attr-defined]
        await until(lambda: bool(rig.engine.closed))
        async with asyncio.timeout(10):
            while (await rig.client.trace("r"))[0].outcome == "running":
                await asyncio.sleep(0.001)
        (call,) = await rig.client.trace("r")
        assert call.outcome == "cancelled"


@async_test
async def test_a_call_that_failed_says_why() -> None:
    async with serving() as rig:
        rig.engine.fail_generate = EngineFailedError("broken")
        with pytest.raises(EngineFailedError):
            await rig.client.generate("tale", "once", max_tokens=5, request_id="r").result()
        (call,) = await rig.client.trace("r")
        assert (call.outcome, call.choices[0].first_token) == ("ENGINE_FAILED", None)


@async_test
async def test_calls_of_one_id_are_told_in_order_and_old_ones_are_forgotten() -> None:
    async with serving(router={"traced_requests": 2}) as rig:
        for count in (1, 2, 3):
            await rig.client.generate("tale", "once", max_tokens=count, request_id="same").result()
        calls = await rig.client.trace("same")
        assert [call.choices[0].tokens for call in calls] == [2, 3]
        with pytest.raises(RequestNotFoundError, match="no request 'other'") as caught:
            await rig.client.trace("other")
        assert "the last 2 that ended" in caught.value.hint
        assert caught.value.metadata["kept"] == "2"


def test_choices_without_a_token_survive_the_wire() -> None:
    choice = ChoiceTrace(0, "r#1", 0.5, None, 1.5, 0)
    call = CallTrace("r", "tale", 0, 0, "running", 0.5, 0.25, 1.5, 2.5, (choice,))
    assert call_from_message(call_to_message(call)) == call
