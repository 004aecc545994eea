"""Calls of `ZooService` from threads: typed errors, a deadline on each, and how to go on after a break."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import grpc

from blockproto.v1 import zoo_pb2_grpc
from blockserve.common.errors import (
    CapacityError,
    DeadlineExceededError,
    NoLeaderError,
    PushInterruptedError,
    PushNotFoundError,
    RemoteError,
    ServerStoppingError,
)
from blockserve.common.rpc.channel import Credentials, open_blocking_channel
from blockserve.common.wire.errors import from_rpc_error
from blockzoo.errors import BlockzooError, ConflictError

T = TypeVar("T")

CALL_SECONDS = 120.0
"""Deadline of a call that looks something up; a large zoo on object storage takes its time."""

OPERATION_SECONDS = 24 * 3600.0
"""Deadline of gc and verify, which read and delete a whole zoo."""

STREAM_SECONDS = 600.0
"""Deadline of a call that carries tensors. A call that takes longer is cut off and resumed."""

FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 2.0

_BROKEN_CODES = ("CANCELLED", "UNKNOWN", "INTERNAL", "UNAVAILABLE")
"""What gRPC says of connections that broke, when the server itself said nothing."""


def pause_for(seconds: float) -> None:
    """Wait before trying again."""
    time.sleep(seconds)


class Calls:
    """A connection to the `ZooService` of one server."""

    def __init__(self, target: str, credentials: Credentials) -> None:
        """Prepare; nothing is sent yet.

        Raises:
            ConfigurationError: a token would travel readable, or a file cannot be read.
        """
        self.target = target
        self._channel = open_blocking_channel(target, credentials)
        self._metadata = credentials.metadata()
        self._stub = zoo_pb2_grpc.ZooServiceStub(self._channel)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def call(self, method: str, request: Any, *, timeout: float = CALL_SECONDS) -> Any:
        """Make one call; the request is a message, or an iterator of messages.

        Raises:
            BlockzooError: as the server raised it, or UnavailableError and its like.
        """
        try:
            return getattr(self._stub, method)(request, metadata=self._metadata, timeout=timeout)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def stream(
        self, method: str, request: Any, *, timeout: float = CALL_SECONDS
    ) -> Generator[Any, None, None]:
        """Make one call that is answered by many messages; leaving it cancels it."""
        rpc = getattr(self._stub, method)(request, metadata=self._metadata, timeout=timeout)
        try:
            yield from rpc
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        finally:
            rpc.cancel()


def is_broken(error: BlockzooError) -> bool:
    """Whether the same may succeed on another connection, or a little later."""
    if isinstance(
        error, ServerStoppingError | NoLeaderError | DeadlineExceededError | PushNotFoundError | ConflictError
    ):
        return True
    if isinstance(error, CapacityError):
        return error.retry_after > 0
    if isinstance(error, RemoteError):
        return error.code in _BROKEN_CODES and "remote_reason" not in error.metadata
    return False


GaveUp = Callable[[float, BlockzooError], BlockzooError]
"""Makes the error that says for how long nothing has moved, and why."""


def push_interrupted(seconds: float, error: BlockzooError) -> PushInterruptedError:
    """The error of a push that gives up."""
    return PushInterruptedError(
        f"the push made no progress for {seconds:g} s: {error}",
        hint="Run the command again when the server is back; data that the server has is not sent again.",
    )


class Patience:
    """How long to go on trying while nothing moves.

    Args:
        seconds: from the last progress to giving up.
        gave_up: makes the error that is raised then.
    """

    def __init__(self, seconds: float, gave_up: GaveUp = push_interrupted) -> None:
        self._seconds = seconds
        self._gave_up = gave_up
        self._moved = time.monotonic()
        self._failures = 0

    def progress(self) -> None:
        """Something moved."""
        self._moved = time.monotonic()
        self._failures = 0

    def attempt(self, act: Callable[[], T]) -> T:
        """Do something until it succeeds, with growing pauses.

        Raises:
            PushInterruptedError: the connection stayed broken for too long (or what `gave_up` makes of it).
            BlockzooError: any error that trying again does not help.
        """
        self.progress()
        while True:
            try:
                return act()
            except BlockzooError as error:
                if not is_broken(error):
                    raise
                pause = min(FIRST_BACKOFF_S * 2**self._failures, MAX_BACKOFF_S)
                if isinstance(error, CapacityError):
                    pause = max(pause, error.retry_after)
                if time.monotonic() - self._moved + pause > self._seconds:
                    raise self._gave_up(self._seconds, error) from error
                self._failures += 1
                pause_for(pause)
