"""What registering needs of a zoo, be it a storage at hand (`store`, `registration`) or a server far away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from blockzoo.canonical import canonical_json, digest_bytes
from blockzoo.manifest import (
    BlobId,
    BlockId,
    BlockManifest,
    ChainId,
    ChainManifest,
    FileRef,
    VariantRecord,
)
from blockzoo.manifest_json import block_bytes, chain_to_json
from blockzoo.store.blobs import TensorData


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of one tensor.

    Attributes:
        blob: its id.
        created: whether this registration stored it; otherwise it was there.
        stored_bytes: bytes written for it, 0 when it was there.
    """

    blob: BlobId
    created: bool
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class Committed:
    """What became of a version that was to be registered.

    Attributes:
        record: the version that has this content now.
        unchanged: it was current already, so no version was made.
        restored: objects of an unchanged version that were missing and are stored again.
    """

    record: VariantRecord
    unchanged: bool = False
    restored: int = 0


class Manifests(Protocol):
    """Where chains and blocks are read."""

    def get_chain(self, chain: ChainId) -> ChainManifest:
        """Return a chain."""

    def get_block(self, block: BlockId) -> BlockManifest:
        """Return a block."""


class ManifestWriter(Protocol):
    """Where the manifests of a new chain go."""

    def put_blocks(self, blocks: Sequence[BlockManifest]) -> list[BlockId]:
        """Take block manifests whose blobs are stored; return their ids in order."""

    def put_chain(self, chain: ChainManifest) -> ChainId:
        """Take a chain manifest whose blocks are stored."""


class Writer(ManifestWriter, Protocol):
    """One registration; `blockzoo.store.registration.Registration` says more about each step."""

    def put_tensors(self, tensors: Sequence[TensorData]) -> list[Stored]:
        """Store tensors that are missing."""

    def rely_on_variant(self, record: VariantRecord) -> None:
        """Lease what a registered variant needs, for building on it."""

    def commit_unless_same(
        self,
        name: str,
        chain: ChainId,
        *,
        kind: str,
        files: Mapping[str, FileRef],
        provenance: Mapping[str, str],
    ) -> Committed:
        """Make the chain the next version of a variant, unless the current one is the same."""


class WritableZoo(Manifests, Protocol):
    """The part of `blockzoo.store.zoo_store.ZooStore` that registering uses."""

    @property
    def remembered(self) -> Manifests:
        """Chains and blocks, read once: what a digest names, and not whether it is still there."""

    def check_writable(self) -> None:
        """Raise unless registering may begin."""

    def resolve(self, name: str, version: int | None = None) -> VariantRecord:
        """Return a version of a variant, the current one when None (VariantNotFoundError)."""

    def current(self, name: str) -> VariantRecord | None:
        """Return the current version of a variant, None when it is not registered."""

    def names(self) -> list[str]:
        """Return the names that are registered."""

    def registration(
        self, purpose: str, *, on_bytes: Callable[[int], None] | None = None
    ) -> AbstractContextManager[Writer]:
        """Begin to write."""


class ManifestRecorder:
    """Names manifests and keeps them instead of storing them.

    Attributes:
        blocks: canonical bytes of every block, by id.
        chains: canonical bytes of every chain, by id.
    """

    def __init__(self) -> None:
        self.blocks: dict[BlockId, bytes] = {}
        self.chains: dict[ChainId, bytes] = {}

    def put_blocks(self, blocks: Sequence[BlockManifest]) -> list[BlockId]:
        """See `ManifestWriter`."""
        bodies = [block_bytes(block) for block in blocks]
        ids = [BlockId(digest_bytes(body)) for body in bodies]
        self.blocks.update(zip(ids, bodies, strict=True))
        return ids

    def put_chain(self, chain: ChainManifest) -> ChainId:
        """See `ManifestWriter`."""
        body = canonical_json(chain_to_json(chain))
        digest = ChainId(digest_bytes(body))
        self.chains[digest] = body
        return digest


def blobs_of(block: BlockManifest) -> set[BlobId]:
    """Return the blobs that a block names."""
    return {blob for tensor in block.tensors.values() for blob in tensor.blobs}
