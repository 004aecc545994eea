"""The parts of a request's time add up to it, whatever is known of its path."""

from __future__ import annotations

import random

import pytest

from blockserve.common.api.call_trace import ChoiceTrace
from blockserve.common.api.cluster import Run, WorkerId
from blockserve.common.api.spans import PathTrace, PhaseTimes, SpanTimes, StepTrace
from blockserve.router.traces.parts import PartKind, parts_of

HEAD = SpanTimes(
    queued=0.5,
    opening=0.25,
    prompt=PhaseTimes(1, 8, 1.0, 1.0, 0.0, 2.0, 1),
    decode=PhaseTimes(10, 10, 2.0, 0.5, 0.25, 6.0, 10),
)
"""12 seconds in all."""
TAIL = SpanTimes(
    prompt=PhaseTimes(1, 8, 1.25, 1.25, 0.25), decode=PhaseTimes(10, 10, 3.5, 0.5, 0.5), queued=9.0
)


def step(name: str, first: int, end: int, times: SpanTimes | None) -> StepTrace:
    return StepTrace(WorkerId(f"{name}.1") if name else WorkerId(""), name, Run(first, end), times)


def path(*steps: StepTrace, running: float = 12.5, epoch: int = 0, moved: str = "") -> PathTrace:
    return PathTrace(epoch, steps, choosing=0.125, moving=0.0625, moved=moved, running=running)


def choice(*paths: PathTrace, seconds: float = 14.0) -> ChoiceTrace:
    return ChoiceTrace(0, "r#1", 0.75, 4.0, seconds, 11, paths)


def seconds(one: ChoiceTrace) -> dict[str, float]:
    """By kind, spans by their worker; they have to add up."""
    parts = parts_of(one)
    assert sum(part.seconds for part in parts) == pytest.approx(one.seconds)
    assert all(part.seconds >= -1e-12 for part in parts)
    names = [part.step.name if part.step else str(part.kind) for part in parts]
    assert len(set(names)) == len(names)
    return dict(zip(names, (part.seconds for part in parts), strict=True))


def test_a_chain_of_two_workers() -> None:
    one = choice(path(step("a", 0, 3, HEAD), step("b", 3, 6, TAIL)))
    assert seconds(one) == {
        "before the engine": 0.75,
        "choosing the path": 0.125,
        "queue": 0.5,
        "opening the path": 0.25,
        "a": 1.0 + 2.0 + 0.25,
        "b": (1.25 + 0.25) + (3.5 + 0.5),
        "hops": (2.0 - 1.5) + (6.0 - 4.0),
        "between router and worker": 0.5,
        "other": 14.0 - 0.75 - 0.125 - 12.5,
    }
    per_token = {part.kind: part.per_token for part in parts_of(one) if part.step is None}
    assert per_token[PartKind.HOPS] == (6.0 - 4.0) / 10
    spans = {part.step.name: part.per_token for part in parts_of(one) if part.step}
    assert spans == {"a": 0.2, "b": 0.35}


def test_one_process_has_neither_hops_nor_a_stream() -> None:
    alone = SpanTimes(queued=0.5, prompt=PhaseTimes(1, 8, 1.0), decode=PhaseTimes(10, 10, 2.0, 0.5, 0.5))
    one = choice(PathTrace(0, (step("", 0, 6, alone),), running=4.0), seconds=5.0)
    assert seconds(one) == {
        "before the engine": 0.75,
        "choosing the path": 0.0,
        "queue": 0.5,
        "": 3.5,
        "other": 0.25,
    }


def test_prompts_that_others_compute_at_the_same_time_count_once() -> None:
    busy = SpanTimes(prompt=PhaseTimes(8, 64, 6.0), decode=PhaseTimes(10, 10, 3.0))
    idle = SpanTimes(prompt=PhaseTimes(8, 64, 2.0), decode=PhaseTimes(10, 10, 1.0))
    told = seconds(choice(path(step("a", 0, 2, HEAD), step("b", 2, 4, busy), step("c", 4, 6, idle))))
    assert told["b"] == 2.0 * 6 / 8 + 3.0
    assert told["c"] == 2.0 * 2 / 8 + 1.0
    assert told["hops"] == 2.0


def test_a_worker_that_is_gone_is_unknown() -> None:
    told = seconds(choice(path(step("a", 0, 3, HEAD), step("b", 3, 6, None))))
    assert told["b"] == 0.0
    assert told["unknown"] == 8.0
    assert "hops" not in told


def test_a_head_worker_that_is_gone_leaves_what_the_others_needed() -> None:
    told = seconds(choice(path(step("a", 0, 3, None), step("b", 3, 6, TAIL))))
    assert (told["a"], told["b"], told["unknown"]) == (0.0, 5.5, 7.0)
    told = seconds(choice(path(step("a", 0, 3, None), step("b", 3, 6, TAIL), running=5.0)))
    assert (told["b"], told["unknown"]) == (5.0, 0.0)


def test_a_head_worker_that_learns_late_of_the_end() -> None:
    told = seconds(choice(path(step("a", 0, 3, HEAD), step("b", 3, 6, TAIL), running=6.0), seconds=6.875))
    assert told["a"] == 3.25 / 2
    assert told["between router and worker"] == told["other"] == 0.0


def test_a_path_that_is_being_chosen_and_one_with_a_decision_about_keys() -> None:
    first = path(step("a", 0, 6, HEAD))
    second = path(step("b", 0, 6, TAIL), running=20.0, epoch=1, moved="recompute: owner_lost")
    third = PathTrace(2, choosing=0.5)
    parts = parts_of(choice(first, second, third, seconds=40.0))
    assert sum(part.seconds for part in parts) == pytest.approx(40.0)
    moving = [part for part in parts if part.kind is PartKind.MOVING]
    assert [(part.epoch, part.seconds) for part in moving] == [(1, 0.0625)]
    assert [(part.kind, part.seconds) for part in parts if part.epoch == 2] == [(PartKind.CHOOSING, 0.5)]


def test_parts_add_up_whatever_workers_say() -> None:
    random_ = random.Random(11)

    def phase() -> PhaseTimes:
        counts = random_.randrange(3), random_.randrange(3)
        return PhaseTimes(*counts, *(random_.random() for _ in range(4)), random_.randrange(3))

    def times() -> SpanTimes | None:
        if random_.random() < 0.2:
            return None
        return SpanTimes(random_.random(), random_.random(), 1, 0, phase(), phase())

    for _ in range(300):
        paths = [
            path(
                *(step(f"w{place}", place, place + 1, times()) for place in range(random_.randrange(4))),
                running=random_.random() * 8,
                epoch=epoch,
                moved=random_.choice(("", "transfer: cheaper")),
            )
            for epoch in range(random_.randrange(1, 4))
        ]
        least = sum(one.choosing + one.moving + one.running for one in paths) + 0.75
        whole = choice(*paths, seconds=least + random_.random())
        parts = parts_of(whole)
        assert all(part.seconds >= -1e-9 for part in parts)
        assert sum(part.seconds for part in parts) == pytest.approx(whole.seconds)
