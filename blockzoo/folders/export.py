"""Writing a variant back as the folder it was registered from: same names, same bytes."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blockzoo.errors import CorruptManifestError, InvalidInputError, StorageError, StorageFullError
from blockzoo.folders.contents import LAYOUT_FILE, FolderLayout, InBlock, InFile
from blockzoo.folders.safetensors_io import parse_header
from blockzoo.json_report import JsonReport
from blockzoo.manifest import ChainManifest, TensorRef, VariantRecord
from blockzoo.progress import NoProgress, Progress
from blockzoo.store.zoo_store import ZooStore


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
    store: ZooStore, record: VariantRecord, dest: Path, *, progress: Progress | None = None
) -> ExportResult:
    """Write a variant's folder.

    The folder appears under its name only when it is complete.

    Args:
        store: the zoo.
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
    layout = _read_layout(store, record)
    staging = dest.parent / f".{dest.name}.{uuid.uuid4().hex}"
    writer = _Writer(store, record, layout, progress or NoProgress())
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
        self, store: ZooStore, record: VariantRecord, layout: FolderLayout, progress: Progress
    ) -> None:
        self._store = store
        self._record = record
        self._layout = layout
        self._progress = progress
        self._chain: ChainManifest = store.get_chain(record.chain)

    def write(self, folder: Path) -> dict[str, int]:
        """Write all files; returns name -> bytes."""
        total = int(self._record.provenance.get("num_bytes", "0"))
        self._progress.start(f"exporting {self._record.name}", total)
        try:
            sizes = {name: self._write_shard(folder / name, name) for name in self._layout.shards}
        finally:
            self._progress.finish()
        for name in self._layout.filenames:
            data = self._store.blobs.read(self._record.files[name].blob)
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
            sizes[name] = len(data)
        return sizes

    def _write_shard(self, path: Path, name: str) -> int:
        header = self._layout.shards[name].encode("utf-8")
        with path.open("xb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for entry in parse_header(name, header, None).values():
                written = 0
                for piece in self._pieces(entry.name):
                    file.write(piece)
                    written += piece.nbytes
                    self._progress.advance(piece.nbytes)
                if written != entry.num_bytes:
                    raise CorruptManifestError(f"{entry.name!r} has {written} bytes, not {entry.num_bytes}")
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def _pieces(self, tensor: str) -> Iterator[memoryview]:
        place = self._layout.tensors.get(tensor)
        if isinstance(place, InFile):
            yield self._store.blobs.read(self._record.files[place.filename].blob)
        elif isinstance(place, InBlock):
            for blob in self._find(place).blobs:
                yield self._store.blobs.read(blob)
        else:
            raise CorruptManifestError(f"{LAYOUT_FILE} does not say where {tensor!r} is")

    def _find(self, place: InBlock) -> TensorRef:
        try:
            link = self._chain.links[place.position]
            block = link.base if place.applied is None else link.applied[place.applied]
            return self._store.get_block(block).tensors[place.name]
        except (IndexError, KeyError) as error:
            raise CorruptManifestError(f"{LAYOUT_FILE} points at {place}, which is not there") from error


def _read_layout(store: ZooStore, record: VariantRecord) -> FolderLayout:
    file = record.files.get(LAYOUT_FILE)
    if file is None:
        raise InvalidInputError(
            f"{record.name}@{record.version} was not registered from a folder and cannot be exported",
            name=record.name,
        )
    layout = FolderLayout.from_bytes(store.blobs.read(file.blob))
    unknown = [name for name in layout.filenames if name not in record.files]
    if unknown:
        raise CorruptManifestError(f"{LAYOUT_FILE} names {unknown[0]!r}, which the variant does not have")
    return layout
