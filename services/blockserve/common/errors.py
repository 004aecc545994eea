"""Errors of serving, on top of those of the zoo (`blockzoo.errors`).

::

    BlockzooError
    ├── InvalidInputError
    │   ├── PromptError
    │   │   ├── EmptyPromptError
    │   │   └── PromptTooLongError
    │   ├── SamplingError            `field` names the request field
    │   ├── ChatTemplateError
    │   ├── ResumeError
    │   ├── ConfigurationError
    │   ├── SpanError
    │   ├── UnknownBlobError
    │   └── WrongDigestError
    ├── NotFoundError
    │   ├── WorkerNotFoundError
    │   ├── RequestNotFoundError
    │   └── PushNotFoundError
    ├── CapacityError                `retry_after` seconds
    │   ├── QueueFullError
    │   ├── KvCapacityError
    │   ├── DeadlineTooShortError
    │   ├── MemoryBudgetError
    │   ├── PushCapacityError
    │   └── ExportCapacityError
    ├── ChainNotLoadedError
    ├── DeadlineExceededError
    ├── ServerStoppingError          `retry_after` seconds
    ├── EngineFailedError
    ├── NonFiniteLogitsError
    ├── WireError
    ├── PathBrokenError              `retry_after` seconds
    ├── NoPathError                  `retry_after` seconds
    ├── NoLeaderError                `retry_after` seconds
    ├── StateStoreError
    │   └── StaleLeaderError
    ├── LocalClusterError
    ├── UnauthenticatedError
    ├── PossessionError
    ├── UnregisteredRefusedError
    ├── PushInterruptedError
    ├── ExportInterruptedError
    └── RemoteError                  what a client sees of a failure that carried no type
        └── UnavailableError
"""

from __future__ import annotations

import asyncio
from enum import StrEnum

from blockzoo.errors import BlockzooError, CorruptionError, InvalidInputError, NotFoundError, StorageError

LEAVING = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)
"""What is no fault and goes on its way. Libraries in Rust raise panics beside `Exception`, and these are
faults: where a caller waits for an answer, catch `LEAVING` and raise it again, then `BaseException`."""

UNREADABLE = (StorageError, CorruptionError)
"""A worker cannot read blocks. Another worker, whose disk or network is another one, may."""


class PromptError(InvalidInputError):
    """The prompt cannot be run."""

    reason = "INVALID_PROMPT"


class EmptyPromptError(PromptError):
    """The prompt has no tokens."""

    reason = "EMPTY_PROMPT"


class PromptTooLongError(PromptError):
    """Prompt and answer do not fit the variant's context."""

    reason = "PROMPT_TOO_LONG"


class SamplingError(InvalidInputError):
    """A sampling, stopping or response value is out of range.

    Attributes:
        field: what the value is called, for example "temperature" or "stop[2]" (see
            `blockserve.common.api.calls.CallField`); in an answer, as the protocol of the caller spells it.
    """

    reason = "INVALID_SAMPLING"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}", field=field)
        self.field = field


class ChatTemplateError(InvalidInputError):
    """The variant's chat template is missing, broken, or was stopped by its limits."""

    reason = "CHAT_TEMPLATE"


class ResumeError(InvalidInputError):
    """`resume_from` cannot be honoured."""

    reason = "INVALID_RESUME"


class ConfigurationError(InvalidInputError):
    """A server or client was started with settings it cannot or must not run with."""

    reason = "INVALID_CONFIGURATION"


class SpanError(InvalidInputError):
    """Positions that the chain does not have, or that no worker can execute by themselves."""

    reason = "INVALID_SPAN"


class UnknownBlobError(InvalidInputError):
    """A push names a blob that it neither sent nor proved to have, or an export one of another variant."""

    reason = "UNKNOWN_BLOB"


class WrongDigestError(InvalidInputError):
    """Bytes that were sent are not those that their digest names."""

    reason = "WRONG_DIGEST"


class WorkerNotFoundError(NotFoundError):
    """No live worker has this name."""

    reason = "WORKER_NOT_FOUND"


class RequestNotFoundError(NotFoundError):
    """No request of this id runs here, or is remembered."""

    reason = "REQUEST_NOT_FOUND"


class PushNotFoundError(NotFoundError):
    """The server knows no push of this id: it has ended, or the server was started again."""

    reason = "PUSH_NOT_FOUND"


class PossessionError(BlockzooError):
    """A push could not prove that it has the bytes of a blob that is in the zoo."""

    reason = "NOT_POSSESSED"


class UnregisteredRefusedError(BlockzooError):
    """An adapter is named by its place, and the operator does not allow that for this one."""

    reason = "UNREGISTERED_REFUSED"


class PushInterruptedError(BlockzooError):
    """The connection broke during a push, and the server did not come back in time."""

    reason = "PUSH_INTERRUPTED"


class ExportInterruptedError(BlockzooError):
    """The connection broke during an export, and the server did not come back in time."""

    reason = "EXPORT_INTERRUPTED"


class CapacityError(BlockzooError):
    """The server has no room now.

    Attributes:
        retry_after: seconds after which trying again makes sense; 0 when trying again cannot help.
    """

    reason = "CAPACITY"

    def __init__(self, message: str, *, retry_after: float = 1.0, hint: str = "", **metadata: object) -> None:
        super().__init__(message, hint=hint, **metadata)
        self.retry_after = retry_after


class QueueFullError(CapacityError):
    """Too many requests are waiting."""

    reason = "QUEUE_FULL"


class KvCapacityError(CapacityError):
    """The request needs more KV pages than the whole pool has; the same request never fits."""

    reason = "KV_CAPACITY"

    def __init__(self, message: str, *, retry_after: float = 0.0, hint: str = "", **metadata: object) -> None:
        super().__init__(message, retry_after=retry_after, hint=hint, **metadata)


class DeadlineTooShortError(CapacityError):
    """The queue alone would take longer than the caller's deadline allows."""

    reason = "DEADLINE_TOO_SHORT"


class MemoryBudgetError(CapacityError):
    """The variant's blocks do not fit into the memory set aside for blocks."""

    reason = "MEMORY_BUDGET"


class PushCapacityError(CapacityError):
    """Too many pushes are open, or too many of their bytes wait to be stored."""

    reason = "PUSH_CAPACITY"


class ExportCapacityError(CapacityError):
    """As many exports run as the server allows, or it allows none."""

    reason = "EXPORT_CAPACITY"


class ChainNotLoadedError(BlockzooError):
    """The chain's blocks are not in memory."""

    reason = "CHAIN_NOT_LOADED"


class DeadlineExceededError(BlockzooError):
    """The caller's deadline passed before the answer was complete."""

    reason = "DEADLINE_EXCEEDED"


class ServerStoppingError(BlockzooError):
    """The server is shutting down and takes no new requests.

    Attributes:
        retry_after: seconds after which another server, or this one's successor, may be asked.
    """

    reason = "SERVER_STOPPING"

    def __init__(self, message: str, *, retry_after: float = 1.0, hint: str = "", **metadata: object) -> None:
        super().__init__(message, hint=hint, **metadata)
        self.retry_after = retry_after


class EngineFailedError(BlockzooError):
    """The engine hit an internal fault while running the request."""

    reason = "ENGINE_FAILED"


class NonFiniteLogitsError(BlockzooError):
    """The variant's weights give logits that are NaN or infinite for this request, on any worker."""

    reason = "NON_FINITE_LOGITS"


class WireError(BlockzooError):
    """A process of the cluster says what this one does not understand: another version, or damage."""

    reason = "WIRE"


class BreakCause(StrEnum):
    """Why a request could not stay on its path. The values are part of the wire format."""

    LOST = "lost"
    """A worker cannot be reached, or its lease has run out: nothing can be fetched from it."""
    DRAINING = "draining"
    """A worker takes no new requests and gave this one back; it still hands out keys and values."""
    REPLACED = "replaced"
    """Another process answers at the worker's address: the worker was started again."""
    SUPERSEDED = "superseded"
    """The request already runs on another path, with a later epoch."""


class PathBrokenError(BlockzooError):
    """A worker on the path was lost or gave the request back; it can go on from its tokens elsewhere.

    Attributes:
        cause: why.
        worker: id of the worker that is to be avoided; empty where no worker is at fault.
        seen_by: id of the worker that cannot reach `worker`; empty where the router itself noticed.
        retry_after: seconds after which the same workers may be asked again.
    """

    reason = "PATH_BROKEN"

    def __init__(
        self,
        message: str,
        *,
        cause: BreakCause = BreakCause.LOST,
        worker: str = "",
        seen_by: str = "",
        retry_after: float = 0.0,
        hint: str = "",
        **metadata: object,
    ) -> None:
        ids = {name: value for name, value in (("worker", worker), ("seen_by", seen_by)) if value}
        super().__init__(message, hint=hint, cause=cause, **ids, **metadata)
        self.cause = cause
        self.worker = worker
        self.seen_by = seen_by
        self.retry_after = retry_after


class NoPathError(BlockzooError):
    """No chain of live workers holds all blocks of the variant.

    Attributes:
        retry_after: seconds after which there may be one.
    """

    reason = "NO_PATH"

    def __init__(self, message: str, *, retry_after: float = 1.0, hint: str = "", **metadata: object) -> None:
        super().__init__(message, hint=hint, **metadata)
        self.retry_after = retry_after


class NoLeaderError(BlockzooError):
    """No controller leads, or the one that does cannot be reached.

    Attributes:
        retry_after: seconds after which there may be one.
    """

    reason = "NO_LEADER"

    def __init__(self, message: str, *, retry_after: float = 1.0, hint: str = "", **metadata: object) -> None:
        super().__init__(message, hint=hint, **metadata)
        self.retry_after = retry_after


class StateStoreError(BlockzooError):
    """The store of the cluster's shared state cannot be reached or does not do what it should."""

    reason = "STATE_STORE"


class StaleLeaderError(StateStoreError):
    """The writer is no longer the leader; another one has been chosen."""

    reason = "STALE_LEADER"


class UnauthenticatedError(BlockzooError):
    """The call carries no credential, or one the server does not know."""

    reason = "UNAUTHENTICATED"


class RemoteError(BlockzooError):
    """A server failed in a way it gave no type for.

    Attributes:
        code: name of the gRPC status, for example "INTERNAL".
    """

    reason = "REMOTE"

    def __init__(self, message: str, *, code: str = "UNKNOWN", hint: str = "", **metadata: object) -> None:
        super().__init__(message, hint=hint, code=code, **metadata)
        self.code = code


class UnavailableError(RemoteError):
    """The server cannot be reached, or the connection to it broke."""

    reason = "UNAVAILABLE"


class LocalClusterError(BlockzooError):
    """A local cluster does not start, runs already, or its files cannot be used."""

    reason = "LOCAL_CLUSTER"
