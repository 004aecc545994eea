"""Bringing a folder's tensors and files into a zoo, cut into blobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from blockzoo.digest import as_bytes, blob_id
from blockzoo.folders.finite import Weights, check_finite
from blockzoo.manifest import BlobId, DType, FileRef, TensorRef
from blockzoo.store.blobs import TensorData, file_data
from blockzoo.store.writing import Stored, Writer


@dataclass(frozen=True, slots=True)
class Upload:
    """A tensor to store.

    Attributes:
        dtype: element type.
        shape: dimensions.
        data: bytes, row-major, little-endian.
        chunk_rows: rows per blob, 0 for one blob.
        base: the tensor at the same place in the base, or None; differences to it are
            stored where they are smaller.
    """

    dtype: DType
    shape: tuple[int, ...]
    data: memoryview
    chunk_rows: int = 0
    base: TensorRef | None = None


@dataclass
class Totals:
    """What storing has cost.

    Attributes:
        blobs: blobs dealt with, files too.
        new_blobs: of these, created now.
        new_bytes: decoded bytes of the created ones.
        stored_bytes: bytes written for them.
    """

    blobs: int = 0
    new_blobs: int = 0
    new_bytes: int = 0
    stored_bytes: int = 0

    def add(self, tensors: Sequence[TensorData], stored: Sequence[Stored]) -> None:
        """Count the outcome of one `put_tensors`."""
        for tensor, outcome in zip(tensors, stored, strict=True):
            self.blobs += 1
            self.stored_bytes += outcome.stored_bytes
            if outcome.created:
                self.new_blobs += 1
                self.new_bytes += memoryview(tensor.data).nbytes


Pieces = Mapping[str, Sequence[TensorData]]
"""Uploads cut into blobs, by the tensor's name."""


def inspect_uploads(
    uploads: Mapping[str, Upload], on_bytes: Callable[[int], None], *, workers: int
) -> Pieces:
    """Cut tensors into blobs, refuse NaN and infinity, and compute the ids on the way.

    Raises:
        NonFiniteWeightsError: names the first such tensor.
    """
    named = [(name, piece) for name, upload in uploads.items() for piece in _cut(upload)]
    pieces: list[TensorData] = [piece for _, piece in named]

    def identify(index: int) -> None:
        piece = pieces[index]
        blob = blob_id(piece.dtype, piece.shape, piece.data, threads=1)
        pieces[index] = TensorData(piece.dtype, piece.shape, piece.data, piece.base, blob)

    weights = [Weights(name, piece.dtype, as_bytes(piece.data)) for name, piece in named]
    check_finite(weights, on_bytes, workers=workers, then=identify)
    found: dict[str, list[TensorData]] = {name: [] for name in uploads}
    for (name, _), piece in zip(named, pieces, strict=True):
        found[name].append(piece)
    return found


def put_uploads(
    registration: Writer, uploads: Mapping[str, Upload], cut: Pieces, totals: Totals
) -> dict[str, TensorRef]:
    """Store inspected tensors; returns where each one is. Raises what `Registration.put_tensors` raises."""
    flat = [piece for pieces in cut.values() for piece in pieces]
    stored = registration.put_tensors(flat)
    totals.add(flat, stored)
    outcomes = iter(stored)
    refs = {}
    for name, pieces in cut.items():
        upload = uploads[name]
        # A matrix that fits one blob is spelled like any other, so its reference does not depend on the rule.
        chunk_rows = upload.chunk_rows if len(pieces) > 1 else 0
        blobs = tuple(next(outcomes).blob for _ in pieces)
        refs[name] = TensorRef(upload.dtype, upload.shape, blobs, chunk_rows)
    return refs


def put_files(registration: Writer, files: Mapping[str, bytes], totals: Totals) -> dict[str, FileRef]:
    """Store files; returns their references by name."""
    tensors = [file_data(data) for data in files.values()]
    stored = registration.put_tensors(tensors)
    totals.add(tensors, stored)
    return {
        name: FileRef(outcome.blob, len(data))
        for (name, data), outcome in zip(files.items(), stored, strict=True)
    }


def _cut(upload: Upload) -> list[TensorData]:
    rows = upload.chunk_rows
    if not rows or upload.shape[0] <= rows:
        base = upload.base.blobs[0] if upload.base and len(upload.base.blobs) == 1 else None
        return [TensorData(upload.dtype, upload.shape, upload.data, base)]
    total, tail = upload.shape[0], upload.shape[1:]
    row_bytes = upload.data.nbytes // total
    return [
        TensorData(
            upload.dtype,
            (min(rows, total - start), *tail),
            upload.data[start * row_bytes : (start + rows) * row_bytes],
            _base_chunk(upload, start // rows),
        )
        for start in range(0, total, rows)
    ]


def _base_chunk(upload: Upload, index: int) -> BlobId | None:
    base = upload.base
    if base is None or base.chunk_rows != upload.chunk_rows or index >= len(base.blobs):
        return None
    return base.blobs[index]
