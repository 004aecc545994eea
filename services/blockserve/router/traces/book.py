"""Where the time of calls goes at the router: those that run, and those that have lately ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from blockserve.common.api.call_trace import CallTrace, ChoiceTrace
from blockserve.common.api.calls import GenerateCall
from blockserve.common.api.engine import Engine
from blockserve.common.api.spans import PathTrace, TracesRequests
from blockserve.common.errors import RequestNotFoundError
from blockserve.common.tracing.recent import Recent
from blockzoo.errors import BlockzooError

MAX_CALLS = 16
"""Maximum number of calls shown for one id; the latest are shown: an answer that was resumed has several."""


class ChoiceTimes:
    """One answer as it grows.

    Attributes:
        is_finished: whether its last token has come.
    """

    def __init__(self, engine_id: str, clock: Callable[[], float]) -> None:
        """Nothing has happened yet."""
        self.engine_id = engine_id
        self.is_finished = False
        self._clock = clock
        self._tokens = 0
        self._begun: float | None = None
        self._first: float | None = None
        self._end: float | None = None

    def begin(self) -> None:
        """It is given to the engine; the first time counts."""
        self._begun = self._begun or self._clock()

    def advance(self, tokens: int, *, finished: bool) -> None:
        """It has so many tokens now."""
        self._tokens = tokens
        if self._first is None or finished:
            self._end = self._clock()
            self._first = self._first or self._end
        self.is_finished = finished

    def trace(
        self, choice: int, arrival: float, end: float, paths: Mapping[str, tuple[PathTrace, ...]]
    ) -> ChoiceTrace:
        """Everything known of it; `end` stands in where it has not finished."""
        if self.is_finished and self._end is not None:
            end = self._end
        return ChoiceTrace(
            choice=choice,
            engine_request_id=self.engine_id,
            begun=(end if self._begun is None else self._begun) - arrival,
            first_token=None if self._first is None else self._first - arrival,
            seconds=end - arrival,
            tokens=self._tokens,
            paths=paths.get(self.engine_id, ()),
        )


class CallTimes:
    """One call as it goes on.

    Attributes:
        choices: its answers, once they are planned.
        outcome: see `CallTrace`.
    """

    def __init__(self, call: GenerateCall, arrival: float, clock: Callable[[], float]) -> None:
        """A call was let in that came at `arrival`."""
        self.request_id = call.request_id
        self.choices: list[ChoiceTimes] = []
        self.outcome = "running"
        self._model, self._version, self._prompt_tokens = call.model, 0, 0
        self._arrival = arrival
        self._clock = clock
        self._resolved: float | None = None
        self._tokenised: float | None = None
        self._end: float | None = None

    def resolve(self, model: str, version: int) -> None:
        """The variant has been found."""
        self._model, self._version, self._resolved = model, version, self._clock()

    def tokenise(self, prompt_tokens: int) -> None:
        """The prompt has become token ids."""
        self._prompt_tokens, self._tokenised = prompt_tokens, self._clock()

    def choice(self, engine_id: str) -> ChoiceTimes:
        """One more answer is planned."""
        self.choices.append(ChoiceTimes(engine_id, self._clock))
        return self.choices[-1]

    def finish(self, outcome: str) -> None:
        """It has ended; a caller may leave as soon as it has the last token, which is an end as any other."""
        is_whole = bool(self.choices) and all(choice.is_finished for choice in self.choices)
        self.outcome = "finished" if is_whole else outcome
        self._end = self._clock()

    def is_named(self, request_id: str) -> bool:
        """Whether its caller, or a worker's log, calls it so."""
        return request_id == self.request_id or any(one.engine_id == request_id for one in self.choices)

    def trace(self, paths: Mapping[str, tuple[PathTrace, ...]]) -> CallTrace:
        """Everything known of it."""
        now = self._clock()
        end = now if self._end is None else self._end
        resolved = end if self._resolved is None else self._resolved
        tokenised = end if self._tokenised is None else self._tokenised
        return CallTrace(
            request_id=self.request_id,
            model=self._model,
            version=self._version,
            prompt_tokens=self._prompt_tokens,
            outcome=self.outcome,
            resolving=resolved - self._arrival,
            tokenising=tokenised - resolved,
            seconds=end - self._arrival,
            age=now - self._arrival,
            choices=tuple(
                choice.trace(number, self._arrival, end, paths) for number, choice in enumerate(self.choices)
            ),
        )


class TraceBook:
    """The calls of one router. One event loop."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Remember `limit` ended calls at most."""
        self._clock = clock
        self._recent: Recent[int, CallTimes] = Recent(limit)
        self._count = 0

    @contextmanager
    def follow(self, call: GenerateCall, arrival: float) -> Iterator[CallTimes]:
        """One call from its admission to its end, whatever that is."""
        number = self._count = self._count + 1
        times, outcome = CallTimes(call, arrival, self._clock), "finished"
        self._recent.begin(number, times)
        try:
            yield times
        except BlockzooError as error:
            outcome = error.reason
            raise
        except (GeneratorExit, asyncio.CancelledError):
            outcome = "cancelled"
            raise
        except Exception:
            outcome = BlockzooError.reason
            raise
        finally:
            times.finish(outcome)
            self._recent.end(number)

    async def trace(self, request_id: str, engine: Engine) -> tuple[CallTrace, ...]:
        """The calls of an id, oldest first, with what the engine knows of them.

        Args:
            request_id: as its caller named it, or as a worker's log does.
            engine: that runs the requests; the paths are left out where it remembers none.

        Raises:
            RequestNotFoundError: no call of this id is remembered.
        """
        calls = [times for _, times in self._recent.items() if times.is_named(request_id)][-MAX_CALLS:]
        if not calls:
            raise self._not_found(request_id)
        names = [choice.engine_id for times in calls for choice in times.choices]
        paths = await engine.trace(names) if isinstance(engine, TracesRequests) else {}
        return tuple(times.trace(paths) for times in calls)

    def _not_found(self, request_id: str) -> RequestNotFoundError:
        kept = len(self._recent)
        return RequestNotFoundError(
            f"this server remembers no request {request_id!r}",
            hint=f"This server remembers its running requests and the last {self._recent.limit} that ended "
            f"(router.traced_requests), {kept} now. Another router may have taken the call.",
            request_id=request_id,
            kept=kept,
        )
