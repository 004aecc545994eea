"""Bringing records and decisions into another zoo, for backup and restore.

Nobody deletes decisions, so of two zoos that began alike one knows a prefix of what the other
knows, unless people decided in both. What the destination lacks is added as long as the
histories agree; where they part, the destination's stands, and the rest is reported.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from blockzoo.equivalence.ledger import Ledger, decision_body
from blockzoo.equivalence.records import RecordId
from blockzoo.manifest import ChainId
from blockzoo.store.zoo_store import ZooStore


@dataclass(slots=True)
class CopiedEquivalence:
    """What was copied; the fields are those of `blockzoo.care.backup.CopyReport`."""

    copied: int = 0
    num_bytes: int = 0
    present: int = 0
    skipped: dict[str, str] = field(default_factory=dict)

    def count(self, num_bytes: int, *, new: bool) -> None:
        """Count an object."""
        self.copied += new
        self.present += not new
        self.num_bytes += num_bytes if new else 0


def copy_equivalence(
    source: ZooStore, destination: ZooStore, chains: Collection[ChainId] | None
) -> CopiedEquivalence:
    """Copy the records about two of these chains, all records when None, and the decisions about them.

    The chains that approvals let run are not copied; `spliced.restore_chains` makes them at the destination.

    Raises:
        CorruptManifestError: the source is damaged, or what the destination has of the same name.
    """
    ours, theirs = Ledger(source), Ledger(destination)
    present, numbers = set(theirs.ids()), ours.numbers()
    done = CopiedEquivalence()
    for record_id in ours.ids():
        record = ours.get(record_id)
        if chains is not None and not {record.original.chain, record.substitute.chain} <= set(chains):
            continue
        body = ours.body(record_id)
        done.count(len(body), new=record_id not in present and theirs.put_body(record_id, body))
        _copy_decisions(ours, theirs, record_id, numbers.get(record_id, []), done)
    return done


def _copy_decisions(
    source: Ledger, destination: Ledger, record: RecordId, numbers: list[int], done: CopiedEquivalence
) -> None:
    for number in numbers:
        decision = source.decision(record, number)
        new = destination.put_decision(decision)
        if not new and destination.decision(record, number) != decision:
            done.skipped[f"equivalence {record[:12]} decision {number}"] = (
                "conflict: the destination was decided about otherwise"
            )
            return
        done.count(len(decision_body(decision)), new=new)
