"""Equivalence records and decisions come back from the wire as they were, and are checked there."""

from __future__ import annotations

import dataclasses

import pytest

from blockserve.common.wire import equivalence as wire
from blockzoo.equivalence import Action, Decision
from blockzoo.equivalence.overview import EquivalenceReport
from blockzoo.errors import BlockzooError
from support.equivalence import put, three_variants


@pytest.fixture
def report():
    record = put(three_variants(), "a", "b", kl=0.1 + 0.2)
    approved = Decision(
        record.id, 1, Action.APPROVE, ("a@1",), "ann", "why", "2026-11-28T00:00:00+00:00", 0.3, 1 / 3, True
    )
    revoked = Decision(record.id, 2, Action.REVOKE, (), "bob", "because", "2026-11-28T00:00:01+00:00")
    return EquivalenceReport(record, "revoked", False, (approved, revoked))


def test_reports_come_back_as_they_were(report):
    for one in (
        report,
        dataclasses.replace(report, decisions=(), state="evaluated"),
        dataclasses.replace(report, record=dataclasses.replace(report.record, weight_distance=None)),
    ):
        assert wire.report_from_message(wire.report_to_message(one)) == one


def test_what_cannot_be_shown_is_refused(report):
    message = wire.report_to_message(report)
    for change in (b"{}", b"x", message.record.replace(b"float32", b"\\u001b[2J")):
        damaged = type(message)(id=message.id, record=change)
        with pytest.raises(BlockzooError):
            wire.report_from_message(damaged)
