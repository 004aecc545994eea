"""What the workers of one path tell each other. Frozen values; `peers.convert` knows how they travel.

A request is opened along its path, worker by worker: each sets pages aside, or says that it cannot now. When
the last one has them, the first (the head worker) begins to compute; hidden states travel forward in chunks,
the tail worker's tokens straight back to the head worker.

`AttemptId` tells one opening from all others. Whatever names an older one is dropped, so a worker that was
stopped and wakes up cannot add anything to a request that has gone on without it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from blockserve.common.api.engine import EngineRequest, TokenEvent
from blockzoo.errors import BlockzooError


@dataclass(frozen=True, slots=True, order=True)
class AttemptId:
    """One opening of a request's path.

    Attributes:
        request_id: of the request.
        epoch: number of the path; given by whoever chose the path.
        attempt: number of the opening of that path; given by its head worker.
    """

    request_id: str
    epoch: int
    attempt: int

    @property
    def age(self) -> tuple[int, int]:
        """Larger is newer, among attempts of one request."""
        return self.epoch, self.attempt


@dataclass(frozen=True, slots=True)
class OpenMsg:
    """Forward: set pages aside for a request.

    Attributes:
        id: the attempt.
        request: with the tokens that have been sampled, in `output`.
        place: index of the receiver on `request.path`.
        have: prompt tokens that everyone before has in the prefix cache.
    """

    id: AttemptId
    request: EngineRequest
    place: int
    have: int


@dataclass(frozen=True, slots=True)
class ReadyMsg:
    """Tail to head: everyone has pages, and the first `have` tokens cached."""

    id: AttemptId
    have: int


@dataclass(frozen=True, slots=True)
class BusyMsg:
    """Follower to head: no pages now; try again later."""

    id: AttemptId


@dataclass(frozen=True, slots=True)
class ChunkMsg:
    """Forward: hidden states of tokens start .. start + len(token_ids) - 1.

    Attributes:
        id: the attempt.
        place: index of the receiver on the path.
        start: position of the first token.
        token_ids: the tokens.
        hidden: [tokens, hidden].
    """

    id: AttemptId
    place: int
    start: int
    token_ids: tuple[int, ...]
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class TokenMsg:
    """Tail to head: the next token."""

    id: AttemptId
    event: TokenEvent


@dataclass(frozen=True, slots=True)
class RestartMsg:
    """Follower to head: the pages of this request were needed for another; open it anew."""

    id: AttemptId


@dataclass(frozen=True, slots=True)
class FailMsg:
    """Follower to head: the request has failed here."""

    id: AttemptId
    error: BlockzooError


@dataclass(frozen=True, slots=True)
class CloseMsg:
    """Head to follower: this attempt is over."""

    id: AttemptId


ToFollower = OpenMsg | ChunkMsg | CloseMsg
"""What a follower takes."""
ToHead = ReadyMsg | BusyMsg | TokenMsg | RestartMsg | FailMsg
"""What a head worker takes."""
SpanMsg = ToFollower | ToHead
"""Everything that workers tell each other about requests."""
