"""The exports that a server runs: how many, and which blobs each may read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence

from blockserve.common.api.push import Part
from blockserve.common.errors import ExportCapacityError, UnknownBlobError
from blockserve.controller.push.budget import RETRY_AFTER_SECONDS
from blockserve.controller.push.limits import ControllerConfig
from blockzoo.errors import InvalidInputError
from blockzoo.manifest import BlobId
from blockzoo.store.writing import blobs_of
from blockzoo.zoo import Zoo

PART_OVERHEAD = 128
"""Bytes of a message other than tensor bytes, for each part in it."""


class Export:
    """One stream of blobs that is being sent.

    Attributes:
        moved: when its caller took a message last.
        is_given_up: it has not moved for too long, and another one has its place.
        stop: ends the call that sends it.
    """

    def __init__(self, now: float, stop: Callable[[], object]) -> None:
        self.moved = now
        self.stop = stop
        self.is_given_up = False


class Exports:
    """Counts exports; safe from several threads."""

    def __init__(
        self, zoo: Zoo, config: ControllerConfig, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._zoo = zoo
        self._config = config
        self._clock = clock
        self._lock = threading.Lock()
        self._running: set[Export] = set()

    def begin(self, stop: Callable[[], object]) -> Export:
        """Count an export in, in the place of one whose caller has read nothing for too long.

        Args:
            stop: ends the call that sends it. One whose caller reads nothing waits for ever, and holds
                what it was about to send.

        Raises:
            ExportCapacityError: as many run as may.
        """
        most = self._config.max_exports
        if not most:
            raise ExportCapacityError(
                "this server exports nothing",
                retry_after=0.0,
                hint="Its setting controller.max_exports is 0. Export where the zoo can be opened (--zoo).",
            )
        with self._lock:
            self._give_up_idle()
            if len(self._running) >= most:
                raise ExportCapacityError(
                    f"{len(self._running)} exports run, the maximum of this server",
                    retry_after=RETRY_AFTER_SECONDS,
                )
            export = Export(self._clock(), stop)
            self._running.add(export)
            return export

    def move(self, export: Export) -> None:
        """Note that the caller took a message; raises ExportCapacityError when it took too long."""
        with self._lock:
            if export.is_given_up:
                raise ExportCapacityError(
                    "the export was idle for too long, and another one took its place",
                    retry_after=RETRY_AFTER_SECONDS,
                )
            export.moved = self._clock()

    def end(self, export: Export) -> None:
        """Count an export out."""
        with self._lock:
            self._running.discard(export)

    def messages(self, ref: str, blobs: Sequence[BlobId], offset: int) -> Generator[list[Part], None, None]:
        """Yield what each message carries: bytes of blobs in this order, the first from `offset` on.

        Raises:
            VariantNotFoundError: there is no such version.
            UnknownBlobError: a blob is not part of it.
            InvalidInputError: the first blob has no such offset.
            BlobNotFoundError, CorruptBlobError: a blob is missing or damaged.
        """
        self._check(ref, blobs)
        parts: list[Part] = []
        room = self._config.max_piece_bytes
        for blob in blobs:
            data = self._zoo.store.blobs.read(blob)
            if offset > data.nbytes:
                raise InvalidInputError(
                    f"blob {blob} has {data.nbytes} bytes, none at {offset}", field="offset"
                )
            while True:
                part = bytes(data[offset : offset + room])
                parts.append(Part(blob, offset, part))
                offset, room = offset + len(part), room - len(part) - PART_OVERHEAD
                if room <= 0:
                    yield parts
                    parts, room = [], self._config.max_piece_bytes
                if offset >= data.nbytes:
                    break
            offset = 0
        if parts:
            yield parts

    def _check(self, ref: str, blobs: Sequence[BlobId]) -> None:
        """Raise unless the version's files and blocks name all of these blobs."""
        record = self._zoo.resolve(ref)
        links = self._zoo.chain(record.chain).links
        blocks = dict.fromkeys(block for link in links for block in (link.base, *link.applied))
        named = {file.blob for file in record.files.values()}
        named.update(blob for block in blocks for blob in blobs_of(self._zoo.block(block)))
        for blob in blobs:
            if blob not in named:
                raise _not_part(blob, f"{record.name}@{record.version}")

    def _give_up_idle(self) -> None:
        deadline = self._clock() - self._config.push_idle_seconds
        for export in [one for one in self._running if one.moved < deadline]:
            export.is_given_up = True
            self._running.discard(export)
            export.stop()


def _not_part(blob: BlobId, ref: str) -> UnknownBlobError:
    """The same whether or not the zoo has it."""
    return UnknownBlobError(
        f"{blob} is not part of {ref}", hint="Only what a version is made of can be read.", digest=blob
    )
