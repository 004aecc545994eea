"""A registration at a server: `blockzoo.store.writing.Writer` over the network.

Everything may be interrupted anywhere. After a break the server is asked again where each blob stands,
and only what it lacks is sent. When it was started again meanwhile, the push is begun anew: what had been
stored is proved instead of sent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from types import TracebackType
from typing import TypeVar

from blockproto.v1 import zoo_pb2
from blockserve.client.zoo_calls import STREAM_SECONDS, Calls, Patience
from blockserve.common.api.push import Standing
from blockserve.common.errors import PushNotFoundError
from blockserve.common.wire import zoo as wire
from blockserve.common.wire.possession import possession_mac
from blockzoo.digest import as_bytes, blob_id
from blockzoo.errors import BlockzooError, ConflictError, CorruptManifestError
from blockzoo.manifest import BlobId, BlockId, BlockManifest, ChainId, ChainManifest, FileRef, VariantRecord
from blockzoo.store.blobs import TensorData
from blockzoo.store.writing import Committed, ManifestRecorder, Stored

T = TypeVar("T")

STREAM_BYTES = 64 << 20
"""Tensor bytes of one call, so that its deadline means something: 0.1 MB/s."""
PIECE_OVERHEAD = 256
"""Bytes of a message other than tensor bytes, for each blob in it."""
PROVE_BYTES = 256 << 20
"""Tensor bytes proved in one call; the server reads them all."""
COMMIT_SECONDS = 600.0
"""Deadline of a commit, which may have to wait for a collection at the server."""


class RemoteWriter:
    """One push, as a context manager. Used by one thread.

    Args:
        calls: the connection.
        purpose: what is being registered, for people.
        piece_bytes: most tensor bytes of one message.
        max_digests: most digests of one call.
        patience_s: seconds to go on trying while nothing moves.
        on_bytes: called from any thread with the number of tensor bytes just dealt with.
        current: reads the current version of a variant, None when it is not registered.

    Attributes:
        sent_bytes: tensor bytes that were given to the connection.
    """

    def __init__(
        self,
        calls: Calls,
        purpose: str,
        *,
        piece_bytes: int,
        max_digests: int,
        patience_s: float,
        on_bytes: Callable[[int], None] | None = None,
        current: Callable[[str], VariantRecord | None] = lambda _: None,
    ) -> None:
        self._calls = calls
        self._purpose = purpose
        self._piece_bytes = piece_bytes
        self._max_digests = max_digests
        self._patience = Patience(patience_s)
        self._on_bytes = on_bytes or (lambda _: None)
        self._current = current
        self._push_id = ""
        self._is_caught_up = False
        self._nonce = b""
        self._tensors: dict[BlobId, TensorData] = {}
        self._relied: list[str] = []
        self._manifests = ManifestRecorder()
        self._reported: set[BlobId] = set()
        self._lock = threading.Lock()
        self._counted: dict[BlobId, int] = {}
        self._least_missing = -1
        self.sent_bytes = 0

    def __enter__(self) -> RemoteWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._push_id:
            # What was committed stays so; a push that the server does not hear of again ends by itself.
            with suppress(BlockzooError):
                self._calls.call("AbortPush", zoo_pb2.AbortPushRequest(push_id=self._push_id), timeout=5.0)

    def put_tensors(self, tensors: Sequence[TensorData]) -> list[Stored]:
        """Bring tensors into the server's zoo that are missing there.

        Raises:
            PushInterruptedError: the connection broke, and did not come back in time.
            WrongDigestError, NonFiniteWeightsError: the server refuses what it got.
            StorageFullError: the server has no room.
        """
        blobs = [item.blob or blob_id(item.dtype, item.shape, item.data, threads=1) for item in tensors]
        self._least_missing = -1
        for blob, tensor in zip(blobs, tensors, strict=True):
            self._tensors.setdefault(blob, tensor)
        stored = self._patience.attempt(lambda: self._in_push(lambda: self._deliver(blobs)))
        return [self._report(stored[blob]) for blob in blobs]

    def put_blocks(self, blocks: Sequence[BlockManifest]) -> list[BlockId]:
        """Keep block manifests for `commit`; returns their ids in order."""
        return self._manifests.put_blocks(blocks)

    def put_chain(self, chain: ChainManifest) -> ChainId:
        """Keep a chain manifest for `commit`."""
        return self._manifests.put_chain(chain)

    def rely_on_variant(self, record: VariantRecord) -> None:
        """Have the server lease what a registered variant needs; manifests may then name it."""
        ref = f"{record.name}@{record.version}"
        self._patience.attempt(lambda: self._in_push(lambda: self._rely_on(ref)))
        self._relied.append(ref)

    def commit_unless_same(
        self,
        name: str,
        chain: ChainId,
        *,
        kind: str,
        files: Mapping[str, FileRef],
        provenance: Mapping[str, str],
    ) -> Committed:
        """Have the server check everything and make the chain the next version, unless the current one is it.

        Raises:
            PushInterruptedError: the connection broke; the version may be there or not.
            InvalidManifestError, UnknownBlobError, CheckpointError, AdapterError: the server refuses it.
        """
        request = zoo_pb2.CommitPushRequest(
            name=name,
            kind=kind,
            chain=self._manifests.chains[chain],
            blocks=list(self._manifests.blocks.values()),
            files=wire.files_to_message(files),
            provenance=dict(provenance),
        )
        before = None
        with suppress(CorruptManifestError):
            before = self._patience.attempt(lambda: self._current(name))
        done = self._patience.attempt(lambda: self._in_push(lambda: self._commit(request)))
        # A server of 0.1 gives the unchanged version back and does not say so.
        return replace(done, unchanged=True) if done.record == before else done

    def _commit(self, request: zoo_pb2.CommitPushRequest) -> Committed:
        request.push_id = self._push_id
        answer = self._calls.call("CommitPush", request, timeout=COMMIT_SECONDS)
        return Committed(wire.record_from_message(answer.record), answer.unchanged, answer.restored)

    def _in_push(self, act: Callable[[], T]) -> T:
        """Do something in a push that is known at the server."""
        try:
            if not self._push_id:
                self._begin()
            if not self._is_caught_up:
                self._catch_up()
            return act()
        except PushNotFoundError:
            self._push_id = ""
            raise

    def _begin(self) -> None:
        answer = self._calls.call("BeginPush", zoo_pb2.BeginPushRequest(purpose=self._purpose))
        self._push_id, self._nonce, self._is_caught_up = answer.push_id, answer.nonce, False

    def _catch_up(self) -> None:
        """Bring a new push to where the one before it was."""
        for ref in self._relied:
            self._rely_on(ref)
        self._deliver([blob for blob in self._tensors if blob in self._reported])
        self._is_caught_up = True

    def _rely_on(self, ref: str) -> None:
        self._calls.call("RelyOnVariant", zoo_pb2.RelyOnVariantRequest(push_id=self._push_id, ref=ref))

    def _deliver(self, blobs: Sequence[BlobId]) -> dict[BlobId, Stored]:
        """Prove what is there, send what is missing; return what became of each."""
        standings = self._find(dict.fromkeys(blobs))
        if any(item.stored is None for item in standings.values()):
            self._prove([blob for blob, item in standings.items() if item.is_there])
            self._send({blob: item.received for blob, item in standings.items() if _is_missing(item)})
            standings = self._find(standings)
        stored = {blob: item.stored for blob, item in standings.items() if item.stored is not None}
        for blob in stored:
            self._count(blob, as_bytes(self._tensors[blob].data).nbytes)
        if len(stored) < len(standings):
            raise ConflictError("the server lost bytes that were sent; they are sent again")
        return stored

    def _find(self, blobs: Mapping[BlobId, object]) -> dict[BlobId, Standing]:
        standings: dict[BlobId, Standing] = {}
        rest = iter(blobs)
        while some := list(islice(rest, self._max_digests)):
            request = zoo_pb2.FindBlobsRequest(push_id=self._push_id, blobs=some)
            # Leasing may have to wait for a collection at the server.
            answer = self._calls.call("FindBlobs", request, timeout=COMMIT_SECONDS)
            for blob, state in zip(some, answer.states, strict=True):
                standings[blob] = wire.standing_from_message(blob, state)
        self._note_progress(standings)
        return standings

    def _note_progress(self, standings: Mapping[BlobId, Standing]) -> None:
        missing = sum(
            1 if item.is_there else 2 + as_bytes(self._tensors[blob].data).nbytes - item.received
            for blob, item in standings.items()
            if item.stored is None
        )
        if self._least_missing < 0 or missing < self._least_missing:
            self._least_missing = missing
            self._patience.progress()

    def _prove(self, blobs: Sequence[BlobId]) -> None:
        for some in _groups(blobs, lambda blob: as_bytes(self._tensors[blob].data).nbytes, self._max_digests):
            proofs = [
                zoo_pb2.BlobProof(blob=blob, mac=possession_mac(self._nonce, blob, self._tensors[blob].data))
                for blob in some
            ]
            request = zoo_pb2.ProveBlobsRequest(push_id=self._push_id, proofs=proofs)
            self._calls.call("ProveBlobs", request, timeout=STREAM_SECONDS)
            for blob in some:
                self._count(blob, as_bytes(self._tensors[blob].data).nbytes)

    def _send(self, missing: Mapping[BlobId, int]) -> None:
        """Send bytes of blobs, each from where the server has them."""
        pieces = self._pieces(missing)
        while (first := next(pieces, None)) is not None:
            self._calls.call("UploadBlobs", self._one_stream(first, pieces), timeout=STREAM_SECONDS)

    def _one_stream(
        self, first: zoo_pb2.UploadBlobsRequest, rest: Iterator[zoo_pb2.UploadBlobsRequest]
    ) -> Iterator[zoo_pb2.UploadBlobsRequest]:
        """The messages of one call. gRPC takes the next when the connection has taken the one before."""
        message, room = first, STREAM_BYTES
        while True:
            room -= sum(len(piece.data) for piece in message.pieces)
            yield message
            for piece in message.pieces:
                self.sent_bytes += len(piece.data)
                self._count(BlobId(piece.blob), piece.offset + len(piece.data))
            if room <= 0:
                return
            following = next(rest, None)
            if following is None:
                return
            message = following

    def _pieces(self, missing: Mapping[BlobId, int]) -> Iterator[zoo_pb2.UploadBlobsRequest]:
        """Messages of at most a piece's bytes; small blobs share one."""
        message, room = zoo_pb2.UploadBlobsRequest(push_id=self._push_id), self._piece_bytes
        for blob, received in missing.items():
            tensor = self._tensors[blob]
            data = as_bytes(tensor.data)
            start = received
            while True:
                part = data[start : start + room]
                message.pieces.append(
                    zoo_pb2.BlobPiece(
                        blob=blob,
                        dtype=tensor.dtype.value,
                        shape=tensor.shape,
                        offset=start,
                        data=bytes(part),
                        base=tensor.base or "",
                    )
                )
                start, room = start + len(part), room - len(part) - PIECE_OVERHEAD
                if room <= 0 or len(message.pieces) >= self._max_digests:
                    yield message
                    message, room = zoo_pb2.UploadBlobsRequest(push_id=self._push_id), self._piece_bytes
                if start >= len(data):
                    break
        if message.pieces:
            yield message

    def _count(self, blob: BlobId, done: int) -> None:
        """Report bytes of a blob once, however often they are sent."""
        with self._lock:
            new = done - self._counted.get(blob, 0)
            if new <= 0:
                return
            self._counted[blob] = done
        self._on_bytes(new)

    def _report(self, stored: Stored) -> Stored:
        """Of equal tensors only the first is new."""
        if stored.blob in self._reported:
            return Stored(stored.blob, created=False, stored_bytes=0)
        self._reported.add(stored.blob)
        return stored


def _is_missing(standing: Standing) -> bool:
    return standing.stored is None and not standing.is_there


def _groups(blobs: Sequence[BlobId], size: Callable[[BlobId], int], most: int) -> Iterator[list[BlobId]]:
    """Some blobs at a time: not many bytes, not too many blobs."""
    group: list[BlobId] = []
    total = 0
    for blob in blobs:
        group.append(blob)
        total += size(blob)
        if total >= PROVE_BYTES or len(group) >= most:
            yield group
            group, total = [], 0
    if group:
        yield group
