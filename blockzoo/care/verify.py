"""Reading everything in a zoo back: what is damaged or missing, which variants it hurts, and repair.

Repair takes bytes from another zoo, for example a backup, only after they proved to
be what the digest says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from blockzoo import layout
from blockzoo.canonical import canonical_json, digest_bytes, digest_json
from blockzoo.equivalence.ledger import Ledger, decision_body
from blockzoo.equivalence.records import RecordId
from blockzoo.equivalence.spliced import missing_chains
from blockzoo.errors import CorruptionError, CorruptManifestError, NotFoundError
from blockzoo.manifest import BlobId, VariantRecord
from blockzoo.manifest_json import block_from_json, chain_from_json, variant_to_json
from blockzoo.storage.base import ObjectInfo
from blockzoo.store.blobs import TensorData
from blockzoo.store.closure import Walker, ignore_problem
from blockzoo.store.leases import LeaseHolder
from blockzoo.store.wishes import WishBook
from blockzoo.store.zoo_store import ZooStore

FOLDERS = (
    layout.REFS,
    layout.CHAINS,
    layout.BLOCKS,
    layout.BLOBS,
    layout.EQUIVALENCE,
    layout.DECISIONS,
    layout.WISHES,
)
"""Everything that is read."""

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
) -> VerifyReport:
    """Check every blob, manifest, ref, equivalence record, decision and placement wish.

    Args:
        store: the zoo.
        repair_from: another zoo to take good bytes from.
        on_object: called from any thread after each object was read.
    """
    objects: list[ObjectInfo] = []
    strays: list[str] = []
    for folder in FOLDERS:
        for info in store.storage.list(folder):
            known = (layout.digest_of, layout.version_of, layout.decision_of, layout.wish_of)
            is_ours = any(parse(info.key) for parse in known)
            objects.append(info) if is_ours else strays.append(info.key)
    found = {problem.key: problem for problem in _read_all(store, objects, on_object)}
    _add_missing(store, found)
    problems = list(found.values())
    if repair_from is not None and problems:
        store.check_writable()
        problems = _repair(store, repair_from, problems)
    problems.sort(key=lambda problem: (-len(problem.variants), problem.key))
    return VerifyReport(
        len(objects), sum(info.size for info in objects), tuple(problems), tuple(sorted(strays))
    )


def _read_all(
    store: ZooStore, objects: Sequence[ObjectInfo], on_object: Callable[[ObjectInfo], None] | None
) -> Iterator[Problem]:
    def check(info: ObjectInfo) -> Problem | None:
        try:
            _check_object(store, info.key)
        except CorruptionError as error:
            return Problem(info.key, missing=False, message=str(error))
        except NotFoundError as error:
            # Deleted since the listing, unless it is the base of a difference that is missing.
            if store.storage.size(info.key) is not None:
                return Problem(info.key, missing=False, message=f"cannot be decoded: {error}")
        finally:
            if on_object is not None:
                on_object(info)
        return None

    workers = _REMOTE_WORKERS if store.storage.is_remote else _WORKERS
    with ThreadPoolExecutor(workers, thread_name_prefix="blockzoo-verify") as pool:
        yield from (problem for problem in pool.map(check, objects) if problem is not None)


def _check_object(store: ZooStore, key: str) -> None:
    """Raise CorruptionError or NotFoundError unless the object is what its key says."""
    ref = layout.version_of(key)
    wish = layout.wish_of(key)
    decision = layout.decision_of(key)
    digest = layout.digest_of(key)
    if wish is not None:
        WishBook(store).read(*wish)
    elif decision is not None:
        Ledger(store).decision(RecordId(decision[0]), decision[1])
    elif digest is None:
        assert ref is not None, key
        store.read_ref(*ref)
    elif key == layout.equivalence_key(digest):
        Ledger(store).get(RecordId(digest))
    elif key == layout.blob_key(digest):
        store.blobs.read(BlobId(digest))
    elif key == layout.chain_key(digest):
        chain_from_json(store.read_manifest(key, digest))
    else:
        block_from_json(store.read_manifest(key, digest))


def _add_missing(store: ZooStore, found: dict[str, Problem]) -> None:
    """Walk every variant on its own: note what is missing, and who is hurt by each problem."""
    for name, numbers in store.numbers().items():
        for version in numbers:
            ref = f"{name}@{version}"
            try:
                record = store.read_ref(name, version)
            except NotFoundError:
                continue
            except CorruptManifestError:
                _hurt(found, layout.ref_key(name, version), ref)
                continue
            if not record.deleted:
                _add_missing_of(store, record, ref, found)
    for record_id in Ledger(store).numbers():
        key = layout.equivalence_key(record_id)
        if key not in found and store.storage.size(key) is None:
            found[key] = Problem(key, missing=True, message=f"{key} is missing, and was decided about")
    for record_id, key in missing_chains(store).items():
        message = f"{key} is missing; approving {record_id[:12]} again writes it"
        found.setdefault(key, Problem(key, missing=True, message=message))


def _add_missing_of(store: ZooStore, record: VariantRecord, ref: str, found: dict[str, Problem]) -> None:
    # A damaged blob hides its base, which is found damaged or missing by itself when repair comes again.
    walker = Walker(store, ignore_problem)
    walker.add_record(record)
    for key in walker.closure.objects():
        if key not in found and store.storage.size(key) is None:
            if store.storage.size(layout.ref_key(record.name, record.version)) is None:
                return  # removed while it was being read
            found[key] = Problem(key, missing=True, message=f"{key} is missing")
        if key in found:
            _hurt(found, key, ref)


def _hurt(found: dict[str, Problem], key: str, ref: str) -> None:
    problem = found.get(key) or Problem(key, missing=False, message=f"{key} is damaged")
    found[key] = replace(problem, variants=(*problem.variants, ref))


def _repair(store: ZooStore, source: ZooStore, problems: Sequence[Problem]) -> list[Problem]:
    """Replace what the source holds in good state, and then what turns out to be missing behind it."""
    lease = LeaseHolder(store.storage, store.clock, "verify --repair")
    done: dict[str, Problem] = {}
    todo = list(problems)
    try:
        while todo:
            lease.hold(digest for problem in todo if (digest := layout.digest_of(problem.key)))
            # Raw blobs first: a difference may be damaged only in its base.
            for problem in sorted(todo, key=lambda problem: _is_difference(store, problem.key)):
                repaired = _is_good(store, problem.key) or _replace_object(store, source, problem.key)
                done[problem.key] = replace(problem, repaired=repaired)
            # A restored manifest may name blobs that are missing as well, unseen so far.
            found: dict[str, Problem] = {}
            _add_missing(store, found)
            todo = [problem for key, problem in found.items() if key not in done]
    finally:
        lease.release()
    return list(done.values())


def _is_good(store: ZooStore, key: str) -> bool:
    try:
        _check_object(store, key)
    except (CorruptionError, NotFoundError):
        return False
    return True


def _is_difference(store: ZooStore, key: str) -> bool:
    digest = layout.digest_of(key)
    if digest is None or key != layout.blob_key(digest):
        return False
    try:
        return store.blobs.info(BlobId(digest)).base is not None
    except (CorruptionError, NotFoundError):
        return False


def _replace_object(store: ZooStore, source: ZooStore, key: str) -> bool:
    try:
        store.storage.replace(key, _good_bytes(source, key))
    except (NotFoundError, CorruptionError):
        return False
    return True


def _good_bytes(source: ZooStore, key: str) -> list[bytes | bytearray | memoryview]:
    """Return an object's verified bytes from the source; raises NotFoundError or CorruptionError."""
    digest = layout.digest_of(key)
    decision = layout.decision_of(key)
    if decision is not None:
        return [decision_body(Ledger(source).decision(RecordId(decision[0]), decision[1]))]
    if digest is None:
        ref = layout.version_of(key)
        assert ref is not None, key
        value = variant_to_json(source.read_ref(*ref))
        return [canonical_json({"record": value, "digest": digest_json(value)})]
    if key != layout.blob_key(digest):
        data = source.storage.get(key)
        if digest_bytes(data) != digest:
            raise CorruptManifestError(f"{key} is damaged in {source.storage.url} too", key=key)
        return [data]
    blob = BlobId(digest)
    info = source.blobs.info(blob)
    # Decoded, because the base that the source used may not be here.
    return list(source.blobs.encode(TensorData(info.dtype, info.shape, source.blobs.read(blob)), None))
