"""What registering a checkpoint and registering an adapter have in common."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from blockzoo.errors import CorruptManifestError, MissingPackageError
from blockzoo.folders.checkpoint import ModelFolder
from blockzoo.folders.contents import FolderLayout, InBlock, InFile
from blockzoo.folders.files import TOKENIZER, read_kept_file
from blockzoo.folders.outline import Outline
from blockzoo.folders.tokenizers.bounds import check_tokenizer
from blockzoo.folders.tokenizers.conversion import (
    CONVERTED,
    convert_tokenizer,
    converted_note,
    not_converted_note,
    source_of,
)
from blockzoo.json_report import JsonReport
from blockzoo.manifest import BlockManifest, ChainId, FileRef, VariantRecord
from blockzoo.progress import Progress
from blockzoo.registering.upload import Pieces, Totals, Upload, inspect_uploads
from blockzoo.store.writing import Manifests, WritableZoo, Writer

_MAX_CHECK_WORKERS = 8
"""Threads that look for NaN; more than these wait for memory."""


@dataclass(frozen=True, slots=True)
class RegisterResult(JsonReport):
    """What a registration did.

    Attributes:
        record: the version that is current now.
        unchanged: nothing differs from the version that was current, so it still is.
        num_bytes: bytes of the folder's tensors.
        new_bytes: decoded bytes of tensors and files that the zoo did not have.
        stored_bytes: bytes written for them; fewer where differences are smaller.
        num_blobs: tensors (chunks of large ones) and files.
        num_new_blobs: of these, stored now.
        ignored: tensors that no block uses, kept for export only.
        seconds: time it took.
        remarks: what was left out, or found out instead of being said; a sentence each.
        base_doubt: a sentence where an adapter names another base than the one it was registered on, or "".
        restored: objects of an unchanged version that were missing in the zoo and are stored again.
    """

    record: VariantRecord
    unchanged: bool
    num_bytes: int
    new_bytes: int
    stored_bytes: int
    num_blobs: int
    num_new_blobs: int
    ignored: tuple[str, ...]
    seconds: float
    remarks: tuple[str, ...] = ()
    base_doubt: str = ""
    restored: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the result for `--json`, flat where the record is concerned."""
        fields = JsonReport.to_json(self)
        record = fields.pop("record")
        return {**{key: record[key] for key in ("name", "version", "kind", "chain", "provenance")}, **fields}


class RegisterJob:
    """One registration: what both kinds of folder need."""

    def __init__(
        self,
        store: WritableZoo,
        folder: ModelFolder,
        name: str,
        progress: Progress,
        origin: Mapping[str, str] | None = None,
    ) -> None:
        self._origin = origin or {}
        self.store = store
        self.folder = folder
        self.name = name
        self.totals = Totals()
        self._progress = progress
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._tokenizer: bytes | None = None
        self._before: VariantRecord | None = None

    def inspect(self, uploads: Mapping[str, Upload]) -> Pieces:
        """Refuse NaN and infinity in the tensors that are to be stored, and a tokenizer beyond its bounds.

        Nothing is written yet.
        """
        with ThreadPoolExecutor(1) as beside, self.task("checking weights") as on_bytes:
            checking = beside.submit(check_tokenizer, self._tokenizer) if self._tokenizer else None
            pieces = inspect_uploads(uploads, on_bytes, workers=min(_MAX_CHECK_WORKERS, os.cpu_count() or 1))
            if checking is not None:
                checking.result()
            return pieces

    def read_files(self) -> dict[str, bytes]:
        """Read and check the files beside the weights; `inspect` checks the tokenizer."""
        files = {name: read_kept_file(path) for name, path in self.folder.files.items()}
        self._tokenizer = files.get(TOKENIZER)
        return files

    def convert_tokenizer(self, files: Mapping[str, bytes]) -> tuple[dict[str, bytes], tuple[str, ...]]:
        """Return the tokenizer.json of a folder that has a tokenizer in another form only, and what to note.

        Raises:
            InvalidConfigError: the conversion fails.
        """
        source = source_of(files)
        if source is None:
            return {}, ()
        try:
            self._tokenizer = convert_tokenizer(self.folder.path, source)
        except MissingPackageError as error:
            return {}, (not_converted_note(error),)
        return {CONVERTED: self._tokenizer}, (converted_note(source),)

    @contextmanager
    def task(self, title: str, more_bytes: int = 0) -> Iterator[Callable[[int], None]]:
        """Report one pass over the folder's tensors; what it yields may be called from any thread.

        Args:
            title: what is done.
            more_bytes: what is dealt with besides the tensors.
        """
        left = self.folder.num_bytes + more_bytes
        self._progress.start(title, left)

        def advance(num_bytes: int) -> None:
            nonlocal left
            with self._lock:
                # How the files say which tensor is where is known at the end only, and small.
                counted = min(num_bytes, left)
                left -= counted
                self._progress.advance(counted)

        try:
            yield advance
        finally:
            self._progress.finish()

    @contextmanager
    def registration(self) -> Iterator[Writer]:
        """Begin to write."""
        with suppress(CorruptManifestError):
            self._before = self.store.current(self.name)
        with (
            self.task("storing", sum(path.stat().st_size for path in self.folder.files.values())) as on_bytes,
            self.store.registration(f"register {self.name}", on_bytes=on_bytes) as registration,
        ):
            yield registration

    def provenance(self, base: Outline | None) -> dict[str, str]:
        """Say where the variant comes from."""
        facts = {
            "source": str(self.folder.path.resolve()),
            "registered_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "registered_by": f"blockzoo {_version()}",
            "num_bytes": str(self.folder.num_bytes),
            **self._origin,
        }
        return facts if base is None else {**facts, "base": base.ref}

    def finish(
        self,
        registration: Writer,
        chain: ChainId,
        files: Mapping[str, FileRef],
        provenance: Mapping[str, str],
        ignored: Sequence[str] = (),
    ) -> RegisterResult:
        """Commit, unless the current version is the same already."""
        kind = self.folder.kind.value
        done = registration.commit_unless_same(
            self.name, chain, kind=kind, files=files, provenance=provenance
        )
        return RegisterResult(
            record=done.record,
            unchanged=done.unchanged,
            num_bytes=self.folder.num_bytes,
            new_bytes=self.totals.new_bytes,
            stored_bytes=self.totals.stored_bytes,
            num_blobs=self.totals.blobs,
            num_new_blobs=self.totals.new_blobs,
            ignored=tuple(ignored),
            seconds=time.monotonic() - self._started,
            # Of a version that another writer made meanwhile nothing was lost: both stored it.
            restored=done.restored if done.record == self._before else 0,
        )


@cache
def _version() -> str:
    return importlib.metadata.version("blockzoo")


def noted(notes: Sequence[str]) -> dict[str, str]:
    """Return the provenance's entry for surprises in a folder."""
    return {"notes": "; ".join(notes)} if notes else {}


def read_outline(store: WritableZoo, record: VariantRecord) -> Outline:
    """Return the chain of a variant; its lists of modules and tensors are made once for many adapters."""
    ref = f"{record.name}@{record.version}"
    with _OUTLINES_LOCK:
        known = _OUTLINES.setdefault(store.remembered, OrderedDict())
        found = known.get((ref, record.chain))
    if found is None:
        found = Outline.read(store.remembered, ref, record.chain)
    with _OUTLINES_LOCK:
        known[ref, record.chain] = found
        known.move_to_end((ref, record.chain))
        while len(known) > _MAX_OUTLINES:
            known.popitem(last=False)
    return found


_OUTLINES_LOCK = threading.Lock()
_OUTLINES: WeakKeyDictionary[Manifests, OrderedDict[tuple[str, ChainId], Outline]] = WeakKeyDictionary()
_MAX_OUTLINES = 4


def folder_layout(folder: ModelFolder, tensors: Mapping[str, InBlock | InFile]) -> FolderLayout:
    """Return what `export` needs to write the folder again."""
    return FolderLayout(
        filenames=tuple(folder.files),
        shards={shard.path.name: shard.header.decode("utf-8") for shard in folder.shards},
        tensors=tensors,
    )


def with_tied(head: BlockManifest, embedding: BlockManifest) -> BlockManifest:
    """Record whether the matrices are the same; the bytes decide, whatever the config says."""
    tied = head.tensors["lm_head.weight"] == embedding.tensors["weight"]
    return replace(head, config={**head.config, "tied": tied})
