"""What an export reads of a server's zoo: `blockzoo.folders.export.Source` over the network.

Blobs come in one stream, in the order in which they are written. When the stream breaks, another one goes on
in the blob that was incomplete. One blob at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress

from blockproto.v1 import zoo_pb2
from blockserve.client.zoo_calls import STREAM_SECONDS, Calls, Patience
from blockserve.common.errors import ExportInterruptedError, UnavailableError
from blockzoo.digest import Buffer, blob_id
from blockzoo.errors import BlockzooError, CorruptBlobError
from blockzoo.folders.export import WantedBlob
from blockzoo.manifest import BlockId, BlockManifest, ChainId, ChainManifest
from blockzoo.store.writing import Manifests


class RemoteSource:
    """One version of a variant behind a server. Used by one thread.

    Args:
        calls: the connection.
        manifests: where the version's chain and blocks are read.
        ref: name@version.
        max_digests: most digests of one call.
        patience_s: seconds to go on trying while nothing moves.
    """

    def __init__(
        self, calls: Calls, manifests: Manifests, ref: str, *, max_digests: int, patience_s: float
    ) -> None:
        self._calls = calls
        self._manifests = manifests
        self._ref = ref
        self._max_digests = max_digests
        self._patience = Patience(patience_s, _interrupted)

    def get_chain(self, chain: ChainId) -> ChainManifest:
        """See `Source`."""
        return self._manifests.get_chain(chain)

    def get_block(self, block: BlockId) -> BlockManifest:
        """See `Source`."""
        return self._manifests.get_block(block)

    def read(
        self, wanted: Sequence[WantedBlob], on_bytes: Callable[[int], None] | None = None
    ) -> Generator[Buffer, None, None]:
        """See `Source`.

        Raises:
            ExportInterruptedError: the connection broke, and did not come back in time.
            CorruptBlobError: the server sent other bytes than the manifests name, or its own are damaged.
        """
        for start in range(0, len(wanted), self._max_digests):
            stream = _Stream(self._calls, self._ref, wanted[start : start + self._max_digests])
            try:
                for item in stream.wanted:
                    yield self._read_one(stream, item, on_bytes or (lambda _: None))
            finally:
                stream.close()

    def _read_one(self, stream: _Stream, item: WantedBlob, on_bytes: Callable[[int], None]) -> Buffer:
        data = bytearray()

        def receive() -> None:
            try:
                for part in stream.parts(item, len(data)):
                    data.extend(part)
                    self._patience.progress()
                    on_bytes(len(part))
            except BaseException:
                stream.close()
                raise

        self._patience.attempt(receive)
        if blob_id(item.dtype, item.shape, data) != item.blob:
            raise _wrong(item, "its bytes hash to something else")
        stream.advance()
        return data


class _Stream:
    """Blobs in order, in as many calls as it takes.

    Attributes:
        wanted: all of them.
    """

    def __init__(self, calls: Calls, ref: str, wanted: Sequence[WantedBlob]) -> None:
        self.wanted = wanted
        self._calls = calls
        self._ref = ref
        self._position = 0
        self._messages: Generator[zoo_pb2.DownloadBlobsResponse, None, None] | None = None
        self._parts: Iterator[zoo_pb2.BlobPart] = iter(())

    def parts(self, item: WantedBlob, received: int) -> Iterator[bytes]:
        """Yield the rest of the blob whose turn it is."""
        is_whole = False
        while not is_whole:
            part = self._next_part(received)
            end = part.offset + len(part.data)
            is_whole = end == item.num_bytes
            if part.blob != item.blob or part.offset != received or end > item.num_bytes:
                raise _wrong(item, "the server sent something else")
            if not (part.data or is_whole):
                raise _wrong(item, "the server sent nothing")
            received = end
            yield part.data

    def advance(self) -> None:
        """Go on to the next blob. After the last one wait for the end of the call: servers count calls."""
        self._position += 1
        if self._position == len(self.wanted) and self._messages is not None:
            with suppress(BlockzooError):
                next(self._messages, None)
            self.close()

    def close(self) -> None:
        """End the call, if there is one."""
        messages, self._messages, self._parts = self._messages, None, iter(())
        if messages is not None:
            messages.close()

    def _next_part(self, received: int) -> zoo_pb2.BlobPart:
        while (part := next(self._parts, None)) is None:
            if self._messages is None:
                self._messages = self._calls.stream(
                    "DownloadBlobs", self._request(received), timeout=STREAM_SECONDS
                )
            message = next(self._messages, None)
            if message is None:
                self._messages = None
                raise UnavailableError("the stream ended before all bytes had come", code="UNAVAILABLE")
            self._parts = iter(message.parts)
        return part

    def _request(self, received: int) -> zoo_pb2.DownloadBlobsRequest:
        blobs = [item.blob for item in self.wanted[self._position :]]
        return zoo_pb2.DownloadBlobsRequest(ref=self._ref, blobs=blobs, offset=received)


def _wrong(item: WantedBlob, problem: str) -> CorruptBlobError:
    return CorruptBlobError(
        f"blob {item.blob} came damaged: {problem}",
        hint="Export again. If that does not help, run `blockzoo verify` on the server's zoo.",
        blob=item.blob,
    )


def _interrupted(seconds: float, error: BlockzooError) -> ExportInterruptedError:
    return ExportInterruptedError(
        f"the export made no progress for {seconds:g} s: {error}",
        hint="Run the command again when the server is back. An interrupted export leaves nothing behind.",
    )
