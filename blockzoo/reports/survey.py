"""Sizes and sharing of what is registered: one reading of the manifests behind `ls`, `show`, `du`.

Blobs are not read. Their decoded sizes come from the manifests, their stored sizes
from a listing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from blockzoo import layout
from blockzoo.digest import num_bytes
from blockzoo.errors import BlockzooError, CorruptionError, NotFoundError
from blockzoo.folders.contents import OWN_PREFIX
from blockzoo.manifest import (
    BlobId,
    BlockId,
    BlockKind,
    BlockManifest,
    ChainId,
    ChainManifest,
    DType,
    JsonValue,
    VariantRecord,
)
from blockzoo.reports.facts import ChainFacts, ChainReader
from blockzoo.reports.values import Applied, Run, ShowReport, UsageReport, UsageRow, VariantRow
from blockzoo.store.blobs import TensorData
from blockzoo.store.writing import Manifests
from blockzoo.store.zoo_store import ZooStore

DAMAGED = "damaged"
"""Instead of the kind of a variant that cannot be read; `blockzoo verify` says why."""


class Survey:
    """A reading of a zoo at one moment.

    Args:
        store: the zoo.
        manifests: where to read chains and blocks, possibly with a cache.
        chains: where to read what `ls` needs of chains.
    """

    def __init__(self, store: ZooStore, manifests: Manifests, chains: ChainReader) -> None:
        self._store = store
        self._chains = chains
        self._manifests = manifests
        self._parts: dict[BlobId, tuple[DType, tuple[int, ...]]] = {}
        self._blocks: dict[BlockId, frozenset[BlobId]] = {}
        self._records: dict[str, list[VariantRecord]] = defaultdict(list)
        self._damaged: dict[str, int] = {}
        self._lost: set[tuple[str, int]] = set()
        self._bases: dict[BlobId, BlobId | None] = {}
        for record in store.records(lambda ref: self._note_damaged(ref.name, ref.version)):
            self._records[record.name].append(record)

    def rows(self) -> list[VariantRow]:
        """Return `ls`: the current version of every variant, of a damaged one no more than its name."""
        facts = self._facts()
        private = self._private_sizes(facts)
        rows = {
            name: _row(versions[-1], facts[versions[-1].chain], *private[name])
            for name, versions in self._records.items()
        }
        for name, version in self._damaged.items():
            if name not in rows or rows[name].version < version:
                rows[name] = VariantRow(name, version, DAMAGED, None, "", 0, 0, 0, "", "")
        return [row for _, row in sorted(rows.items())]

    def show(self, record: VariantRecord) -> ShowReport:
        """Return `show` of one version."""
        self._leave_out_damaged(self._blobs)
        chain = self._manifests.get_chain(record.chain)
        versions = tuple(other.version for other in self._records.get(record.name, ()))
        return ShowReport(
            name=record.name,
            version=record.version,
            current=record.version == max(versions, default=record.version),
            versions=versions,
            kind=record.kind,
            chain=record.chain,
            family=chain.family,
            context_length=chain.context_length,
            vocab_size=chain.vocab_size,
            runs=tuple(self._runs(record.name, chain)),
            checkpoint_bytes=self._checkpoint_bytes(record),
            private_bytes=self._decoded(self._private[record.name]),
            stored_bytes=self._stored_bytes(self._with_bases(self._blobs(record))),
            files={name: ref.size for name, ref in record.files.items() if not name.startswith(OWN_PREFIX)},
            provenance=record.provenance,
            missing=tuple(sorted(self._missing(record))),
        )

    def usage(self) -> UsageReport:
        """Return `du`."""
        self._leave_out_damaged(self._blobs)
        freed = self._freed()
        rows = [
            UsageRow(
                name=name,
                versions=len(versions),
                checkpoint_bytes=sum(map(self._checkpoint_bytes, versions)),
                private_bytes=self._decoded(self._private[name]),
                private_stored_bytes=self._stored_bytes(self._private[name]),
                freed_bytes=freed[name],
            )
            for name, versions in sorted(self._records.items())
        ]
        reachable = set().union(*self._by_name.values()) if self._by_name else set()
        stored = self._stored_bytes(self._with_bases(reachable))
        refs = (layout.REFS, layout.DECISIONS, layout.WISHES)
        manifests = (layout.BLOCKS, layout.CHAINS, layout.EQUIVALENCE, *refs)
        return UsageReport(
            rows=tuple(rows),
            checkpoint_bytes=sum(row.checkpoint_bytes for row in rows),
            distinct_bytes=self._decoded(reachable),
            stored_bytes=stored,
            manifest_bytes=sum(
                info.size for folder in manifests for info in self._store.storage.list(folder)
            ),
            # Of a damaged variant it is not known what it needs, and gc deletes nothing then.
            unreachable_bytes=0 if self._damaged else sum(self._stored.values()) - stored,
            damaged=tuple(f"{name}@{version}" for name, version in sorted({*self._lost, *self._lacking()})),
            format=self._store.formats[0],
        )

    def _lacking(self) -> Iterator[tuple[str, int]]:
        """The versions of which objects are missing."""
        for name, versions in self._records.items():
            yield from ((name, record.version) for record in versions if self._missing(record))

    def _missing(self, record: VariantRecord) -> set[str]:
        """Keys that a version needs and no listing shows; manifests may be known though they are gone."""
        blobs = self._with_bases(self._blobs(record))
        blocks = {layout.block_key(block) for block in self._block_ids(record.chain)}
        lost = (blocks | {layout.chain_key(record.chain)}) - self._manifest_sizes.keys()
        return lost | {layout.blob_key(blob) for blob in blobs - self._stored.keys()}

    def _note_damaged(self, name: str, version: int) -> None:
        self._damaged[name] = max(version, self._damaged.get(name, 0))
        self._lost.add((name, version))

    def _leave_out_damaged(self, read: Callable[[VariantRecord], object]) -> None:
        """Go on without the versions whose manifests cannot be read."""
        for name, versions in list(self._records.items()):
            for record in list(versions):
                try:
                    read(record)
                except BlockzooError:
                    versions.remove(record)
                    self._note_damaged(name, record.version)
            if not versions:
                del self._records[name]

    def _facts(self) -> Mapping[ChainId, ChainFacts]:
        """What `ls` needs of all chains; those that cannot be read are left out."""
        try:
            everything = (record.chain for records in self._records.values() for record in records)
            return self._chains.facts(everything)
        except BlockzooError:
            found: dict[ChainId, ChainFacts] = {}
            self._leave_out_damaged(lambda record: found.update(self._chains.facts([record.chain])))
            return found

    def _private_sizes(self, facts: Mapping[ChainId, ChainFacts]) -> Mapping[str, tuple[int, int]]:
        """Decoded and stored bytes of what only one variant needs, by name."""
        owners: dict[bytes, str | None] = {}
        sizes: dict[bytes, tuple[int, int]] = {}
        for name, versions in self._records.items():
            for digest, decoded, stored in _each_blob(versions, facts):
                if owners.setdefault(digest, name) != name:
                    owners[digest] = None
                else:
                    sizes[digest] = decoded, stored
        found = dict.fromkeys(self._records, (0, 0))
        for digest, owner in owners.items():
            if owner is not None:
                decoded, stored = sizes[digest]
                total, total_stored = found[owner]
                found[owner] = total + decoded, total_stored + (stored or self._stored_size(digest.hex()))
        return found

    def _stored_size(self, digest: str) -> int:
        """Bytes of a blob's object: asked one by one where that costs less than listing all of them."""
        if self._store.storage.is_remote:
            return self._stored.get(BlobId(digest), 0)
        return self._store.blobs.stored_bytes(BlobId(digest))

    def _runs(self, name: str, chain: ChainManifest) -> list[Run]:
        users = self._users
        runs: list[Run] = []
        for position, link in enumerate(chain.links):
            block = self._manifests.get_block(link.base)
            shared = tuple(sorted(users[link.base] - {name}))
            applied = tuple(_summary(self._manifests.get_block(item)) for item in link.applied)
            run = Run(position, position, block.kind, block.num_bytes, shared, applied)
            if runs and _alike(runs[-1], run):
                runs[-1] = _joined(runs[-1], run)
            else:
                runs.append(run)
        return runs

    def _checkpoint_bytes(self, record: VariantRecord) -> int:
        """Bytes of a checkpoint with the same computation: adapters merged, tied matrices once."""
        total = sum(ref.size for name, ref in record.files.items() if not name.startswith(OWN_PREFIX))
        for link in self._manifests.get_chain(record.chain).links:
            block = self._manifests.get_block(link.base)
            total += block.num_bytes
            if block.config.get("tied"):
                total -= block.tensors["lm_head.weight"].num_bytes
        return total

    @cached_property
    def _by_name(self) -> dict[str, set[BlobId]]:
        """Blobs of each variant, all versions."""
        return {name: set().union(*map(self._blobs, versions)) for name, versions in self._records.items()}

    @cached_property
    def _private(self) -> Mapping[str, set[BlobId]]:
        """Blobs that only one variant needs."""
        owners: dict[BlobId, str | None] = {}
        for name, blobs in self._by_name.items():
            for blob in blobs:
                owners[blob] = None if blob in owners else name
        private: dict[str, set[BlobId]] = defaultdict(set)
        for blob, owner in owners.items():
            if owner is not None:
                private[owner].add(blob)
        return private

    def _freed(self) -> Mapping[str, int]:
        """Stored bytes of the objects that would go with each variant: nothing else needs them."""
        owners: dict[str, set[str]] = defaultdict(set)
        sizes: dict[str, int] = {}
        for name, versions in self._records.items():
            for blob in self._with_bases(self._by_name[name]):
                owners[blob].add(name)
                sizes[blob] = self._stored.get(blob, 0)
            for record in versions:
                for digest in (record.chain, *self._block_ids(record.chain)):
                    owners[digest].add(name)
        for digest in owners:
            for key in (layout.block_key(digest), layout.chain_key(digest)):
                if key in self._manifest_sizes:
                    sizes[digest] = self._manifest_sizes[key]
        freed: dict[str, int] = defaultdict(int)
        for digest, names in owners.items():
            if len(names) == 1:
                freed[next(iter(names))] += sizes.get(digest, 0)
        return freed

    @cached_property
    def _users(self) -> Mapping[BlockId, set[str]]:
        """Variants whose current version uses a base block."""
        users: dict[BlockId, set[str]] = defaultdict(set)
        for name, versions in self._records.items():
            for link in self._manifests.get_chain(versions[-1].chain).links:
                users[link.base].add(name)
        return users

    @cached_property
    def _stored(self) -> Mapping[BlobId, int]:
        """Stored bytes of every blob in the zoo."""
        listing = self._store.storage.list(layout.BLOBS)
        found = ((layout.digest_of(info.key), info.size) for info in listing)
        return {BlobId(digest): size for digest, size in found if digest is not None}

    @cached_property
    def _manifest_sizes(self) -> Mapping[str, int]:
        """Stored bytes of the manifests of blocks and chains, by key."""
        folders = (layout.BLOCKS, layout.CHAINS)
        return {info.key: info.size for folder in folders for info in self._store.storage.list(folder)}

    def _blobs(self, record: VariantRecord) -> set[BlobId]:
        blobs: set[BlobId] = set()
        for ref in record.files.values():
            blobs.add(ref.blob)
            self._parts[ref.blob] = (DType.U8, (ref.size,))
        return blobs.union(*map(self._block_blobs, self._block_ids(record.chain)))

    def _block_ids(self, chain: ChainId) -> Iterable[BlockId]:
        for link in self._manifests.get_chain(chain).links:
            yield from (link.base, *link.applied)

    def _block_blobs(self, block: BlockId) -> frozenset[BlobId]:
        if block not in self._blocks:
            tensors = self._manifests.get_block(block).tensors.values()
            for tensor in tensors:
                for blob, shape in zip(tensor.blobs, tensor.chunk_shapes(), strict=True):
                    self._parts[blob] = (tensor.dtype, shape)
            self._blocks[block] = frozenset(blob for tensor in tensors for blob in tensor.blobs)
        return self._blocks[block]

    def _with_bases(self, blobs: set[BlobId]) -> set[BlobId]:
        """Add the bases of differences."""
        bases = map(self._base_of, blobs)
        return blobs | {base for base in bases if base is not None}

    def _base_of(self, blob: BlobId) -> BlobId | None:
        """The base of a difference; None where the header does not say, which `verify` reports as damage."""
        if blob not in self._bases:
            try:
                self._bases[blob] = self._store.blobs.info(blob).base if self._is_encoded(blob) else None
            except (CorruptionError, NotFoundError):
                self._bases[blob] = None
        return self._bases[blob]

    def _is_encoded(self, blob: BlobId) -> bool:
        """Tell from its size, which spares reading the header of every blob."""
        dtype, shape = self._parts[blob]
        header = self._store.blobs.encode(TensorData(dtype, shape, b""), None)[0]
        return blob in self._stored and self._stored[blob] != len(header) + num_bytes(dtype, shape)

    def _decoded(self, blobs: set[BlobId]) -> int:
        return sum(num_bytes(*self._parts[blob]) for blob in blobs)

    def _stored_bytes(self, blobs: set[BlobId]) -> int:
        return sum(self._stored.get(blob, 0) for blob in blobs)


def _row(record: VariantRecord, facts: ChainFacts, private: int, private_stored: int) -> VariantRow:
    files = sum(ref.size for name, ref in record.files.items() if not name.startswith(OWN_PREFIX))
    return VariantRow(
        name=record.name,
        version=record.version,
        kind=record.kind,
        base=record.provenance.get("base"),
        family=facts.family,
        num_layers=facts.num_layers,
        checkpoint_bytes=facts.num_bytes + files,
        private_bytes=private,
        registered_at=record.provenance.get("registered_at", ""),
        chain=record.chain,
        private_stored_bytes=private_stored,
    )


def _each_blob(
    versions: Iterable[VariantRecord], facts: Mapping[ChainId, ChainFacts]
) -> Iterator[tuple[bytes, int, int]]:
    """Digest, decoded and stored bytes (0: ask) of each blob that the versions of a variant need."""
    for record in versions:
        yield from facts[record.chain].each_blob()
        for ref in record.files.values():
            yield bytes.fromhex(ref.blob), ref.size, 0


def _summary(block: BlockManifest) -> Applied:
    modules = block.config.get("modules", block.config.get("changes"))
    items = modules if block.kind == BlockKind.ADAPTER and isinstance(modules, dict) else {}
    changes = [item for item in items.values() if isinstance(item, dict)]
    ranks = {item.get("rank") for item in changes}
    whole = sorted(rank for rank in ranks if isinstance(rank, int))
    return Applied(block.kind, tuple(sorted(items)), tuple(whole), block.num_bytes, tuple(_methods(changes)))


def _methods(changes: Sequence[Mapping[str, JsonValue]]) -> Iterator[str]:
    """What an adapter's modules have beside LoRA."""
    if any(change.get("magnitude") for change in changes):
        yield "DoRA"
    if any(change.get("bias") for change in changes):
        yield "biases"
    for change in changes:
        if isinstance(tokens := change.get("tokens"), list):
            yield f"{len(tokens)} trained tokens"


def _alike(run: Run, other: Run) -> bool:
    def looks(item: Applied) -> tuple[object, ...]:
        return item.kind, item.modules, item.ranks, item.methods

    return (run.kind, run.shared_with, [*map(looks, run.applied)]) == (
        other.kind,
        other.shared_with,
        [*map(looks, other.applied)],
    )


def _joined(run: Run, other: Run) -> Run:
    applied = tuple(
        replace(mine, num_bytes=mine.num_bytes + theirs.num_bytes)
        for mine, theirs in zip(run.applied, other.applied, strict=True)
    )
    return Run(run.first, other.last, run.kind, run.num_bytes + other.num_bytes, run.shared_with, applied)
