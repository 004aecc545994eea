"""The way back from a gRPC status to the typed error it stands for (see `status` for the way there)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from blockserve.common import errors as serve_errors
from blockserve.common.errors import (
    CapacityError,
    NoPathError,
    PathBrokenError,
    RemoteError,
    SamplingError,
    ServerStoppingError,
)
from blockserve.common.wire.errors import DETAILS_KEY, DOMAIN, all_errors
from blockzoo.errors import BlockzooError, UnsupportedArchitectureError, VariantNotFoundError

_Code = grpc.StatusCode


def from_rpc_error(error: grpc.RpcError) -> BlockzooError:
    """The typed error a failed call stands for.

    Args:
        error: what grpc raised (sync or aio); it has `code`, `details` and `trailing_metadata`.
    """
    call: Any = error
    code: grpc.StatusCode = call.code()
    message = call.details() or code.name
    for key, value in call.trailing_metadata() or ():
        if (
            key == DETAILS_KEY
            and (rebuilt := _rebuild(status_pb2.Status.FromString(value), code)) is not None
        ):
            return rebuilt
    if code is _Code.UNAVAILABLE:
        hint = "Is the server running, and is the address right?"
        return serve_errors.UnavailableError(message, code=code.name, hint=hint)
    if code is _Code.DEADLINE_EXCEEDED:
        return serve_errors.DeadlineExceededError(
            "the deadline passed", hint="Ask for less, or give more time."
        )
    if code is _Code.UNAUTHENTICATED:
        return serve_errors.UnauthenticatedError(message)
    return RemoteError(message, code=code.name)


def from_status(status: status_pb2.Status) -> BlockzooError:
    """The typed error that a status carried inside a message stands for; see `status.to_status`."""
    code = next((one for one in _Code if one.value[0] == status.code), _Code.UNKNOWN)
    return _rebuild(status, code) or RemoteError(status.message, code=code.name)


def _rebuild(status: status_pb2.Status, code: grpc.StatusCode) -> BlockzooError | None:
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status.details:
        for known in (info, retry):
            if detail.Is(known.DESCRIPTOR):
                detail.Unpack(known)
    if info.domain != DOMAIN:
        return None
    metadata = dict(info.metadata)
    hint = metadata.pop("hint", "")
    cls = _by_reason().get(info.reason)
    if cls is None or issubclass(cls, RemoteError):
        # A fault inside the server, or a kind of error this client is too old to know.
        remote = RemoteError(status.message, code=code.name, hint=hint)
        remote.metadata = {**metadata, "code": code.name, "remote_reason": info.reason}
        return remote
    # Constructors differ from class to class and make messages of their own; the message is already made.
    rebuilt = cls.__new__(cls)
    BlockzooError.__init__(rebuilt, status.message, hint=hint)
    rebuilt.metadata = metadata
    _restore(rebuilt, metadata, retry.retry_delay.ToMilliseconds() / 1000)
    return rebuilt


def _by_reason() -> Mapping[str, type[BlockzooError]]:
    # A class that declares no reason of its own is no kind of its own.
    return {cls.reason: cls for cls in all_errors() if cls is not BlockzooError and "reason" in vars(cls)}


def _restore(error: BlockzooError, metadata: Mapping[str, str], retry_after: float) -> None:
    """Set the attributes that some classes carry beside the metadata."""
    if isinstance(error, CapacityError | ServerStoppingError | PathBrokenError | NoPathError):
        error.retry_after = retry_after
    elif isinstance(error, SamplingError):
        error.field = metadata.get("field", "")
    elif isinstance(error, VariantNotFoundError):
        error.suggestions = _split(metadata.get("suggestions", ""))
    elif isinstance(error, UnsupportedArchitectureError):
        error.supported = _split(metadata.get("supported", ""))


def _split(listed: str) -> tuple[str, ...]:
    return tuple(listed.split(", ")) if listed else ()
