"""A request's whole time as parts that add up to it. Pure.

At the head worker a request is always somewhere: in the queue, opening its path, waiting for a pass, in one,
or away (its hidden states were handed on, its token has not come back). What is away is at the other workers
or on the way between them. So the hops are what the head worker's round trips took less what the other
workers say they needed, waiting for their own passes included: the network, the frames, and what the event
loops made of both.

While the head worker computes the later chunks of a long prompt, the others compute the earlier ones. Of what
they needed for prompts only as much counts as the head worker waited for them.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from blockserve.common.api.call_trace import ChoiceTrace
from blockserve.common.api.spans import PathTrace, PhaseTimes, SpanTimes, StepTrace


class PartKind(enum.StrEnum):
    """What a part of the time was spent on."""

    BEFORE = "before the engine"
    CHOOSING = "choosing the path"
    MOVING = "fetching keys and values"
    QUEUE = "queue"
    OPENING = "opening the path"
    SPAN = "span"
    HOPS = "hops"
    UNKNOWN = "unknown"
    STREAM = "between router and worker"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a request's time.

    Attributes:
        kind: what it was spent on.
        seconds: how much.
        epoch: of the path; None when it belongs to none.
        step: the worker, of a span.
        per_token: of a span, seconds of a pass; of hops, seconds of all of them: mean over decoded tokens.
    """

    kind: PartKind
    seconds: float
    epoch: int | None = None
    step: StepTrace | None = None
    per_token: float = 0.0


def parts_of(choice: ChoiceTrace) -> tuple[Part, ...]:
    """The parts of an answer's time; their sum is `choice.seconds`."""
    parts = [Part(PartKind.BEFORE, choice.begun)]
    for path in choice.paths:
        parts.extend(path_parts(path))
    rest = choice.seconds - sum(part.seconds for part in parts)
    return (*parts, Part(PartKind.OTHER, max(0.0, rest)))


def path_parts(path: PathTrace) -> Iterator[Part]:
    """The parts of a request's time along one path."""
    yield Part(PartKind.CHOOSING, path.choosing, path.epoch)
    if path.moved:
        yield Part(PartKind.MOVING, path.moving, path.epoch)
    if not path.steps:
        return
    head = path.steps[0].times
    if head is None:
        yield from _without_head(path)
        return
    # A worker may learn a little later than the router that a request is over.
    scale = min(1.0, path.running / head.seconds) if head.seconds else 1.0
    yield Part(PartKind.QUEUE, scale * head.queued, path.epoch)
    if len(path.steps) > 1:
        yield Part(PartKind.OPENING, scale * head.opening, path.epoch)
    here = head.prompt.here + head.decode.here
    yield Part(PartKind.SPAN, scale * here, path.epoch, path.steps[0], head.decode.seconds_per_token)
    if len(path.steps) > 1:
        yield from _away(path, head, scale)
    if path.steps[0].worker:
        yield Part(PartKind.STREAM, path.running - scale * head.seconds, path.epoch)


def _away(path: PathTrace, head: SpanTimes, scale: float) -> Iterator[Part]:
    """The other workers, and the way between all of them."""
    others = path.steps[1:]
    prompts = _charged(head.prompt.away, [_phase(step, "prompt") for step in others])
    decodes = _charged(head.decode.away, [_phase(step, "decode") for step in others])
    for step, prompt, decode in zip(others, prompts, decodes, strict=True):
        if step.times is None:
            yield Part(PartKind.SPAN, 0.0, path.epoch, step)
        else:
            per_token = step.times.decode.seconds_per_token
            yield Part(PartKind.SPAN, scale * (prompt + decode), path.epoch, step, per_token)
    hops = head.decode.away - sum(decodes)
    kind = PartKind.HOPS if all(step.times for step in others) else PartKind.UNKNOWN
    per_token = hops / head.decode.round_trips if head.decode.round_trips else 0.0
    yield Part(
        kind, scale * (head.prompt.away - sum(prompts) + hops), path.epoch, None, max(0.0, scale * per_token)
    )


def _without_head(path: PathTrace) -> Iterator[Part]:
    """Nobody knows when the request was where; what the others needed is known still."""
    others = path.steps[1:]
    needed = [_phase(step, "prompt").here + _phase(step, "decode").here for step in others]
    scale = min(1.0, path.running / sum(needed)) if sum(needed) else 1.0
    yield Part(PartKind.SPAN, 0.0, path.epoch, path.steps[0])
    for step, seconds in zip(others, needed, strict=True):
        per_token = step.times.decode.seconds_per_token if step.times else 0.0
        yield Part(PartKind.SPAN, scale * seconds, path.epoch, step, per_token)
    yield Part(PartKind.UNKNOWN, path.running - scale * sum(needed), path.epoch)


def _phase(step: StepTrace, name: str) -> PhaseTimes:
    if step.times is None:
        return PhaseTimes()
    return step.times.prompt if name == "prompt" else step.times.decode


def _charged(away: float, phases: Sequence[PhaseTimes]) -> list[float]:
    """What each worker needed, as far as the head worker waited for it."""
    needed = sum(phase.here for phase in phases)
    scale = min(1.0, away / needed) if needed else 1.0
    return [scale * phase.here for phase in phases]
