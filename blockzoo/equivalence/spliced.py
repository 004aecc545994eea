"""Chains that exist because of an approval: a variant's own links with a measured run of another's in them.

Workers read chains by their digest, so the chain that an approval lets run is stored as any other. It is no
variant's. It stays as long as the approval is in force, and then the blocks that it needs are those of two
registered variants: an approval keeps a manifest of a few kilobytes, and no block. What an approval needs and
something else has deleted, an older blockzoo's gc for example, is written again by approving again.
"""

from __future__ import annotations

from blockzoo import layout
from blockzoo.canonical import canonical_json
from blockzoo.equivalence.approvals import Approvals
from blockzoo.equivalence.ledger import Ledger
from blockzoo.equivalence.records import EquivalenceRecord, RecordId, chain_digest, splice
from blockzoo.errors import CorruptManifestError, NotFoundError
from blockzoo.manifest import ChainManifest
from blockzoo.manifest_json import chain_to_json
from blockzoo.store.objects import Objects
from blockzoo.store.registration import Registration
from blockzoo.store.zoo_store import ZooStore


def spliced_chain(store: Objects, record: EquivalenceRecord) -> ChainManifest:
    """Return the chain that a record measured, made of the original's links and the record's.

    Raises:
        ManifestNotFoundError: the original's chain is gone.
        CorruptManifestError: it is not the chain that was evaluated.
    """
    original = store.get_chain(record.original.chain)
    chain = splice(original, record.original.positions, record.substitute.links)
    if chain_digest(chain) != record.result:
        raise CorruptManifestError(
            f"equivalence record {record.id} is not about the chain it names",
            hint="Revoke the record, and evaluate again.",
            record=record.id,
        )
    return chain


def put_spliced(registration: Registration, store: Objects, record: EquivalenceRecord) -> int:
    """Store the chain of a record unless it is stored; gc leaves it alone until the registration ends.

    Returns the bytes of its manifest; 0 when it is the substitute's own chain, which a variant holds. Raises
    as `spliced_chain` and `Registration.put_chain` do.
    """
    if record.result == record.substitute.chain:
        return 0
    chain = spliced_chain(store, record)
    registration.put_chain(chain)
    return len(canonical_json(chain_to_json(chain)))


def missing_chains(store: ZooStore) -> dict[RecordId, str]:
    """Return the approvals in force whose chain is not stored, and the key where it should be."""
    found: dict[RecordId, str] = {}
    for one in Approvals(store).all():
        key = layout.chain_key(one.result)
        if store.storage.size(key) is None:
            found[one.record] = key
    return found


def restore_chains(store: ZooStore) -> list[int]:
    """Store the chains that approvals in force lack; return the bytes of each.

    For a zoo into which approvals were copied. What cannot be made stays missing, and is not run.
    """
    sizes: list[int] = []
    for record_id in missing_chains(store):
        try:
            record = Ledger(store).get(record_id)
            with store.registration(f"chain of equivalence {record_id[:12]}") as registration:
                sizes.append(put_spliced(registration, store, record))
        except (NotFoundError, CorruptManifestError):
            continue
    return sizes


def needed_keys(store: ZooStore) -> set[str]:
    """Return the keys of the chains that approvals in force let run."""
    return {layout.chain_key(one.result) for one in Approvals(store).all()}
