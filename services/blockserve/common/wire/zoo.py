"""Messages of `blockproto.v1` to values and back. Pure.

Reports have the same field names in Python and on the wire, so one pair of functions converts them all;
a test holds the names of both sides against each other.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import Any, TypeVar, cast, get_args, get_origin

from blockproto.v1 import zoo_pb2
from blockserve.common.api.push import Piece, Standing, Step
from blockzoo.digest import is_digest
from blockzoo.errors import InvalidInputError
from blockzoo.manifest import BlobId, ChainId, DType, FileRef, VariantRecord
from blockzoo.names import check_name
from blockzoo.store.writing import Stored

R = TypeVar("R")


def to_message(report: Any) -> Any:
    """The message that has the name and the fields of a report."""
    return getattr(zoo_pb2, type(report).__name__)(**_plain(report))


def from_message(message: Any, kind: type[R]) -> R:
    """The report of this class that a message stands for."""
    values: dict[str, Any] = {}
    for name, hint in _hints(cast(Hashable, kind)).items():
        is_unset = type(None) in get_args(hint) and not message.HasField(name)
        values[name] = None if is_unset else _value(getattr(message, name), hint)
    return kind(**values)


def record_to_message(record: VariantRecord) -> zoo_pb2.VariantRecord:
    """A version of a variant; tombstones are never sent."""
    return zoo_pb2.VariantRecord(
        name=record.name,
        version=record.version,
        chain=record.chain,
        kind=record.kind,
        files=files_to_message(record.files),
        provenance=dict(record.provenance),
    )


def record_from_message(message: zoo_pb2.VariantRecord) -> VariantRecord:
    """The way back; raises InvalidInputError for what no record can be."""
    return VariantRecord(
        name=check_name(message.name),
        version=message.version,
        chain=ChainId(_digest(message.chain)),
        kind=message.kind,
        files=files_from_message(message.files),
        provenance=dict(message.provenance),
    )


def files_to_message(files: Mapping[str, FileRef]) -> dict[str, zoo_pb2.FileRef]:
    """References to files by name."""
    return {name: zoo_pb2.FileRef(blob=ref.blob, size=ref.size) for name, ref in files.items()}


def files_from_message(files: Mapping[str, zoo_pb2.FileRef]) -> dict[str, FileRef]:
    """The way back; raises InvalidInputError for what is no digest."""
    return {name: FileRef(blob_from_message(ref.blob), ref.size) for name, ref in files.items()}


def piece_from_message(message: zoo_pb2.BlobPiece) -> Piece:
    """Bytes of a blob; raises InvalidInputError."""
    try:
        dtype = DType(message.dtype)
    except ValueError as error:
        raise InvalidInputError(f"{message.dtype[:40]!r} is not an element type") from error
    return Piece(
        blob=blob_from_message(message.blob),
        dtype=dtype,
        shape=tuple(message.shape),
        offset=message.offset,
        data=message.data,
        base=blob_from_message(message.base) if message.base else None,
    )


def standing_to_message(standing: Standing) -> zoo_pb2.BlobState:
    """Where a blob stands in a push."""
    if standing.stored is not None:
        stored = standing.stored
        return zoo_pb2.BlobState(
            status=zoo_pb2.BlobState.STATUS_HELD, created=stored.created, stored_bytes=stored.stored_bytes
        )
    if standing.is_there:
        return zoo_pb2.BlobState(status=zoo_pb2.BlobState.STATUS_TO_PROVE)
    return zoo_pb2.BlobState(status=zoo_pb2.BlobState.STATUS_MISSING, received=standing.received)


def standing_from_message(blob: BlobId, message: zoo_pb2.BlobState) -> Standing:
    """The way back."""
    if message.status == zoo_pb2.BlobState.STATUS_HELD:
        return Standing(stored=Stored(blob, message.created, message.stored_bytes))
    return Standing(is_there=message.status == zoo_pb2.BlobState.STATUS_TO_PROVE, received=message.received)


def step_to_message(step: Step) -> zoo_pb2.OperationProgress:
    """How far an operation is."""
    return zoo_pb2.OperationProgress(task=step.task, total_bytes=step.total_bytes, done_bytes=step.done_bytes)


def step_from_message(message: zoo_pb2.OperationProgress) -> Step:
    """The way back."""
    return Step(message.task, message.total_bytes, message.done_bytes)


def blob_from_message(text: str) -> BlobId:
    """A blob's id as a caller wrote it; raises InvalidInputError."""
    return BlobId(_digest(text))


def _digest(text: str) -> str:
    if not is_digest(text):
        raise InvalidInputError(f"{text[:80]!r} is not a digest", hint="It has 64 lower-case hex digits.")
    return text


def _plain(value: Any) -> Any:
    """Dataclasses as dictionaries, without what is unset or empty."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {name: item for name, item in fields.items() if item is not None}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def _value(value: Any, hint: Any) -> Any:
    origin = get_origin(hint)
    if origin is tuple:
        (item, *_) = get_args(hint)
        return tuple(_value(each, item) for each in value)
    if origin is Mapping:
        return dict(value)
    return from_message(value, hint) if isinstance(hint, type) and dataclasses.is_dataclass(hint) else value


@lru_cache
def _hints(kind: Any) -> Mapping[str, Any]:
    return typing.get_type_hints(kind)
