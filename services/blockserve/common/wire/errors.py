"""The one place where errors become gRPC statuses.

Going out, an error is a `google.rpc.Status` with an `ErrorInfo` (reason, domain
"blockzoo", the ids in the error's metadata, the hint), a `RetryInfo` where trying
again helps, and a `BadRequest` where a request field is at fault. `rpc_errors` is the way back.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing
from typing import Any, NoReturn, TypeAlias

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2

from blockserve.common import errors as serve_errors
from blockserve.common.errors import CapacityError, NoPathError, PathBrokenError, ServerStoppingError
from blockzoo import errors as zoo_errors
from blockzoo.errors import BlockzooError, InvalidInputError

log = logging.getLogger(__name__)

DOMAIN = "blockzoo"
DETAILS_KEY = "grpc-status-details-bin"

# Trailers share one header frame limited to 8 KiB, so nothing a caller can make long goes in whole.
MAX_MESSAGE_CHARS = 1024
MAX_VALUE_CHARS = 256
MAX_VALUES = 12

_Code = grpc.StatusCode
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

STATUS: Mapping[type[BlockzooError], grpc.StatusCode] = {
    BlockzooError: _Code.INTERNAL,
    # The caller has to change the call.
    zoo_errors.InvalidInputError: _Code.INVALID_ARGUMENT,
    zoo_errors.InvalidNameError: _Code.INVALID_ARGUMENT,
    zoo_errors.CurrentVersionError: _Code.FAILED_PRECONDITION,
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
    # What was named is not there.
    zoo_errors.NotFoundError: _Code.NOT_FOUND,
    zoo_errors.VariantNotFoundError: _Code.NOT_FOUND,
    zoo_errors.EquivalenceNotFoundError: _Code.NOT_FOUND,
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
    serve_errors.CapacityError: _Code.RESOURCE_EXHAUSTED,
    serve_errors.QueueFullError: _Code.RESOURCE_EXHAUSTED,
    serve_errors.KvCapacityError: _Code.RESOURCE_EXHAUSTED,
    serve_errors.MemoryBudgetError: _Code.RESOURCE_EXHAUSTED,
    serve_errors.DeadlineTooShortError: _Code.RESOURCE_EXHAUSTED,
    serve_errors.PushCapacityError: _Code.RESOURCE_EXHAUSTED,
    serve_errors.PushInterruptedError: _Code.UNAVAILABLE,
    serve_errors.ServerStoppingError: _Code.UNAVAILABLE,
    serve_errors.UnavailableError: _Code.UNAVAILABLE,
    serve_errors.DeadlineExceededError: _Code.DEADLINE_EXCEEDED,
    # The operator has to do something.
    zoo_errors.StorageFullError: _Code.RESOURCE_EXHAUSTED,
    zoo_errors.UnsupportedStoreError: _Code.FAILED_PRECONDITION,
    zoo_errors.FormatVersionError: _Code.FAILED_PRECONDITION,
    zoo_errors.MissingPackageError: _Code.FAILED_PRECONDITION,
    serve_errors.ChainNotLoadedError: _Code.FAILED_PRECONDITION,
    serve_errors.LocalClusterError: _Code.FAILED_PRECONDITION,
    serve_errors.EngineFailedError: _Code.INTERNAL,
    serve_errors.PathBrokenError: _Code.UNAVAILABLE,
    serve_errors.WireError: _Code.FAILED_PRECONDITION,
    serve_errors.WorkerNotFoundError: _Code.NOT_FOUND,
    serve_errors.RequestNotFoundError: _Code.NOT_FOUND,
    serve_errors.SpanError: _Code.INVALID_ARGUMENT,
    serve_errors.NoPathError: _Code.UNAVAILABLE,
    serve_errors.StateStoreError: _Code.UNAVAILABLE,
    serve_errors.StaleLeaderError: _Code.ABORTED,
    serve_errors.RemoteError: _Code.INTERNAL,
}
"""Every error class and its status. A test holds it complete, so a new class has to be thought about."""


def status_code(error: BlockzooError) -> grpc.StatusCode:
    """The status of an error: its own entry, or that of the nearest class it inherits from."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def to_status(error: BlockzooError) -> status_pb2.Status:
    """The error as a `google.rpc.Status` whose details a program can read."""
    status = status_pb2.Status(
        code=code_pb2.Code.Value(status_code(error).name), message=_clip(str(error), MAX_MESSAGE_CHARS)
    )
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=_metadata(error))
    status.details.add().Pack(info)
    if (
        isinstance(error, CapacityError | ServerStoppingError | PathBrokenError | NoPathError)
        and error.retry_after > 0
    ):
        delay = Duration()
        delay.FromMilliseconds(max(1, round(error.retry_after * 1000)))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    if isinstance(error, InvalidInputError) and (field := error.metadata.get("field")):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_clip(field, MAX_VALUE_CHARS), description=_clip(str(error), MAX_MESSAGE_CHARS)
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    return status


def _metadata(error: BlockzooError) -> dict[str, str]:
    values = dict(error.metadata)
    for name in ("suggestions", "supported"):
        if listed := getattr(error, name, ()):
            values[name] = ", ".join(listed)
    if error.hint:
        values["hint"] = error.hint
    # The hint and the lists are last in and must survive; ids beyond the bound are dropped oldest first.
    kept = list(values.items())[-MAX_VALUES:]
    return {key: _clip(value, MAX_VALUE_CHARS if key != "hint" else MAX_MESSAGE_CHARS) for key, value in kept}


def _clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


async def abort(context: Any, error: BlockzooError) -> NoReturn:
    """End a call with the error's status (`context` is a `grpc.aio.ServicerContext`)."""
    status = to_status(error)
    await context.abort(
        status_code(error), status.message, trailing_metadata=((DETAILS_KEY, status.SerializeToString()),)
    )
    raise AssertionError("abort returned")  # pragma: no cover


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns whatever a servicer raises into a status; nothing is dropped silently.

    A `BlockzooError` keeps its meaning. Anything else is a fault of ours: the caller gets INTERNAL
    with an incident id, and the log has the traceback under the same id.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the method's handler."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return handler
        codecs = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(_unary(handler.unary_unary, method), **codecs)
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(_unary(handler.stream_unary, method), **codecs)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(_stream(handler.unary_stream, method), **codecs)
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(_stream(handler.stream_stream, method), **codecs)
        return handler


def _unary(inner: Callable[[Any, Any], Awaitable[Any]], method: str) -> Callable[[Any, Any], Awaitable[Any]]:
    async def call(request: Any, context: Any) -> Any:
        try:
            return await inner(request, context)
        except Exception as error:  # noqa: BLE001 - the boundary: everything is translated or re-raised
            await _translate(context, method, error)

    return call


def _stream(inner: Callable[[Any, Any], Any], method: str) -> Callable[[Any, Any], Any]:
    async def call(request: Any, context: Any) -> Any:
        try:
            responses = inner(request, context)
            # Servicers that write to the context themselves (Generate, health's Watch) return a coroutine.
            if not hasattr(responses, "__aiter__"):
                await responses
                return
            # Without aclosing the servicer's cleanup would wait for the garbage collector.
            async with aclosing(responses) as stream:
                async for response in stream:
                    yield response
        except Exception as error:  # noqa: BLE001 - the boundary: everything is translated or re-raised
            await _translate(context, method, error)

    return call


async def _translate(context: Any, method: str, error: Exception) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, BlockzooError):
        incident = uuid.uuid4().hex[:12]
        log.error("unexpected error in %s incident=%s", method, incident, exc_info=error)
        error = BlockzooError(
            f"internal error, incident {incident}",
            hint="The server's log has the details under this incident id; please report it.",
            incident=incident,
        )
    else:
        log.info("refused method=%s code=%s reason=%s", method, status_code(error).name, error.reason)
    await abort(context, error)


def all_errors(root: type[BlockzooError] = BlockzooError) -> Iterator[type[BlockzooError]]:
    """`root` and every class below it that has been imported."""
    yield root
    for cls in root.__subclasses__():
        yield from all_errors(cls)
