"""The zoo as one object: everything that the command line and the server do with it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path

from blockzoo import layout
from blockzoo.care import gc
from blockzoo.care.backup import CopyReport, copy_zoo
from blockzoo.care.gc import GcReport
from blockzoo.care.verify import VerifyReport, verify
from blockzoo.equivalence.decide import approve, revoke
from blockzoo.equivalence.ledger import Ledger
from blockzoo.equivalence.overview import EquivalenceOverview, EquivalenceReport, overview, report
from blockzoo.equivalence.records import Decision, EquivalenceRecord
from blockzoo.errors import InvalidInputError, NotFoundError
from blockzoo.folders.export import ExportResult, ZooSource, export_variant
from blockzoo.manifest import BlockId, BlockManifest, ChainId, ChainManifest, TensorRef, VariantRecord
from blockzoo.names import check_name, is_based_on, parse_ref
from blockzoo.progress import NoProgress, Progress
from blockzoo.registering.folder import RegisterResult, register_folder
from blockzoo.reports.compare import compare
from blockzoo.reports.facts import ChainReader
from blockzoo.reports.survey import Survey
from blockzoo.reports.values import DiffReport, RemoveReport, ShowReport, UsageReport, VariantRow
from blockzoo.storage import open_storage
from blockzoo.storage.base import ObjectInfo, Stamp
from blockzoo.store.objects import OnDamage, ignore_damage
from blockzoo.store.writing import Manifests
from blockzoo.store.zoo_store import ZooStore

_CACHED_MANIFESTS = 1 << 16
"""Block and chain manifests kept in memory; one takes a few kilobytes, and they never change."""


class Zoo:
    """A zoo. Reading methods may be called from several threads at once.

    Args:
        store: the zoo below; most callers use `Zoo.open`.
        facts_folder: where `ls` keeps what it knows of chains between processes; None: nowhere.
    """

    def __init__(self, store: ZooStore, *, facts_folder: Path | None = None) -> None:
        self.store = store
        self._manifests: Manifests = _CachedManifests(store)
        self._chains = ChainReader(store, facts_folder)

    @classmethod
    def open(
        cls,
        url: str | Path,
        *,
        create: bool = False,
        without_header: bool = False,
        facts_folder: Path | None = None,
    ) -> Zoo:
        """Open the zoo in a folder or at an object store URL.

        Args:
            url: folder path, `s3://bucket/prefix`, `gs://`, `az://` or `memory://`.
            create: begin a zoo there when there is none.
            without_header: open it also where zoo.json is damaged, for `verify`.
            facts_folder: see the class.

        Raises:
            ZooNotFoundError: there is none and `create` is false.
            FormatVersionError: the zoo is newer than this version can read.
            CorruptManifestError: zoo.json is damaged.
            StorageError: the storage refuses, or lacks conditional writes.
        """
        store = ZooStore.open(open_storage(url), create=create, without_header=without_header)
        return cls(store, facts_folder=facts_folder)

    @property
    def url(self) -> str:
        """Where the zoo is."""
        return self.store.storage.url

    # Reading what is registered.

    def variants(self, on_damage: OnDamage | None = None) -> list[VariantRecord]:
        """Return the current version of every variant, by name.

        Args:
            on_damage: told of each damaged ref; without it CorruptManifestError is raised.
        """
        return self.store.variants(on_damage)

    def versions(self, name: str) -> list[VariantRecord]:
        """Return the versions of a variant, oldest first; raises VariantNotFoundError."""
        self.store.resolve(name)
        return self.store.versions(name)

    def resolve(self, ref: str) -> VariantRecord:
        """Return what NAME or NAME@VERSION names.

        Raises:
            InvalidNameError: it is spelled wrong.
            VariantNotFoundError: it is not registered; suggests near names.
        """
        return self.store.resolve(*parse_ref(ref))

    def stamp(self, ref: str) -> Stamp | None:
        """Return what changes whenever NAME or NAME@VERSION may name another version; see `Storage.stamp`.

        Raises:
            InvalidNameError: it is spelled wrong.
        """
        return self.store.stamp(ref.partition("@")[0])

    def chain(self, chain: ChainId) -> ChainManifest:
        """Return a chain manifest; raises ManifestNotFoundError or CorruptManifestError."""
        return self._manifests.get_chain(chain)

    def block(self, block: BlockId) -> BlockManifest:
        """Return a block manifest; raises ManifestNotFoundError or CorruptManifestError."""
        return self._manifests.get_block(block)

    def manifests(self, ref: str) -> tuple[bytes, list[bytes]]:
        """Return the canonical bytes of a variant's chain manifest and of each block it names."""
        record = self.resolve(ref)
        links = self.chain(record.chain).links
        blocks = dict.fromkeys(block for link in links for block in (link.base, *link.applied))
        for block in blocks:
            self.block(block)  # raises when it is missing or damaged
        keys = [layout.chain_key(record.chain), *map(layout.block_key, blocks)]
        chain, *bodies = [bytes(self.store.storage.get(key)) for key in keys]
        return chain, bodies

    def read_tensor(self, tensor: TensorRef) -> list[memoryview]:
        """Return a tensor's bytes, one read-only view for each of its blobs in row order.

        Verified against the ids; raw blobs of a local zoo are mapped, not copied.

        Raises:
            BlobNotFoundError, CorruptBlobError: a blob is missing or damaged.
        """
        return [self.store.blobs.read(blob) for blob in tensor.blobs]

    def read_file(self, record: VariantRecord, filename: str) -> bytes:
        """Return a file kept with a variant.

        Raises:
            NotFoundError: the variant has no such file.
            BlobNotFoundError, CorruptBlobError: it is missing or damaged in the storage.
        """
        if filename not in record.files:
            raise NotFoundError(
                f"{record.name}@{record.version} has no file {filename[:200]!r}",
                hint=f"It has {', '.join(sorted(record.files))}.",
                variant=record.name,
                file=filename[:200],
            )
        return bytes(self.store.blobs.read(record.files[filename].blob))

    # Reports.

    def ls(self) -> list[VariantRow]:
        """Return a row for every variant, with sizes."""
        return Survey(self.store, self._manifests, self._chains).rows()

    def show(self, ref: str) -> ShowReport:
        """Return all about one version: its chain as runs of links, sizes, who shares it."""
        return Survey(self.store, self._manifests, self._chains).show(self.resolve(ref))

    def du(self) -> UsageReport:
        """Return what everything takes, as checkpoints and in the zoo."""
        return Survey(self.store, self._manifests, self._chains).usage()

    def diff(self, a: str, b: str) -> DiffReport:
        """Return what differs between two variants or versions."""
        return compare(self._manifests, self.resolve(a), self.resolve(b))

    def equivalences(self) -> EquivalenceOverview:
        """Return every equivalence record with its decisions; see `blockzoo.equivalence.overview`."""
        return overview(Ledger(self.store))

    def equivalence(self, record: str) -> EquivalenceReport:
        """Return one equivalence record with its decisions.

        Args:
            record: its id, or the first digits.

        Raises:
            EquivalenceNotFoundError, CorruptManifestError: it is not there, or it or a decision is damaged.
            InvalidInputError: the digits are too few, or several records begin so.
        """
        ledger = Ledger(self.store)
        return report(ledger, ledger.find(record))

    # Changing the zoo.

    def approve_equivalence(
        self,
        record: str,
        *,
        by: str,
        reason: str,
        max_kl: float,
        min_agreement: float | None = None,
        variants: Sequence[str] = (),
        force: bool = False,
    ) -> tuple[Decision, EquivalenceRecord]:
        """Allow a measured substitute; see `blockzoo.equivalence.decide.approve`.

        Args:
            record: its id, or the first digits.
            by, reason, max_kl, min_agreement, variants, force: as there.

        Returns:
            The decision, and the record that it is about.
        """
        ledger = Ledger(self.store)
        about = ledger.get(ledger.find(record))
        decision = approve(
            ledger,
            about.id,
            by=by,
            reason=reason,
            max_kl=max_kl,
            min_agreement=min_agreement,
            variants=variants,
            force=force,
        )
        return decision, about

    def revoke_equivalence(self, record: str, *, by: str, reason: str) -> Decision:
        """End an approval; see `blockzoo.equivalence.decide.revoke`."""
        ledger = Ledger(self.store)
        return revoke(ledger, ledger.find(record), by=by, reason=reason)

    def register(
        self,
        path: str | Path,
        *,
        name: str,
        base: str | None = None,
        revision: str | None = None,
        on_demand: bool = False,
        progress: Progress | None = None,
    ) -> RegisterResult:
        """Register a checkpoint or adapter folder; see `blockzoo.registering.folder.register_folder`."""
        return register_folder(
            self.store,
            path,
            name=name,
            base=base,
            revision=revision,
            on_demand=on_demand,
            progress=progress,
        )

    def batch(self) -> AbstractContextManager[None]:
        """Register several adapters of a base in less time: see `blockzoo.store.zoo_store.ZooStore.batch`."""
        return self.store.batch("register several")

    def export(self, ref: str, dest: str | Path, *, progress: Progress | None = None) -> ExportResult:
        """Write a variant back as a folder; see `blockzoo.folders.export.export_variant`."""
        return export_variant(ZooSource(self.store), self.resolve(ref), Path(dest), progress=progress)

    def rm(self, ref: str) -> RemoveReport:
        """Remove a variant (NAME) or one of its old versions (NAME@VERSION); `gc` frees the bytes later.

        It may be damaged: a ref is removed without reading what it needs.

        Raises:
            VariantNotFoundError: it is not registered.
            CurrentVersionError: the version is the current one.
        """
        name, version = parse_ref(ref)
        self.store.check_registered(name)
        damaged: list[int] = []
        records = self.store.versions(name, lambda ref: damaged.append(ref.version))
        numbers = tuple(sorted([*damaged, *(record.version for record in records)]))
        if version is None:
            self.store.remove(name)
            return RemoveReport(name, numbers, ())
        self.store.remove_version(name, version)
        return RemoveReport(name, (version,), tuple(n for n in numbers if n != version))

    def rollback(self, name: str, to: int | None = None) -> VariantRecord:
        """Make an older version current again; see `blockzoo.store.zoo_store.ZooStore.rollback`."""
        return self.store.rollback(name, to)

    def dependants(self, name: str) -> list[str]:
        """Return the variants that were registered on a version of this one, or to differences from it."""
        return [
            record.name
            for record in self.variants(ignore_damage)
            if is_based_on(record.provenance.get("base"), name)
        ]

    def gc(
        self,
        *,
        grace_s: float = gc.GRACE_S,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> GcReport:
        """Delete what no variant needs; see `blockzoo.care.gc.collect`."""
        meter = _Meter(progress)
        with meter.ending():
            return gc.collect(
                self.store, grace_s=grace_s, dry_run=dry_run, on_object=meter.count, on_stage=meter.start
            )

    def verify(
        self, repair_from: str | Path | None = None, *, progress: Progress | None = None
    ) -> VerifyReport:
        """Read everything back; take good bytes from another zoo for what is damaged."""
        source = None if repair_from is None else Zoo.open(repair_from).store
        meter = _Meter(progress)
        with meter.ending():
            return verify(
                self.store,
                repair_from=source,
                on_object=meter.count,
                on_stage=meter.start,
                on_bytes=meter.advance,
            )

    def backup(
        self, dest: str | Path, *, names: list[str] | None = None, progress: Progress | None = None
    ) -> CopyReport:
        """Bring the variants (all when `names` is None) into another zoo, which is created if needed."""
        return _copy(self.store, Zoo.open(dest, create=True).store, names, progress, revive=False)

    def restore(
        self,
        src: str | Path,
        *,
        names: list[str] | None = None,
        revive: bool = False,
        progress: Progress | None = None,
    ) -> CopyReport:
        """Bring variants from a backup; with `revive` also versions that were removed here since."""
        return _copy(Zoo.open(src).store, self.store, names, progress, revive=revive)


class _CachedManifests:
    """Manifests by digest never change, so what was read once is kept."""

    def __init__(self, store: ZooStore) -> None:
        self.get_chain = lru_cache(_CACHED_MANIFESTS)(store.get_chain)
        self.get_block = lru_cache(_CACHED_MANIFESTS)(store.get_block)


class _Meter:
    """Passes on progress that comes from several threads, one call at a time."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress or NoProgress()
        self._lock = threading.Lock()

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[None]:
        """Start a task and finish it whatever happens."""
        with self.ending():
            self.start(title, total)
            yield

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Finish the task that was started last, whatever happens."""
        try:
            yield
        finally:
            self._progress.finish()

    def start(self, title: str, total: int) -> None:
        """Start the next task."""
        self._progress.start(title, total)

    def count(self, info: ObjectInfo) -> None:
        """Count an object."""
        self.advance(info.size)

    def advance(self, num_bytes: int) -> None:
        """Count bytes."""
        with self._lock:
            self._progress.advance(num_bytes)


def _copy(
    source: ZooStore,
    destination: ZooStore,
    names: Iterable[str] | None,
    progress: Progress | None,
    *,
    revive: bool,
) -> CopyReport:
    if source.storage.url == destination.storage.url and not source.storage.url.startswith("memory:"):
        raise InvalidInputError(
            f"{source.storage.url} is both source and destination", hint="Name another zoo."
        )
    wanted = None if names is None else [check_name(name) for name in names]
    meter = _Meter(progress)
    with ExitStack() as stack:
        return copy_zoo(
            source,
            destination,
            names=wanted,
            revive=revive,
            on_plan=lambda total: stack.enter_context(meter.task("copying", total)),
            on_bytes=meter.advance,
        )
