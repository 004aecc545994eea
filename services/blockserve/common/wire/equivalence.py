"""Equivalence records and decisions to messages and back. Pure.

They travel as the JSON that the zoo stores, so that every field is checked where it arrives.
"""

from __future__ import annotations

from blockproto.v1 import zoo_pb2
from blockzoo.canonical import canonical_json, parse_json
from blockzoo.equivalence import Decision, EquivalenceRecord, RecordId
from blockzoo.equivalence.overview import EquivalenceReport
from blockzoo.equivalence.record_json import (
    decision_from_json,
    decision_to_json,
    record_from_json,
    record_to_json,
)


def report_to_message(report: EquivalenceReport) -> zoo_pb2.EquivalenceReport:
    """A record with what was decided about it."""
    return zoo_pb2.EquivalenceReport(
        id=report.record.id,
        record=record_to_bytes(report.record),
        state=report.state,
        in_force=report.in_force,
        decisions=[decision_to_bytes(decision) for decision in report.decisions],
    )


def report_from_message(message: zoo_pb2.EquivalenceReport) -> EquivalenceReport:
    """The way back; raises CorruptManifestError or InvalidInputError for what cannot be read."""
    return EquivalenceReport(
        record=record_from_bytes(message.record, message.id),
        state=message.state,
        in_force=message.in_force,
        decisions=tuple(decision_from_bytes(decision) for decision in message.decisions),
    )


def record_to_bytes(record: EquivalenceRecord) -> bytes:
    """A record without its id."""
    return canonical_json(record_to_json(record))


def record_from_bytes(data: bytes, record_id: str) -> EquivalenceRecord:
    """The way back; raises as `report_from_message` does."""
    return record_from_json(parse_json(data), RecordId(record_id))


def decision_to_bytes(decision: Decision) -> bytes:
    """A decision."""
    return canonical_json(decision_to_json(decision))


def decision_from_bytes(data: bytes) -> Decision:
    """The way back; raises as `report_from_message` does."""
    return decision_from_json(parse_json(data))
