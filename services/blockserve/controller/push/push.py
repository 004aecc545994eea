"""One push at the server: what was sent, what was proved, and the registration that holds the lease.

Bytes wait in memory until a blob is whole, its digest right and its numbers finite; then they are stored
like those of a local registration. A push that ends early leaves blobs that nothing names.
"""

from __future__ import annotations

import hmac
import secrets
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from blockserve.common.api.push import Piece, Standing
from blockserve.common.errors import (
    PossessionError,
    PushNotFoundError,
    WrongDigestError,
)
from blockserve.common.wire.possession import NONCE_BYTES, possession_mac
from blockserve.controller.push.budget import Budget
from blockserve.controller.push.commit import Wish, commit_wish, unknown_blob
from blockserve.controller.push.limits import ControllerConfig
from blockzoo.digest import blob_id, num_bytes
from blockzoo.errors import BlobNotFoundError, ConflictError, InvalidInputError, NonFiniteWeightsError
from blockzoo.folders.finite import is_finite
from blockzoo.manifest import BlobId, BlockId, VariantRecord
from blockzoo.store.blobs import TensorData
from blockzoo.store.closure import Walker
from blockzoo.store.registration import Registration
from blockzoo.store.writing import Committed, Stored
from blockzoo.store.zoo_store import ZooStore

CLOSE_SECONDS = 2.0
"""How long ending a push waits for a call that is at work; a server that stops has little time."""


class Push:
    """A push; its methods block and may be called from several threads.

    Attributes:
        nonce: key of every proof.
    """

    def __init__(self, store: ZooStore, purpose: str, config: ControllerConfig, budget: Budget) -> None:
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        self._store = store
        self._config = config
        self._budget = budget
        self._registration: Registration | None = store.registration(purpose)
        self._lock = threading.Lock()
        self._held: dict[BlobId, Stored] = {}
        self._blocks: set[BlockId] = set()
        self._bases: dict[str, VariantRecord] = {}
        self._partial: dict[BlobId, tuple[TensorData, bytearray]] = {}
        self._whole: dict[BlobId, TensorData] = {}
        self._whole_bytes = 0
        self._asked: set[BlobId] = set()
        self._result: Committed | None = None

    def find(self, blobs: Sequence[BlobId]) -> list[Standing]:
        """Lease blobs and say where each stands."""
        with self._lock:
            registration = self._open()
            self._store_whole()
            self._ask(blobs)
            missing = registration.missing(blobs)
            if not self._config.prove_possession:
                self._hold(blob for blob in blobs if blob not in missing)
            return [self._standing(blob, blob in missing) for blob in blobs]

    def prove(self, proofs: Mapping[BlobId, bytes]) -> None:
        """Take blobs of the zoo as the push's own, whose bytes it proves to have.

        Raises:
            PossessionError: a proof is wrong, or the blob is not in the zoo.
        """
        with self._lock:
            registration = self._open()
            self._ask(proofs)
            registration.missing(list(proofs))
            for blob, mac in proofs.items():
                if not self._is_proved(blob, mac):
                    raise PossessionError(
                        f"the proof for blob {blob} is wrong",
                        hint="Your bytes differ from those that the digest names.",
                        blob=blob,
                    )
                self._hold([blob])

    def receive_all(self, pieces: Sequence[Piece]) -> None:
        """`receive` each of them, in order."""
        for piece in pieces:
            self.receive(piece)

    def receive(self, piece: Piece) -> None:
        """Take bytes of a blob, those after what has come in before; bytes known already are passed over.

        Raises:
            ConflictError: bytes before these are missing; another connection may be sending them.
            WrongDigestError, NonFiniteWeightsError: the blob is refused; it may be sent again from its begin.
            PushCapacityError: too many bytes wait to be complete or stored.
        """
        with self._lock:
            self._open()
            if piece.blob in self._held or piece.blob in self._whole:
                return
            tensor, received = self._partial_of(piece)
            size = num_bytes(tensor.dtype, tensor.shape)
            if piece.offset > len(received):
                raise ConflictError(
                    f"byte {piece.offset} of blob {piece.blob} came before byte {len(received)}",
                    hint="Ask FindBlobs which bytes are missing, and send from there.",
                )
            new = memoryview(piece.data)[len(received) - piece.offset :]
            if len(received) + len(new) > size:
                raise InvalidInputError(f"blob {piece.blob} has more bytes than its shape asks for")
            self._budget.take(len(new))
            received += new
            if len(received) == size:
                self._complete(tensor, received)

    def settle(self) -> None:
        """Store every whole blob."""
        with self._lock:
            self._open()
            self._store_whole()

    def rely_on(self, record: VariantRecord) -> None:
        """Lease what a registered variant needs, and let the push name it."""
        with self._lock:
            self._open().rely_on_variant(record)
            walker = Walker(self._store, with_bases=False)
            walker.add_record(record)
            self._blocks |= walker.closure.blocks
            self._hold(walker.closure.blobs)
            self._bases[f"{record.name}@{record.version}"] = record

    def commit(self, wish: Wish) -> Committed:
        """Check everything and make the version visible; asked again, tell what came of it before.

        Raises:
            UnknownBlobError: a manifest names a blob or block that is not the push's.
            BlockzooError: see `commit_wish`.
        """
        with self._lock:
            if self._result is None:
                registration = self._open()
                self._store_whole()
                self._result = commit_wish(
                    self._store, registration, wish, set(self._held), self._blocks, self._bases
                )
                self._end()
            return self._result

    @property
    def is_busy(self) -> bool:
        """Whether a call is at work; it may wait for a collection for minutes."""
        return self._lock.locked()

    def close(self) -> None:
        """End: drop the lease and what is half sent; behind a call that does not end, the lease runs out."""
        if self._lock.acquire(timeout=CLOSE_SECONDS):
            try:
                self._end()
            finally:
                self._lock.release()

    def _open(self) -> Registration:
        if self._registration is None:
            raise PushNotFoundError("the push has ended", hint="Begin another.")
        try:
            self._registration.renew()
        except ConflictError as error:
            # What was found to exist may be gone.
            self._end()
            raise PushNotFoundError("the push has lost its lease", hint="Begin another.") from error
        return self._registration

    def _end(self) -> None:
        if self._registration is None:
            return
        for _, received in self._partial.values():
            self._budget.give(len(received))
        self._budget.give(self._whole_bytes)
        self._partial, self._whole, self._whole_bytes = {}, {}, 0
        registration, self._registration = self._registration, None
        registration.__exit__(None, None, None)

    def _ask(self, blobs: Iterable[BlobId]) -> None:
        """Count what the push is about: each blob costs memory, and a lease those of a zoo on a disk."""
        asked = self._asked.union(blobs)
        if len(asked) > self._config.max_push_blobs:
            raise InvalidInputError(f"a push may have {self._config.max_push_blobs} blobs")
        self._asked = asked

    def _is_proved(self, blob: BlobId, mac: bytes) -> bool:
        try:
            data = self._store.blobs.read(blob)
        except BlobNotFoundError:
            return False
        return hmac.compare_digest(possession_mac(self.nonce, blob, data), mac)

    def _standing(self, blob: BlobId, is_missing: bool) -> Standing:
        if blob in self._held:
            return Standing(stored=self._held[blob])
        if not is_missing:
            return Standing(is_there=True)
        received = len(self._partial[blob][1]) if blob in self._partial else 0
        return Standing(received=received)

    def _partial_of(self, piece: Piece) -> tuple[TensorData, bytearray]:
        if piece.blob not in self._partial:
            self._ask([piece.blob])
            size = num_bytes(piece.dtype, piece.shape)
            if size > self._config.max_unstored_bytes:
                raise InvalidInputError(
                    f"blob {piece.blob} has {size} bytes, more than this server takes",
                    hint="Raise controller.max_unstored_bytes on the server.",
                    blob=piece.blob,
                )
            if piece.base is not None and piece.base not in self._held:
                raise unknown_blob(piece.base)
            tensor = TensorData(piece.dtype, piece.shape, b"", piece.base, piece.blob)
            self._partial[piece.blob] = tensor, bytearray()
        tensor, received = self._partial[piece.blob]
        if (tensor.dtype, tensor.shape) != (piece.dtype, piece.shape):
            raise InvalidInputError(
                f"blob {piece.blob} was begun with another type or shape", blob=piece.blob
            )
        return tensor, received

    def _complete(self, tensor: TensorData, received: bytearray) -> None:
        assert tensor.blob is not None
        del self._partial[tensor.blob]
        data = memoryview(received).toreadonly()
        try:
            _check_bytes(tensor, data)
        except BaseException:
            self._budget.give(len(data))
            raise
        self._whole[tensor.blob] = replace(tensor, data=data)
        self._whole_bytes += len(data)
        if self._whole_bytes >= self._config.store_every_bytes:
            self._store_whole()

    def _store_whole(self) -> None:
        if not self._whole:
            return
        registration = self._open()
        whole, self._whole = self._whole, {}
        waiting, self._whole_bytes = self._whole_bytes, 0
        try:
            stored = registration.put_tensors(list(whole.values()))
            registration.flush()
            self._held.update(zip(whole, stored, strict=True))
        finally:
            # Also when it failed: nobody knows whether there will be room, and the pusher has the bytes.
            self._budget.give(waiting)

    def _hold(self, blobs: Iterable[BlobId]) -> None:
        for blob in blobs:
            self._held.setdefault(blob, Stored(blob, created=False, stored_bytes=0))


def _check_bytes(tensor: TensorData, data: memoryview) -> None:
    if blob_id(tensor.dtype, tensor.shape, data) != tensor.blob:
        raise WrongDigestError(
            f"the bytes sent as blob {tensor.blob} hash to something else",
            hint="Push again; if it happens again, the file or the memory of the pusher is damaged.",
            blob=tensor.blob,
        )
    if not is_finite(tensor.dtype, data):
        raise NonFiniteWeightsError(
            f"blob {tensor.blob} holds NaN or infinity",
            hint="The training probably diverged; register an earlier checkpoint.",
            tensor=tensor.blob,
        )
