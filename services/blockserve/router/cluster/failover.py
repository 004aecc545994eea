"""What happens to a request whose path breaks: a state machine without I/O and without a clock.

`ClusterEngine.generate` drives it. It asks for the request as the next path gets it (`attempt`), passes on
what workers send (`take`), and reports a broken path (`fail`), which is answered with the next step: another
path after a pause (`Retry`), or the error that the caller gets (`GiveUp`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from blockserve.common.api.cluster import PathStep, WorkerId
from blockserve.common.api.engine import EngineRequest, TokenEvent
from blockserve.common.errors import (
    UNREADABLE,
    BreakCause,
    ChainNotLoadedError,
    DeadlineExceededError,
    EngineFailedError,
    PathBrokenError,
    ServerStoppingError,
)
from blockserve.common.settings import Section, setting
from blockzoo.errors import BlockzooError, CorruptionError

RETRYABLE = (PathBrokenError, ServerStoppingError, ChainNotLoadedError, EngineFailedError, *UNREADABLE)
"""Errors that another path may cure."""
MAX_FAULTS = 1
"""Failed passes that a request survives: a second one, at another worker, is probably its own doing. Damaged
blocks count as well: what two workers find damaged is damaged in the zoo."""


class FailoverConfig(Section):
    """How a request goes on when a worker is lost."""

    max_failures: int = setting(
        8,
        "Number of broken paths after which a request fails.",
        reason="More than a rolling restart of a small cluster breaks, and few enough to stop a request "
        "that crashes workers.",
        ge=0,
        le=100,
    )
    backoff_seconds: float = setting(
        0.05,
        "Pause after the second break in a row, doubled for each further one.",
        unit="seconds",
        reason="After the first break a request continues at once; further breaks may have a common "
        "cause that passes.",
        ge=0,
    )
    path_seconds: float = setting(
        30.0,
        "How long a request waits until live workers hold its whole variant.",
        unit="seconds",
        reason="Reading a variant of several GB from a disk takes less.",
        ge=0,
    )


@dataclass(frozen=True, slots=True)
class Retry:
    """The request goes on along another path.

    Attributes:
        pause_seconds: how long to wait before the path is chosen.
        parted: a worker, and the worker that it cannot reach; None where no worker noticed the break.
    """

    pause_seconds: float = 0.0
    parted: tuple[WorkerId, WorkerId] | None = None


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The request ends.

    Attributes:
        error: for the caller.
    """

    error: BlockzooError


class Failover:
    """One request over all of its paths.

    Attributes:
        request: as the engine was given it.
        tokens: output tokens so far; those that the request came with are the first.
        failures: paths that have broken.
        faults: how many of them by a failed pass or by damaged blocks.
        excluded: workers that the next path should avoid; the driver removes those that turn out to live.
        previous: the path that broke last; empty before the first break.
        lost: the worker of `previous` that keys and values cannot be fetched from; None where all answer.
    """

    def __init__(self, request: EngineRequest, config: FailoverConfig) -> None:
        """Begin before the first path."""
        self.request = request
        self.tokens = list(request.output)
        self.failures = self.faults = 0
        self.excluded: set[WorkerId] = set()
        self.previous: tuple[PathStep, ...] = ()
        self.lost: WorkerId | None = None
        self._path: tuple[PathStep, ...] = ()
        self._config = config

    @property
    def epoch(self) -> int:
        """Number of the current path; workers that know a higher one drop the request."""
        return self.request.epoch + self.failures

    def attempt(self, path: tuple[PathStep, ...]) -> EngineRequest:
        """The request as the workers of a path get it, with every token so far."""
        self._path = path
        return replace(self.request, output=tuple(self.tokens), path=path, epoch=self.epoch)

    def take(self, events: Sequence[TokenEvent]) -> Sequence[TokenEvent]:
        """Record what the current path sent.

        Args:
            events: consecutive tokens, at least one.

        Returns:
            Those that the caller has not been given; a new path may repeat some.

        Raises:
            EngineFailedError: a token was skipped.
        """
        known = len(self.tokens)
        fresh = events if events[0].index == known else _fresh(events, known)
        self.tokens.extend([event.token_id for event in fresh])
        return fresh

    def fail(self, error: BlockzooError, now: float) -> Retry | GiveUp:
        """The current path broke.

        Args:
            error: one of `RETRYABLE`.
            now: `time.monotonic()` value, as the request's deadline.
        """
        if self.failures == self._config.max_failures:
            return GiveUp(error)
        is_fault = isinstance(error, EngineFailedError | CorruptionError)
        if is_fault and self.faults == MAX_FAULTS:
            return GiveUp(error)
        if (late := self.overdue(now)) is not None:
            return GiveUp(late)
        pause = self._config.backoff_seconds * 2 ** (self.failures - 1) if self.failures else 0.0
        self.failures += 1
        self.previous = self._path
        self.excluded.clear()
        self.lost = None
        self.faults += is_fault
        if isinstance(error, UNREADABLE):
            # What it holds is sound, so keys and values can still be fetched from it.
            self.excluded.add(self.faulty(error))
            return Retry(pause)
        if isinstance(error, EngineFailedError):
            # What it has in its caches may be as wrong as what it computes.
            self.lost = self.faulty(error)
            self.excluded.add(self.lost)
            return Retry(pause)
        if not isinstance(error, PathBrokenError) or not error.worker:
            return Retry(pause)
        worker = WorkerId(error.worker)
        self.excluded.add(worker)
        if error.cause is not BreakCause.DRAINING:
            self.lost = worker
        return Retry(pause, (WorkerId(error.seen_by), worker) if error.seen_by else None)

    def faulty(self, error: BlockzooError) -> WorkerId:
        """The worker of the current path that failed; where the error names none, it is the head."""
        return WorkerId(error.metadata.get("worker") or self._path[0].worker)

    def overdue(self, now: float) -> DeadlineExceededError | None:
        """The error of a request whose deadline has passed; None while there is time."""
        deadline = self.request.deadline
        if deadline is None or now < deadline:
            return None
        return DeadlineExceededError("the deadline passed while the request changed workers")


def _fresh(events: Sequence[TokenEvent], known: int) -> Sequence[TokenEvent]:
    fresh = [event for event in events if event.index >= known]
    if fresh and fresh[0].index != known:
        raise EngineFailedError(f"token {fresh[0].index} came where {known} was expected")
    return fresh
