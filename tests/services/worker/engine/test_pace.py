"""What passes tell about speed: means, and what a further request costs."""

from __future__ import annotations

import random

import pytest

from blockserve.worker.engine.pace import Pace
from blockserve.worker.requests.running import Chunk


def chunks(*num_tokens: int) -> list[Chunk]:
    return [Chunk(None, 0, count) for count in num_tokens]  # type: ignore[arg-type]


def decode(pace: Pace, requests: int, seconds: float) -> None:
    pace.note(chunks(*[1] * requests), seconds)


def test_nothing_is_known_before_a_pass() -> None:
    pace = Pace()
    assert (pace.step_seconds, pace.step_requests, pace.step_crowding) == (0, 0, 0)
    assert pace.prefill_tokens_per_second == 0


def test_prompts_and_steps_are_told_apart() -> None:
    pace = Pace()
    pace.note(chunks(100, 1), 0.5)
    assert pace.prefill_tokens_per_second == pytest.approx(202)
    assert pace.step_seconds == 0
    decode(pace, 3, 0.01)
    pace.note(chunks(2, 1, 1, 1, 1), 9.0)  # neither: it decodes, and a little prompt is in it
    assert (pace.step_seconds, pace.step_requests) == (0.01, 3)


def test_a_further_request_costs_what_passes_of_all_sizes_say() -> None:
    source, pace = random.Random(0), Pace()
    for _ in range(300):
        requests = source.randint(1, 16)
        decode(pace, requests, 0.02 * (1 + 0.08 * (requests - 1)) * source.uniform(0.95, 1.05))
    assert pace.step_crowding == pytest.approx(0.08, rel=0.25)
    alone = pace.step_seconds / (1 + pace.step_crowding * (pace.step_requests - 1))
    assert alone == pytest.approx(0.02, rel=0.1)


def test_passes_of_one_size_say_nothing_about_others_and_nothing_is_forgotten() -> None:
    pace = Pace()
    for _ in range(100):
        decode(pace, 4, 0.02)
    assert pace.step_crowding == 0
    for _ in range(100):
        decode(pace, 8, 0.03)
    known = pace.step_crowding
    assert known == pytest.approx(0.002 / 0.0126, rel=0.3)
    for _ in range(1000):
        decode(pace, 8, 0.03)
    assert pace.step_crowding == pytest.approx(known, rel=0.1)


def test_noise_that_makes_more_requests_faster_is_not_believed() -> None:
    pace = Pace()
    for requests, seconds in ((1, 0.5), (8, 0.01), (16, 0.01)):
        decode(pace, requests, seconds)
    assert pace.step_crowding == 0
