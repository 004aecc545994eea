"""Requests, tokens and errors survive the way between router and worker."""

import math
import time
from dataclasses import fields, replace

import pytest

from blockserve.common.api.cluster import PathStep, Run, WorkerId
from blockserve.common.api.engine import EngineRequest, RequestTiming, SamplingParams, TokenEvent
from blockserve.common.api.tokens import FinishReason, PositionLogprobs
from blockserve.common.errors import KvCapacityError, PathBrokenError
from blockserve.common.wire import engine as wire
from blockzoo.manifest import ChainId

REQUEST = EngineRequest(
    request_id="r",
    chain=ChainId("c0ffee"),
    prompt=(1, 2, 3),
    sampling=SamplingParams(
        0.7,
        5,
        0.9,
        0.05,
        2**64 - 1,
        3,
        1.1,
        0.2,
        0.3,
        ((4, -1.5), (9, -math.inf)),
        (((3, 4), -math.inf),),
        (7,),
    ),
    max_tokens=77,
    stop_token_ids=frozenset({7, 8}),
    min_tokens=2,
    held_token_ids=frozenset({7}),
    logprobs=0,
    prompt_logprobs=True,
    deadline=None,
    priority=-3,
    cache_salt="tenant",
    output=(5, 6),
    arrival=time.time_ns(),
    path=(PathStep(WorkerId("a"), "127.0.0.1:1", Run(0, 4)), PathStep(WorkerId("b"), "unix:/b", Run(4, 9))),
    epoch=4,
)


def test_every_field_of_a_request_survives() -> None:
    assert wire.request_from_message(wire.request_to_message(REQUEST)) == REQUEST
    # None of the values above is a default, so a field that is forgotten shows.
    plain = EngineRequest("r", ChainId("x"), (9,), SamplingParams(), 1)
    names = [field.name for field in fields(REQUEST)]
    alike = {name for name in names if getattr(REQUEST, name) == getattr(plain, name)}
    assert alike == {"request_id", "deadline"}
    assert wire.request_from_message(wire.request_to_message(replace(plain, arrival=0))) == replace(
        plain, arrival=0
    )


def test_a_deadline_travels_as_the_time_that_is_left() -> None:
    deadline = time.monotonic() + 5
    found = wire.request_from_message(wire.request_to_message(replace(REQUEST, deadline=deadline)))
    assert found.deadline == pytest.approx(deadline, abs=0.5)


def test_every_field_of_a_token_survives() -> None:
    event = TokenEvent(
        0,
        42,
        PositionLogprobs(42, -0.5, ((42, -0.5), (1, -1.25))),
        (PositionLogprobs(2, -2.0), PositionLogprobs(3, -0.125, ((3, -0.125),))),
        FinishReason.STOP,
        16,
    )
    message = wire.token_to_message(event)
    assert wire.token_from_message(message, prompt_logprobs=True) == event
    later = TokenEvent(7, 3, finish=FinishReason.LENGTH)
    assert wire.token_from_message(wire.token_to_message(later), prompt_logprobs=True) == later


def test_timing_is_told_as_durations() -> None:
    now = time.monotonic()
    message = wire.token_to_message(TokenEvent(0, 1, timing=RequestTiming(now - 3, now - 1)))
    timing = wire.token_from_message(message, timing=True).timing
    assert timing is not None
    assert timing.queued_seconds == pytest.approx(2)
    assert timing.scheduled == pytest.approx(now - 1, abs=0.5)


def test_errors_keep_their_type() -> None:
    for error in (
        KvCapacityError("too long", hint="ask for less", pages=3),
        PathBrokenError("worker b", retry_after=0.5, worker="b"),
    ):
        found = wire.error_from_message(wire.error_to_message(error))
        assert type(found) is type(error)
        assert (str(found), found.hint, found.metadata) == (
            str(error),
            error.hint,
            {key: str(value) for key, value in error.metadata.items()},
        )
