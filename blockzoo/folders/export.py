"""Writing a variant back as the folder it was registered from: same names, same bytes."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from blockzoo.digest import Buffer, num_bytes
from blockzoo.errors import CorruptManifestError, InvalidInputError, StorageError, StorageFullError
from blockzoo.folders.contents import LAYOUT_FILE, FolderLayout, InBlock, InFile
from blockzoo.folders.safetensors_io import TensorEntry, parse_header
from blockzoo.json_report import JsonReport
from blockzoo.manifest import BlobId, ChainManifest, DType, FileRef, TensorRef, VariantRecord
from blockzoo.progress import NoProgress, Progress
from blockzoo.store.writing import Manifests
from blockzoo.store.zoo_store import ZooStore


@dataclass(frozen=True, slots=True)
class WantedBlob:
    """A blob that goes into the folder, and what its manifest says of it."""

    blob: BlobId
    dtype: DType
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its bytes, decoded."""
        return num_bytes(self.dtype, self.shape)


class Source(Manifests, Protocol):
    """What an export reads, be it a zoo at hand or one behind a server."""

    def read(
        self, wanted: Sequence[WantedBlob], on_bytes: Callable[[int], None] | None = None
    ) -> Generator[Buffer, None, None]:
        """Yield the bytes of blobs in this order, each verified against its id before it is yielded.

        Args:
            wanted: the blobs; one may be wanted more than once.
            on_bytes: called with the number of bytes that were read just now.
        """


class ZooSource:
    """A zoo at hand."""

    def __init__(self, store: ZooStore) -> None:
        self._store = store
        self.get_chain = store.get_chain
        self.get_block = store.get_block

    def read(
        self, wanted: Sequence[WantedBlob], on_bytes: Callable[[int], None] | None = None
    ) -> Generator[Buffer, None, None]:
        """See `Source`."""
        for item in wanted:
            data = self._store.blobs.read(item.blob)
            if on_bytes is not None:
                on_bytes(data.nbytes)
            yield data


@dataclass(frozen=True, slots=True)
class ExportResult(JsonReport):
    """What was written.

    Attributes:
        ref: NAME@VERSION.
        path: the folder.
        files: names of the files in it.
        num_bytes: their bytes together.
    """

    ref: str
    path: Path
    files: tuple[str, ...]
    num_bytes: int


def export_variant(
    source: Source, record: VariantRecord, dest: Path, *, progress: Progress | None = None
) -> ExportResult:
    """Write a variant's folder.

    The folder appears under its name only when it is complete.

    Args:
        source: the zoo.
        record: what to write; adapters become adapter folders.
        dest: a folder that does not exist yet or is empty.
        progress: told what is being done.

    Raises:
        InvalidInputError: `dest` is a file or holds something.
        CorruptBlobError, BlobNotFoundError: part of the variant is damaged; nothing is left behind.
        StorageError: the folder cannot be written.
    """
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise InvalidInputError(
            f"{dest} exists already and is not an empty folder", hint="Choose a new folder.", path=dest
        )
    layout = _read_layout(source, record)
    staging = dest.parent / f".{dest.name}.{uuid.uuid4().hex}"
    writer = _Writer(source, record, layout, progress or NoProgress())
    try:
        staging.mkdir(parents=True)
        files = writer.write(staging)
        # Replaces an empty folder in one step.
        staging.rename(dest)
    except OSError as error:
        full = error.errno in (28, 122)  # ENOSPC, EDQUOT
        raise (StorageFullError if full else StorageError)(
            f"{dest} cannot be written: {error.strerror}", path=dest
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return ExportResult(f"{record.name}@{record.version}", dest, tuple(files), sum(files.values()))


class _Writer:
    def __init__(
        self, source: Source, record: VariantRecord, layout: FolderLayout, progress: Progress
    ) -> None:
        self._source = source
        self._record = record
        self._layout = layout
        self._progress = progress
        self._chain: ChainManifest = source.get_chain(record.chain)

    def write(self, folder: Path) -> dict[str, int]:
        """Write all files; returns name -> bytes."""
        total = int(self._record.provenance.get("num_bytes", "0"))
        self._progress.start(f"exporting {self._record.name}", total)
        try:
            sizes = self._write_shards(folder)
        finally:
            self._progress.finish()
        files = [self._record.files[name] for name in self._layout.filenames]
        with closing(self._source.read([_wanted_file(file) for file in files])) as contents:
            for name, data in zip(self._layout.filenames, contents, strict=True):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(data)
                sizes[name] = len(data)
        return sizes

    def _write_shards(self, folder: Path) -> dict[str, int]:
        headers = {name: header.encode("utf-8") for name, header in self._layout.shards.items()}
        shards = {
            name: [
                item for entry in parse_header(name, header, None).values() for item in self._wanted(entry)
            ]
            for name, header in headers.items()
        }
        wanted = [item for items in shards.values() for item in items]
        with closing(self._source.read(wanted, self._progress.advance)) as contents:
            return {
                name: _write_shard(folder / name, headers[name], len(items), contents)
                for name, items in shards.items()
            }

    def _wanted(self, entry: TensorEntry) -> list[WantedBlob]:
        """The blobs of a tensor, in order."""
        place = self._layout.tensors.get(entry.name)
        if isinstance(place, InFile) and place.filename in self._record.files:
            wanted = [_wanted_file(self._record.files[place.filename])]
        elif isinstance(place, InBlock):
            found = self._find(place)
            pairs = zip(found.blobs, found.chunk_shapes(), strict=True)
            wanted = [WantedBlob(blob, found.dtype, shape) for blob, shape in pairs]
        else:
            raise CorruptManifestError(f"{LAYOUT_FILE} does not say where {entry.name!r} is")
        num_bytes = sum(item.num_bytes for item in wanted)
        if num_bytes != entry.num_bytes:
            raise CorruptManifestError(f"{entry.name!r} has {num_bytes} bytes, not {entry.num_bytes}")
        return wanted

    def _find(self, place: InBlock) -> TensorRef:
        try:
            link = self._chain.links[place.position]
            block = link.base if place.applied is None else link.applied[place.applied]
            return self._source.get_block(block).tensors[place.name]
        except (IndexError, KeyError) as error:
            raise CorruptManifestError(f"{LAYOUT_FILE} points at {place}, which is not there") from error


def _write_shard(path: Path, header: bytes, num_blobs: int, contents: Iterator[Buffer]) -> int:
    """Write a weight file; returns its bytes."""
    with path.open("xb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _ in range(num_blobs):
            file.write(next(contents))
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def _wanted_file(file: FileRef) -> WantedBlob:
    return WantedBlob(file.blob, DType.U8, (file.size,))


def _read_layout(source: Source, record: VariantRecord) -> FolderLayout:
    file = record.files.get(LAYOUT_FILE)
    if file is None:
        raise InvalidInputError(
            f"{record.name}@{record.version} was not registered from a folder and cannot be exported",
            name=record.name,
        )
    (data,) = source.read([_wanted_file(file)])
    layout = FolderLayout.from_bytes(bytes(data))
    unknown = [name for name in layout.filenames if name not in record.files]
    if unknown:
        raise CorruptManifestError(f"{LAYOUT_FILE} names {unknown[0]!r}, which the variant does not have")
    return layout
