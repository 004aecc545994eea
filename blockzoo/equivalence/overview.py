"""What a zoo knows about equivalence, for `blockzoo equivalence list` and `show`."""

from __future__ import annotations

from dataclasses import dataclass

from blockzoo.equivalence.approvals import Approvals
from blockzoo.equivalence.ledger import Ledger
from blockzoo.equivalence.records import Action, Decision, EquivalenceRecord, RecordId
from blockzoo.errors import CorruptionError, NotFoundError
from blockzoo.json_report import JsonReport

EVALUATED, APPROVED, REVOKED = "evaluated", "approved", "revoked"


@dataclass(frozen=True, slots=True)
class EquivalenceReport(JsonReport):
    """A record with what was decided about it.

    Attributes:
        record: what was measured.
        state: "evaluated" (nobody has decided), "approved" or "revoked".
        in_force: approved, and both chains are still those of registered variants.
        decisions: first to last.
    """

    record: EquivalenceRecord
    state: str
    in_force: bool
    decisions: tuple[Decision, ...]


@dataclass(frozen=True, slots=True)
class EquivalenceOverview(JsonReport):
    """All records.

    Attributes:
        records: newest first.
        unreadable: id of each record that is damaged, or decided about in a damaged way -> the problem.
    """

    records: tuple[EquivalenceReport, ...]
    unreadable: dict[str, str]


def overview(ledger: Ledger) -> EquivalenceOverview:
    """Return every record that can be read, and say which cannot."""
    in_force = Approvals(ledger.store).in_force()
    reports: list[EquivalenceReport] = []
    unreadable: dict[str, str] = {}
    for record_id in sorted({*ledger.ids(), *ledger.numbers()}):
        try:
            reports.append(_report(ledger, record_id, record_id in in_force))
        except (CorruptionError, NotFoundError) as error:
            unreadable[record_id] = str(error)
    reports.sort(key=lambda report: report.record.created_at, reverse=True)
    return EquivalenceOverview(tuple(reports), unreadable)


def report(ledger: Ledger, record_id: RecordId) -> EquivalenceReport:
    """Return one record with its decisions.

    Raises:
        EquivalenceNotFoundError, CorruptManifestError: it is not there, or it or a decision is damaged.
    """
    return _report(ledger, record_id, record_id in Approvals(ledger.store).in_force())


def _report(ledger: Ledger, record_id: RecordId, in_force: bool) -> EquivalenceReport:
    record = ledger.get(record_id)
    decisions = tuple(ledger.decisions(record_id))
    state = EVALUATED
    if decisions:
        state = APPROVED if decisions[-1].action is Action.APPROVE else REVOKED
    return EquivalenceReport(record, state, in_force, decisions)
