"""Everything that can go wrong in a zoo, as types a caller can tell apart.

::

    BlockzooError
    ├── InvalidInputError            the caller's data or arguments are wrong
    │   ├── InvalidNameError
    │   ├── CurrentVersionError
    │   ├── NoOlderVersionError
    │   ├── InvalidManifestError     what a push wants to register is not what its files make
    │   ├── CheckpointError          a checkpoint cannot be registered
    │   │   ├── TruncatedFileError
    │   │   ├── PickleRefusedError
    │   │   ├── NonFiniteWeightsError
    │   │   ├── MissingShardError
    │   │   ├── PathEscapeError
    │   │   ├── TensorMismatchError
    │   │   ├── InvalidConfigError
    │   │   ├── UnsupportedFeatureError
    │   │   └── UnsupportedArchitectureError
    │   ├── AdapterError             an adapter cannot be registered
    │   │   ├── AdapterBaseMismatchError
    │   │   ├── UnknownTargetError
    │   │   └── UnsupportedAdapterError
    │   ├── IncompatibleBlocksError  blocks of other shapes cannot stand in for each other
    │   ├── EvaluationError          the text or the numbers of an evaluation are of no use
    │   └── NotEquivalentError       a record's numbers are beyond the bounds of an approval
    ├── NotFoundError
    │   ├── VariantNotFoundError
    │   ├── BlobNotFoundError
    │   ├── ManifestNotFoundError
    │   ├── EquivalenceNotFoundError
    │   ├── HubModelNotFoundError
    │   └── ZooNotFoundError
    ├── ConflictError                somebody else was faster; trying again may work
    ├── ClockSkewError               this machine's clock and the storage's differ by too much
    ├── CorruptionError              stored bytes are not what their name says
    │   ├── CorruptBlobError
    │   └── CorruptManifestError
    ├── StorageError                 the storage refused
    │   ├── StorageFullError
    │   ├── HubUnreachableError
    │   └── UnsupportedStoreError
    ├── MissingPackageError          an optional package is not installed here
    └── FormatVersionError           the zoo is newer than this program

Each error carries a sentence that says what is wrong (``str(error)``), a
``hint`` that says what to do, a stable ``reason`` for programs, and the ids
involved in ``metadata``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar


class BlockzooError(Exception):
    """Root of all errors that blockzoo raises on purpose.

    Attributes:
        reason: stable UPPER_SNAKE_CASE identifier of the kind of error.
        hint: one sentence that says what the caller should do, or "".
        metadata: ids and values involved, as strings.
    """

    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, hint: str = "", **metadata: object) -> None:
        super().__init__(message)
        self.hint = hint
        self.metadata: Mapping[str, str] = {key: str(value) for key, value in metadata.items()}

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle what the error says: constructors of subclasses do not take a message."""
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[BlockzooError], args: tuple[object, ...], state: dict[str, object]) -> BlockzooError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class InvalidInputError(BlockzooError):
    """The caller's data or arguments are wrong; the same call will fail again."""

    reason = "INVALID_INPUT"


class InvalidNameError(InvalidInputError):
    """A variant name or reference does not follow the naming rule."""

    reason = "INVALID_NAME"


class CurrentVersionError(InvalidInputError):
    """The operation is for old versions, and this one is current."""

    reason = "CURRENT_VERSION"

    def __init__(self, name: str, version: int, *, hint: str = "Name an older version.") -> None:
        super().__init__(
            f"{name}@{version} is the current version",
            hint=hint,
            variant=name,
            version=version,
        )


class NoOlderVersionError(InvalidInputError):
    """There is no version to go back to."""

    reason = "NO_OLDER_VERSION"


class InvalidManifestError(InvalidInputError):
    """Manifests that were pushed are not those that registering the pushed files makes."""

    reason = "INVALID_MANIFEST"


class CheckpointError(InvalidInputError):
    """A checkpoint folder cannot be registered."""

    reason = "INVALID_CHECKPOINT"


class TruncatedFileError(CheckpointError):
    """A file ends before its header says it should, or is empty."""

    reason = "TRUNCATED_FILE"


class PickleRefusedError(CheckpointError):
    """Weights are stored as pickle, which can run code when opened."""

    reason = "PICKLE_REFUSED"


class NonFiniteWeightsError(CheckpointError):
    """A tensor holds NaN or infinity."""

    reason = "NON_FINITE_WEIGHTS"


class MissingShardError(CheckpointError):
    """The shard index names a file that is not there."""

    reason = "MISSING_SHARD"


class PathEscapeError(CheckpointError):
    """A file name in a checkpoint points outside the checkpoint's folder."""

    reason = "PATH_ESCAPE"


class TensorMismatchError(CheckpointError):
    """Tensors are missing, unexpected, or of another shape or dtype than the config says."""

    reason = "TENSOR_MISMATCH"


class InvalidConfigError(CheckpointError):
    """config.json is missing, is not JSON, or holds values no model can have."""

    reason = "INVALID_CONFIG"


class UnsupportedFeatureError(CheckpointError):
    """The architecture is known, but the checkpoint uses a part of it that blocks do not compute."""

    reason = "UNSUPPORTED_FEATURE"


class UnsupportedArchitectureError(CheckpointError):
    """No family in blockzoo knows this architecture."""

    reason = "UNSUPPORTED_ARCHITECTURE"

    def __init__(self, architecture: str, supported: Sequence[str]) -> None:
        super().__init__(
            f"architecture {architecture!r} is not supported",
            hint=f"Supported architectures: {', '.join(supported)}.",
            architecture=architecture,
        )
        self.supported = tuple(supported)


class AdapterError(InvalidInputError):
    """A LoRA adapter folder cannot be registered."""

    reason = "INVALID_ADAPTER"


class AdapterBaseMismatchError(AdapterError):
    """The adapter's matrices do not fit the base variant's layers."""

    reason = "ADAPTER_BASE_MISMATCH"


class UnknownTargetError(AdapterError):
    """The adapter changes modules that the base variant does not have."""

    reason = "UNKNOWN_TARGET"


class UnsupportedAdapterError(AdapterError):
    """The adapter uses a method that is not plain LoRA."""

    reason = "UNSUPPORTED_ADAPTER"


class IncompatibleBlocksError(InvalidInputError):
    """Blocks cannot stand in for each other: shapes, positions, vocabulary or tokenizers differ."""

    reason = "INCOMPATIBLE_BLOCKS"


class EvaluationError(InvalidInputError):
    """An evaluation cannot say anything: the text is too short, or the outputs are no numbers."""

    reason = "EVALUATION"


class NotEquivalentError(InvalidInputError):
    """The numbers of an equivalence record are beyond the bounds it was to be approved under."""

    reason = "NOT_EQUIVALENT"


class NotFoundError(BlockzooError):
    """Something that was named does not exist."""

    reason = "NOT_FOUND"


class VariantNotFoundError(NotFoundError):
    """No variant of this name or version is registered."""

    reason = "VARIANT_NOT_FOUND"

    def __init__(self, ref: str, suggestions: Sequence[str] = ()) -> None:
        near = f"Did you mean {' or '.join(suggestions)}?"
        hint = near if suggestions else "List variants with `blockzoo ls`."
        super().__init__(f"variant {ref!r} is not registered", hint=hint, variant=ref)
        self.suggestions = tuple(suggestions)


class BlobNotFoundError(NotFoundError):
    """A blob that a manifest names is not in the storage."""

    reason = "BLOB_NOT_FOUND"


class ManifestNotFoundError(NotFoundError):
    """A block or chain manifest is not in the storage."""

    reason = "MANIFEST_NOT_FOUND"


class EquivalenceNotFoundError(NotFoundError):
    """No equivalence record has this id."""

    reason = "EQUIVALENCE_NOT_FOUND"


class HubModelNotFoundError(NotFoundError):
    """The Hugging Face hub has no such model or revision, or does not show it."""

    reason = "HUB_MODEL_NOT_FOUND"


class ZooNotFoundError(NotFoundError):
    """There is no zoo at this place."""

    reason = "ZOO_NOT_FOUND"


class ConflictError(BlockzooError):
    """Another writer was faster; the call may be tried again."""

    reason = "CONFLICT"


class ClockSkewError(BlockzooError):
    """The clock of this machine is wrong, or that of the storage: leases would mean nothing."""

    reason = "CLOCK_SKEW"


class CorruptionError(BlockzooError):
    """Stored bytes are not what their name says."""

    reason = "CORRUPT"


class CorruptBlobError(CorruptionError):
    """A blob's bytes do not hash to its id."""

    reason = "CORRUPT_BLOB"


class CorruptManifestError(CorruptionError):
    """A manifest does not hash to its id or cannot be read."""

    reason = "CORRUPT_MANIFEST"


class StorageError(BlockzooError):
    """The storage refused to read or write."""

    reason = "STORAGE"


class StorageFullError(StorageError):
    """The storage has no room left; what was being written is not there."""

    reason = "STORAGE_FULL"


class HubUnreachableError(StorageError):
    """The Hugging Face hub does not answer, and the cache does not have what was asked for."""

    reason = "HUB_UNREACHABLE"


class UnsupportedStoreError(StorageError):
    """The storage cannot create objects conditionally, so two writers would not be safe."""

    reason = "UNSUPPORTED_STORE"


class MissingPackageError(BlockzooError, ImportError):
    """The operation needs an optional package that is not installed on this machine."""

    reason = "MISSING_PACKAGE"


class FormatVersionError(BlockzooError):
    """The zoo was written by a newer blockzoo than this one can read or write."""

    reason = "FORMAT_VERSION"
