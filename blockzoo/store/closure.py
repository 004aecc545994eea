"""What a variant needs: the walk from refs over chains and blocks to blobs and the bases of differences."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from blockzoo import layout
from blockzoo.errors import BlockzooError
from blockzoo.manifest import BlobId, BlockId, ChainId, VariantRecord
from blockzoo.store.objects import Objects
from blockzoo.store.writing import Manifests

Problem = Callable[[str, BlockzooError], None]
"""Told a digest and why it could not be followed."""


def ignore_problem(digest: str, error: BlockzooError) -> None:
    """Go on as far as the walk goes."""


@dataclass
class Closure:
    """Digests that are needed, each kind on its own.

    Attributes:
        bases: for each blob whose header was read: the base of its difference, or None when it is raw.
    """

    chains: set[ChainId] = field(default_factory=set)
    blocks: set[BlockId] = field(default_factory=set)
    blobs: set[BlobId] = field(default_factory=set)
    bases: dict[BlobId, BlobId | None] = field(default_factory=dict)

    def digests(self) -> set[str]:
        """Return all of them."""
        return {*self.chains, *self.blocks, *self.blobs}

    def objects(self) -> dict[str, str]:
        """Return the key of everything that is needed, with its digest."""
        keys: dict[str, str] = {layout.chain_key(digest): digest for digest in self.chains}
        keys.update((layout.block_key(digest), digest) for digest in self.blocks)
        keys.update((layout.blob_key(digest), digest) for digest in self.blobs)
        return keys


class Walker:
    """Collects a closure, reading every manifest and every blob's header once.

    Args:
        store: where to read.
        manifests: where to read chains and blocks instead.
        on_problem: called for what is missing or damaged; the walk goes on. Without it the error is raised.
        with_bases: also follow encoded blobs to their bases, which costs a read for each blob.
    """

    def __init__(
        self,
        store: Objects,
        on_problem: Problem | None = None,
        *,
        with_bases: bool = True,
        manifests: Manifests | None = None,
    ) -> None:
        self.closure = Closure()
        self._store = store
        self._manifests = manifests or store
        self._on_problem = on_problem
        self._with_bases = with_bases

    def add_record(self, record: VariantRecord) -> None:
        """Add what one version of a variant needs."""
        if not record.deleted:
            self.add_chain(record.chain)
        self.add_blobs(file.blob for file in record.files.values())

    def add_chain(self, chain: ChainId) -> None:
        """Add a chain and what it needs."""
        if chain in self.closure.chains:
            return
        self.closure.chains.add(chain)
        try:
            links = self._manifests.get_chain(chain).links
        except BlockzooError as error:
            self._report(chain, error)
            return
        for link in links:
            for block in (link.base, *link.applied):
                self.add_block(block)

    def add_block(self, block: BlockId) -> None:
        """Add a block and what it needs."""
        if block in self.closure.blocks:
            return
        self.closure.blocks.add(block)
        try:
            tensors = self._manifests.get_block(block).tensors
        except BlockzooError as error:
            self._report(block, error)
            return
        self.add_blobs(blob for tensor in tensors.values() for blob in tensor.blobs)

    def add_blobs(self, blobs: Iterable[BlobId]) -> None:
        """Add blobs and their bases."""
        for blob in blobs:
            if blob in self.closure.blobs:
                continue
            self.closure.blobs.add(blob)
            if self._with_bases:
                self._add_base(blob)

    def _add_base(self, blob: BlobId) -> None:
        try:
            bases = self._store.bases(blob)
        except BlockzooError as error:
            self._report(blob, error)
            return
        needed = {base for base in bases if base is not None}
        self.closure.bases[blob] = None if None in bases else min(needed)
        self.add_blobs(needed)

    def _report(self, digest: str, error: BlockzooError) -> None:
        if self._on_problem is None:
            raise error
        self._on_problem(digest, error)
