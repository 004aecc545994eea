"""Reading everything in a zoo back: what is damaged or missing, which variants it hurts, and repair.

Repair takes bytes from another zoo, for example a backup, only after they proved to
be what the digest says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from blockzoo import layout
from blockzoo.care.base import Holding
from blockzoo.care.holdings import HOLDINGS
from blockzoo.care.variants import base_of
from blockzoo.errors import BlockzooError, CorruptionError, NotFoundError
from blockzoo.manifest import BlobId
from blockzoo.storage.base import Chunks, ObjectInfo
from blockzoo.store import header
from blockzoo.store.leases import LeaseHolder
from blockzoo.store.zoo_store import ZooStore

_WORKERS = 2
_REMOTE_WORKERS = 8


@dataclass(frozen=True, slots=True)
class Problem:
    """One object that is not as it should be.

    Attributes:
        key: the object.
        missing: True when it is not there, False when it is damaged.
        message: what is wrong with it.
        variants: the versions (`name@n`) that need it; none for a leftover that gc will take and for what is
            known about equivalence or wished about placement.
        repaired: whether good bytes have replaced it.
    """

    key: str
    missing: bool
    message: str
    variants: tuple[str, ...] = ()
    repaired: bool = False


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What reading everything found.

    Attributes:
        objects: objects read.
        num_bytes: their stored bytes.
        problems: what is wrong, worst (hurting most variants) first.
        strays: objects that no zoo writes; they harm nothing.
    """

    objects: int
    num_bytes: int
    problems: tuple[Problem, ...]
    strays: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Tell whether every problem, if any, is repaired."""
        return all(problem.repaired for problem in self.problems)


def verify(
    store: ZooStore,
    *,
    repair_from: ZooStore | None = None,
    on_object: Callable[[ObjectInfo], None] | None = None,
    on_stage: Callable[[str, int], None] = lambda *_: None,
    on_bytes: Callable[[int], None] = lambda _: None,
    kinds: Sequence[Holding] = HOLDINGS,
) -> VerifyReport:
    """Check every object of every kind: blobs, manifests, refs, equivalence records, decisions, wishes.

    Args:
        store: the zoo.
        repair_from: another zoo to take good bytes from.
        on_object: called from any thread after each object was read.
        on_stage: called when another kind of work begins, with the bytes it is about, 0 for unknown.
        on_bytes: called with the stored bytes of each object that repair has dealt with.
        kinds: what a zoo keeps.
    """
    store.storage.doubt()
    objects: list[tuple[Holding, ObjectInfo]] = []
    strays: list[str] = []
    for kind in kinds:
        for info in (info for folder in kind.folders for info in store.storage.list(folder)):
            objects.append((kind, info)) if kind.owns(info.key) else strays.append(info.key)
    num_bytes = sum(info.size for _, info in objects)
    on_stage("verifying", num_bytes)
    found = {problem.key: problem for problem in _read_all(store, objects, on_object)}
    on_stage("looking for what is missing", 0)
    _add_faults(store, kinds, found)
    problems = list(found.values())
    if repair_from is not None and problems:
        store.check_writable()
        problems = _Repair(store, repair_from, kinds, on_stage, on_bytes).run(problems)
    if (problem := store.header_problem()) is not None:
        problems.append(_repair_header(store, repair_from, problem))
    problems.sort(key=lambda problem: (-len(problem.variants), problem.key))
    return VerifyReport(len(objects), num_bytes, tuple(problems), tuple(sorted(strays)))


def _read_all(
    store: ZooStore,
    objects: Iterable[tuple[Holding, ObjectInfo]],
    on_object: Callable[[ObjectInfo], None] | None,
) -> Iterator[Problem]:
    def check(item: tuple[Holding, ObjectInfo]) -> Problem | None:
        kind, info = item
        try:
            kind.check(store, info.key)
            if not _has_sound_copies(store, info.key):
                return Problem(info.key, missing=False, message=f"a second copy of {info.key} is damaged")
        except CorruptionError as error:
            return Problem(info.key, missing=False, message=_blame(info.key, error) or str(error))
        except NotFoundError as error:
            # Deleted since the listing, unless it is the base of a difference that is missing.
            if store.storage.size(info.key) is not None:
                message = _blame(info.key, error) or f"cannot be decoded: {error}"
                return Problem(info.key, missing=False, message=message)
        finally:
            if on_object is not None:
                on_object(info)
        return None

    workers = _REMOTE_WORKERS if store.storage.is_remote else _WORKERS
    with ThreadPoolExecutor(workers, thread_name_prefix="blockzoo-verify") as pool:
        yield from (problem for problem in pool.map(check, objects) if problem is not None)


def _blame(key: str, error: BlockzooError) -> str | None:
    """What to say of a difference whose base is at fault: nothing is known to be wrong with itself."""
    base = error.metadata.get("blob")
    if base is None or base == layout.digest_of(key):
        return None
    state = "damaged" if isinstance(error, CorruptionError) else "missing"
    return f"cannot be checked while its base is {state}: {layout.blob_key(base)}"


def _add_faults(store: ZooStore, kinds: Sequence[Holding], found: dict[str, Problem]) -> None:
    """Ask every kind what it relies on and lacks, and note which variants each problem hurts."""
    for kind in kinds:
        for fault in kind.faults(store, found):
            problem = found.get(fault.key) or Problem(fault.key, fault.missing, fault.message)
            hurt = (fault.variant,) if fault.variant else ()
            found[fault.key] = replace(problem, variants=(*problem.variants, *hurt))


@dataclass(frozen=True, slots=True)
class _Repair:
    """Replaces what the source holds in good state, and then what turns out to be missing behind it."""

    store: ZooStore
    source: ZooStore
    kinds: Sequence[Holding]
    on_stage: Callable[[str, int], None]
    on_bytes: Callable[[int], None]

    def run(self, problems: Sequence[Problem]) -> list[Problem]:
        lease = LeaseHolder(self.store.storage, self.store.clock, "verify --repair")
        done: dict[str, Problem] = {}
        todo = list(problems)
        try:
            while todo:
                lease.hold(digest for problem in todo if (digest := layout.digest_of(problem.key)))
                fixed = self._round(todo)
                done |= fixed
                # A restored manifest may name blobs that are missing as well, unseen so far.
                found = self._behind([problem for problem in fixed.values() if problem.repaired])
                todo = [problem for key, problem in found.items() if key not in done]
        finally:
            lease.release()
        _drop_packs(self.store, done)
        return list(done.values())

    def _round(self, todo: Sequence[Problem]) -> dict[str, Problem]:
        sizes = {problem.key: self.source.storage.size(problem.key) or 0 for problem in todo}
        self.on_stage("repairing", sum(sizes.values()))
        done: dict[str, Problem] = {}
        for stage in _stages(self.store, todo):
            done |= self._stage(stage)
            self.on_bytes(sum(sizes[problem.key] for problem in stage))
        return done

    def _stage(self, problems: Sequence[Problem]) -> dict[str, Problem]:
        owners = {
            problem.key: next(kind for kind in self.kinds if kind.owns(problem.key)) for problem in problems
        }
        bad = [key for key, kind in owners.items() if not _is_good(self.store, kind, key)]

        def bring(key: str) -> Chunks | None:
            try:
                return owners[key].good_bytes(self.source, key)
            except (NotFoundError, CorruptionError):
                return None

        left = set(bad) - self.store.storage.replace_all(bad, bring)
        return {problem.key: replace(problem, repaired=problem.key not in left) for problem in problems}

    def _behind(self, repaired: Sequence[Problem]) -> dict[str, Problem]:
        """What the repaired objects need and lack; nothing else is read again."""
        found: dict[str, Problem] = {}
        for kind in self.kinds:
            if kind.faults_behind is None:
                _add_faults(self.store, [kind], found)
                continue
            for problem in repaired:
                if kind.owns(problem.key):
                    for fault in kind.faults_behind(self.store, problem.key):
                        known = found.get(fault.key) or Problem(fault.key, fault.missing, fault.message)
                        hurt = dict.fromkeys((*known.variants, *problem.variants))
                        found[fault.key] = replace(known, variants=tuple(hurt))
        return found


def _stages(store: ZooStore, problems: Sequence[Problem]) -> Iterator[list[Problem]]:
    """Yield what can be repaired at once: a difference may be damaged only in its base, which goes before.

    What shares a pack with such a difference waits for it, so that the pack is written again once.
    """
    keys = {problem.key for problem in problems}
    bases = {key: base for key in keys if (base := base_of(store, key)) in keys}
    packs = {pack for key in bases for pack in store.storage.packs_of(key)}
    needed = set(bases.values())
    first = {
        key
        for key in keys
        if key in needed or (key not in bases and packs.isdisjoint(store.storage.packs_of(key)))
    }
    yield [problem for problem in problems if problem.key in first]
    yield [problem for problem in problems if problem.key not in first]


def _drop_packs(store: ZooStore, done: dict[str, Problem]) -> None:
    """Delete packs whose list of contents is damaged, once all that was missing for it is there again."""
    packs = [key for key in done if layout.is_pack(key)]
    if all(problem.repaired for key, problem in done.items() if key not in packs):
        for key in packs:
            store.storage.delete(key)
            done[key] = replace(done[key], repaired=True)


def _repair_header(store: ZooStore, source: ZooStore | None, problem: str) -> Problem:
    """Write zoo.json again: as another zoo of the same format has it, or else as the contents show it."""
    repaired = False
    if source is not None:
        if source.header_problem() is None and source.formats == store.formats:
            body = bytes(source.storage.get(layout.ZOO))
        else:
            # One that says that it is of a newer format is left alone, whether or not it is damaged.
            told = header.told_by(store.storage.inner) if max(store.formats) <= header.FORMAT else None
            body = b"" if told is None else header.body(told)
        if body:
            store.storage.replace(layout.ZOO, [body])
            repaired = store.header_problem() is None
    return Problem(layout.ZOO, missing=False, message=problem, repaired=repaired)


def _is_good(store: ZooStore, kind: Holding, key: str) -> bool:
    try:
        kind.check(store, key)
    except (CorruptionError, NotFoundError):
        return False
    return _has_sound_copies(store, key)


def _has_sound_copies(store: ZooStore, key: str) -> bool:
    """Tell whether all copies of an object in packs are good, the one that reading chooses known to be."""
    copies = store.storage.copies(key)
    if all(copy == copies[0] for copy in copies):
        return True
    digest = layout.digest_of(key)
    if digest is None or key != layout.blob_key(digest):
        return False
    try:
        # Registrations at once may have stored it as it is and as a difference.
        for copy in copies:
            store.blobs.decode(BlobId(digest), copy)
    except (CorruptionError, NotFoundError):
        return False
    return True
