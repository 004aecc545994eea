"""What pushes, exports and long operations are told and tell, out of the wire format."""

from __future__ import annotations

from dataclasses import dataclass

from blockzoo.manifest import BlobId, DType
from blockzoo.store.writing import Stored


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive bytes of one blob; `base` is what a difference may be taken to."""

    blob: BlobId
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    data: bytes
    base: BlobId | None


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive bytes of one blob that is exported."""

    blob: BlobId
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a blob stands in a push.

    Attributes:
        stored: what became of it, once it is the push's.
        is_there: it is in the zoo, and has to be proved.
        received: bytes that have come in, when it is neither.
    """

    stored: Stored | None = None
    is_there: bool = False
    received: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """How far an operation is; `total_bytes` is 0 when it is not known."""

    task: str
    total_bytes: int
    done_bytes: int
