"""The one place where errors become gRPC statuses, and statuses errors.

Going out, an error is a `google.rpc.Status` with an `ErrorInfo` (reason, domain
"blockzoo", the ids in the error's metadata, the hint), a `RetryInfo` where trying
again helps, and a `BadRequest` where a request field is at fault. Coming in, the reason
names the class, and the details give back its attributes. `blockproto.v1` declares
these messages field for field as google.rpc does; on the wire they carry the names of the originals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message

from blockproto.v1 import errors_pb2
from blockserve.common import errors as serve_errors
from blockserve.common.errors import (
    BreakCause,
    CapacityError,
    NoLeaderError,
    NoPathError,
    PathBrokenError,
    RemoteError,
    SamplingError,
    ServerStoppingError,
)
from blockzoo import errors as zoo_errors
from blockzoo.errors import (
    BlockzooError,
    InvalidInputError,
    UnsupportedArchitectureError,
    VariantNotFoundError,
)

M = TypeVar("M", bound=Message)

DOMAIN = "blockzoo"
DETAILS_KEY = "grpc-status-details-bin"

# Trailers share 8 KiB, beyond which gRPC may replace the status by another. Two can be long: the message,
# whose bytes outside ASCII take three each (nine for a Chinese character), and the details in base64.
MAX_HEADER_BYTES = 1536
"""The message as it is encoded in the trailers; programs find more of it in the details."""
MAX_DETAILS_BYTES = 3840
"""The details before base64 adds a third."""
MAX_VALUES = 12
_LIMITS = ((1024, 256), (640, 96), (320, 48))
"""UTF-8 bytes of a message and of a value in the details; the first that stay within the whole."""

_Code = grpc.StatusCode

_RETRYABLE = (CapacityError, ServerStoppingError, PathBrokenError, NoPathError, NoLeaderError)
"""Classes that say in `retry_after` when trying again makes sense."""

STATUS: Mapping[type[BlockzooError], grpc.StatusCode] = {
    BlockzooError: _Code.INTERNAL,
    # The caller has to change the call.
    zoo_errors.InvalidInputError: _Code.INVALID_ARGUMENT,
    zoo_errors.InvalidNameError: _Code.INVALID_ARGUMENT,
    zoo_errors.CurrentVersionError: _Code.FAILED_PRECONDITION,
    zoo_errors.NoOlderVersionError: _Code.FAILED_PRECONDITION,
    zoo_errors.InvalidManifestError: _Code.INVALID_ARGUMENT,
    zoo_errors.CheckpointError: _Code.INVALID_ARGUMENT,
    zoo_errors.TruncatedFileError: _Code.INVALID_ARGUMENT,
    zoo_errors.PickleRefusedError: _Code.INVALID_ARGUMENT,
    zoo_errors.NonFiniteWeightsError: _Code.INVALID_ARGUMENT,
    zoo_errors.MissingShardError: _Code.INVALID_ARGUMENT,
    zoo_errors.PathEscapeError: _Code.INVALID_ARGUMENT,
    zoo_errors.TensorMismatchError: _Code.INVALID_ARGUMENT,
    zoo_errors.InvalidConfigError: _Code.INVALID_ARGUMENT,
    zoo_errors.UnsupportedArchitectureError: _Code.INVALID_ARGUMENT,
    zoo_errors.UnsupportedFeatureError: _Code.INVALID_ARGUMENT,
    zoo_errors.AdapterError: _Code.INVALID_ARGUMENT,
    zoo_errors.AdapterBaseMismatchError: _Code.INVALID_ARGUMENT,
    zoo_errors.UnknownTargetError: _Code.INVALID_ARGUMENT,
    zoo_errors.UnsupportedAdapterError: _Code.INVALID_ARGUMENT,
    zoo_errors.IncompatibleBlocksError: _Code.INVALID_ARGUMENT,
    zoo_errors.EvaluationError: _Code.INVALID_ARGUMENT,
    zoo_errors.NotEquivalentError: _Code.FAILED_PRECONDITION,
    serve_errors.PromptError: _Code.INVALID_ARGUMENT,
    serve_errors.EmptyPromptError: _Code.INVALID_ARGUMENT,
    serve_errors.PromptTooLongError: _Code.INVALID_ARGUMENT,
    serve_errors.SamplingError: _Code.INVALID_ARGUMENT,
    serve_errors.ChatTemplateError: _Code.INVALID_ARGUMENT,
    serve_errors.ResumeError: _Code.INVALID_ARGUMENT,
    serve_errors.UnknownBlobError: _Code.INVALID_ARGUMENT,
    serve_errors.WrongDigestError: _Code.INVALID_ARGUMENT,
    serve_errors.ConfigurationError: _Code.FAILED_PRECONDITION,
    serve_errors.UnauthenticatedError: _Code.UNAUTHENTICATED,
    serve_errors.PossessionError: _Code.PERMISSION_DENIED,
    serve_errors.UnregisteredRefusedError: _Code.PERMISSION_DENIED,
    # What was named is not there.
    zoo_errors.NotFoundError: _Code.NOT_FOUND,
    zoo_errors.VariantNotFoundError: _Code.NOT_FOUND,
    zoo_errors.EquivalenceNotFoundError: _Code.NOT_FOUND,
    zoo_errors.HubModelNotFoundError: _Code.NOT_FOUND,
    zoo_errors.ZooNotFoundError: _Code.NOT_FOUND,
    serve_errors.PushNotFoundError: _Code.NOT_FOUND,
    # A manifest names them, so their absence is damage, not a wrong name.
    zoo_errors.BlobNotFoundError: _Code.DATA_LOSS,
    zoo_errors.ManifestNotFoundError: _Code.DATA_LOSS,
    zoo_errors.CorruptionError: _Code.DATA_LOSS,
    zoo_errors.CorruptBlobError: _Code.DATA_LOSS,
    zoo_errors.CorruptManifestError: _Code.DATA_LOSS,
    # The caller may try again.
    zoo_errors.ConflictError: _Code.ABORTED,
    zoo_errors.StorageError: _Code.UNAVAILABLE,
    zoo_errors.HubUnreachableError: _Code.UNAVAILABLE,
    serve_errors.CapacityError: _Code.RESOURCE_EXHAUSTED,
    serve_errors.QueueFullError: _Code.RESOURCE_EXHAUSTED,
    serve_errors.KvCapacityError: _Code.RESOURCE_EXHAUSTED,
    serve_errors.MemoryBudgetError: _Code.RESOURCE_EXHAUSTED,
    serve_errors.DeadlineTooShortError: _Code.RESOURCE_EXHAUSTED,
    serve_errors.PushCapacityError: _Code.RESOURCE_EXHAUSTED,
    serve_errors.ExportCapacityError: _Code.RESOURCE_EXHAUSTED,
    serve_errors.PushInterruptedError: _Code.UNAVAILABLE,
    serve_errors.ExportInterruptedError: _Code.UNAVAILABLE,
    serve_errors.ServerStoppingError: _Code.UNAVAILABLE,
    serve_errors.UnavailableError: _Code.UNAVAILABLE,
    serve_errors.DeadlineExceededError: _Code.DEADLINE_EXCEEDED,
    # The operator has to do something.
    zoo_errors.StorageFullError: _Code.RESOURCE_EXHAUSTED,
    zoo_errors.ClockSkewError: _Code.FAILED_PRECONDITION,
    zoo_errors.UnsupportedStoreError: _Code.FAILED_PRECONDITION,
    zoo_errors.FormatVersionError: _Code.FAILED_PRECONDITION,
    zoo_errors.MissingPackageError: _Code.FAILED_PRECONDITION,
    serve_errors.ChainNotLoadedError: _Code.FAILED_PRECONDITION,
    serve_errors.LocalClusterError: _Code.FAILED_PRECONDITION,
    serve_errors.EngineFailedError: _Code.INTERNAL,
    serve_errors.NonFiniteLogitsError: _Code.INTERNAL,
    serve_errors.PathBrokenError: _Code.UNAVAILABLE,
    serve_errors.WireError: _Code.FAILED_PRECONDITION,
    serve_errors.WorkerNotFoundError: _Code.NOT_FOUND,
    serve_errors.RequestNotFoundError: _Code.NOT_FOUND,
    serve_errors.SpanError: _Code.INVALID_ARGUMENT,
    serve_errors.NoPathError: _Code.UNAVAILABLE,
    serve_errors.NoLeaderError: _Code.UNAVAILABLE,
    serve_errors.StateStoreError: _Code.UNAVAILABLE,
    serve_errors.StaleLeaderError: _Code.ABORTED,
    serve_errors.RemoteError: _Code.INTERNAL,
}
"""Every error class and its status. A test holds it complete, so a new class has to be thought about."""


def status_code(error: BlockzooError) -> grpc.StatusCode:
    """The status of an error: its own entry, or that of the nearest class it inherits from."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def pack(message: Message) -> any_pb2.Any:
    """A message of `blockproto.v1.errors_pb2` under the name of its original in google.rpc."""
    url = f"type.googleapis.com/google.rpc.{message.DESCRIPTOR.name}"
    return any_pb2.Any(type_url=url, value=message.SerializeToString())


def unpack(packed: any_pb2.Any, kind: type[M]) -> M | None:
    """The inverse of `pack`; None when something else is packed."""
    if packed.TypeName() != f"google.rpc.{kind.DESCRIPTOR.name}":
        return None
    return kind.FromString(packed.value)


def to_status(error: BlockzooError) -> errors_pb2.Status:
    """The error as a `google.rpc.Status` whose details a program can read; at most MAX_DETAILS_BYTES."""
    for message_bytes, value_bytes in _LIMITS:
        status = _status(error, message_bytes, value_bytes)
        if status.ByteSize() <= MAX_DETAILS_BYTES:
            break
    return status


def header_message(status: errors_pb2.Status) -> str:
    """The status's message, as much of it as the trailers hold."""
    return _clip(status.message, MAX_HEADER_BYTES, _encoded_bytes)


def _status(error: BlockzooError, message_bytes: int, value_bytes: int) -> errors_pb2.Status:
    message = _clip(str(error), message_bytes)
    status = errors_pb2.Status(code=status_code(error).value[0], message=message)
    metadata = _metadata(error, message_bytes, value_bytes)
    status.details.append(pack(errors_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)))
    if isinstance(error, _RETRYABLE) and error.retry_after > 0:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(max(1, round(error.retry_after * 1000)))
        status.details.append(pack(errors_pb2.RetryInfo(retry_delay=delay)))
    if isinstance(error, InvalidInputError) and (field := error.metadata.get("field")):
        violation = errors_pb2.BadRequest.FieldViolation(field=_clip(field, value_bytes), description=message)
        status.details.append(pack(errors_pb2.BadRequest(field_violations=[violation])))
    return status


def _metadata(error: BlockzooError, message_bytes: int, value_bytes: int) -> dict[str, str]:
    values = dict(error.metadata)
    for name in ("suggestions", "supported"):
        if listed := getattr(error, name, ()):
            values[name] = ", ".join(listed)
    if error.hint:
        values["hint"] = error.hint
    # The hint and the lists are last in and must survive; ids beyond the bound are dropped oldest first.
    kept = list(values.items())[-MAX_VALUES:]
    return {key: _clip(value, value_bytes if key != "hint" else message_bytes) for key, value in kept}


def _clip(text: str, limit: int, size: Callable[[str], int] = lambda text: len(text.encode())) -> str:
    """A text of at most `limit` bytes by some encoding; lone surrogates, which none has, are replaced."""
    text = text.encode(errors="replace").decode()
    if size(text) <= limit:
        return text
    left, end = limit - size("…"), 0
    for end, char in enumerate(text):  # noqa: B007 - the last one that fits
        left -= size(char)
        if left < 0:
            break
    return text[:end] + "…"


def _encoded_bytes(text: str) -> int:
    """Bytes of a text in a `grpc-message` trailer (PROTOCOL-HTTP2.md of gRPC: percent-encoding)."""
    return sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in text.encode())


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
            and (rebuilt := _rebuild(errors_pb2.Status.FromString(value), code)) is not None
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


def from_status(status: errors_pb2.Status) -> BlockzooError:
    """The typed error that a status carried inside a message stands for; see `to_status`."""
    code = next((one for one in _Code if one.value[0] == status.code), _Code.UNKNOWN)
    return _rebuild(status, code) or RemoteError(status.message, code=code.name)


def _rebuild(status: errors_pb2.Status, code: grpc.StatusCode) -> BlockzooError | None:
    info, retry = errors_pb2.ErrorInfo(), errors_pb2.RetryInfo()
    for detail in status.details:
        info = unpack(detail, errors_pb2.ErrorInfo) or info
        retry = unpack(detail, errors_pb2.RetryInfo) or retry
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
    if isinstance(error, _RETRYABLE):
        error.retry_after = retry_after
    if isinstance(error, PathBrokenError):
        error.cause = _break_cause(metadata.get("cause", ""))
        error.worker = metadata.get("worker", "")
        error.seen_by = metadata.get("seen_by", "")
    elif isinstance(error, SamplingError):
        error.field = metadata.get("field", "")
    elif isinstance(error, VariantNotFoundError):
        error.suggestions = _split(metadata.get("suggestions", ""))
    elif isinstance(error, UnsupportedArchitectureError):
        error.supported = _split(metadata.get("supported", ""))


def _break_cause(name: str) -> BreakCause:
    """A cause by its name; one that an earlier version left out, or a later one has added, means LOST."""
    try:
        return BreakCause(name)
    except ValueError:
        return BreakCause.LOST


def _split(listed: str) -> tuple[str, ...]:
    return tuple(listed.split(", ")) if listed else ()


def all_errors(root: type[BlockzooError] = BlockzooError) -> Iterator[type[BlockzooError]]:
    """`root` and every class below it that has been imported."""
    yield root
    for cls in root.__subclasses__():
        yield from all_errors(cls)
