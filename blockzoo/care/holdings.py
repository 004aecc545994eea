"""The kinds of data that a zoo keeps.

gc, verify and backup work through this list, so a new kind is one entry here and no change there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from blockzoo import layout
from blockzoo.care import variants
from blockzoo.care.base import Copied, CopyTask, Fault, Holding
from blockzoo.care.copying import copy_variants
from blockzoo.equivalence.copying import copy_equivalence
from blockzoo.equivalence.ledger import Ledger, decision_body
from blockzoo.equivalence.records import RecordId
from blockzoo.equivalence.spliced import missing_chains, needed_keys, restore_chains
from blockzoo.storage.base import Chunks
from blockzoo.store.closure import Problem
from blockzoo.store.packs import read_index
from blockzoo.store.wishes import WishBook
from blockzoo.store.zoo_store import ZooStore


def _is_equivalence(key: str) -> bool:
    digest = layout.digest_of(key)
    return layout.decision_of(key) is not None or (
        digest is not None and key == layout.equivalence_key(digest)
    )


def _check_equivalence(store: ZooStore, key: str) -> None:
    decision = layout.decision_of(key)
    if decision is not None:
        Ledger(store).decision(RecordId(decision[0]), decision[1])
    else:
        Ledger(store).get(_record(key))


def _good_equivalence(source: ZooStore, key: str) -> Chunks:
    decision = layout.decision_of(key)
    if decision is not None:
        return [decision_body(Ledger(source).decision(RecordId(decision[0]), decision[1]))]
    return [Ledger(source).body(_record(key))]


def _record(key: str) -> RecordId:
    digest = layout.digest_of(key)
    assert digest is not None, key
    return RecordId(digest)


def _lost_records(store: ZooStore, known: Collection[str]) -> Iterator[Fault]:
    for record_id in Ledger(store).numbers():
        key = layout.equivalence_key(record_id)
        if key not in known and store.storage.size(key) is None:
            yield Fault(key, missing=True, message=f"{key} is missing, and was decided about")


def _copy_equivalence(task: CopyTask) -> Copied:
    chains = None
    if task.names is not None:
        chains = {record.chain for name in task.names for record in task.source.versions(name)}
    done = copy_equivalence(task.source, task.destination, chains)
    return Copied(done.copied, done.num_bytes, done.present, skipped=done.skipped)


def _needed_spliced(store: ZooStore, _on_problem: Problem | None) -> Collection[str]:
    # An approval that cannot be read is not in force and needs nothing.
    return needed_keys(store)


def _lost_spliced(store: ZooStore, known: Collection[str]) -> Iterator[Fault]:
    for record_id, key in missing_chains(store).items():
        if key not in known:
            message = f"{key} is missing; approving {record_id[:12]} again writes it"
            yield Fault(key, missing=True, message=message)


def _restore_spliced(task: CopyTask) -> Copied:
    # Made of what the destination has, since its own decisions say what is in force there.
    sizes = restore_chains(task.destination)
    return Copied(len(sizes), sum(sizes))


def _is_wish(key: str) -> bool:
    return layout.wish_of(key) is not None


def _check_wish(store: ZooStore, key: str) -> None:
    wish = layout.wish_of(key)
    assert wish is not None, key
    WishBook(store).read(*wish)


def _check_pack(store: ZooStore, key: str) -> None:
    read_index(store.storage.inner, key)


HOLDINGS = (
    Holding(
        "variants",
        folders=variants.FOLDERS,
        owns=variants.owns,
        check=variants.check,
        good_bytes=variants.good_bytes,
        needed=variants.needed_keys,
        faults=variants.faults,
        faults_behind=variants.faults_behind,
        copy=copy_variants,
    ),
    Holding(
        "equivalence records and decisions",
        folders=(layout.EQUIVALENCE, layout.DECISIONS),
        owns=_is_equivalence,
        check=_check_equivalence,
        good_bytes=_good_equivalence,
        faults=_lost_records,
        copy=_copy_equivalence,
    ),
    # Stored as chains, which verify reads with those of the variants.
    Holding(
        "chains of approvals in force",
        needed=_needed_spliced,
        faults=_lost_spliced,
        copy=_restore_spliced,
    ),
    # Only damaged ones are listed. What the others hold is checked, repaired and copied as what it is.
    Holding("packs", folders=(layout.PACKS,), owns=layout.is_pack, check=_check_pack),
    # Neither copied nor repaired from another zoo: wishes name the workers of one cluster.
    Holding("placement wishes", folders=(layout.WISHES,), owns=_is_wish, check=_check_wish),
)
"""Everything that is kept, in the order in which it is read and copied: what others need comes first."""
