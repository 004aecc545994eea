"""Values and messages agree, field by field."""

from __future__ import annotations

import dataclasses

import pytest

from blockproto.v1 import zoo_pb2
from blockserve.common.api.push import Piece, Standing, Step
from blockserve.common.wire import zoo as wire
from blockzoo.care import gc, verify
from blockzoo.errors import InvalidInputError, InvalidNameError
from blockzoo.manifest import BlobId, ChainId, DType, FileRef, VariantName, VariantRecord
from blockzoo.reports import values as reports
from blockzoo.store.writing import Stored

REPORTS = (
    reports.VariantRow, reports.Applied, reports.Run, reports.ShowReport, reports.UsageRow,
    reports.UsageReport, reports.RemoveReport, gc.GcReport, verify.Problem, verify.VerifyReport,
)  # fmt: skip
DIGEST = BlobId("ab" * 32)


@pytest.mark.parametrize("kind", REPORTS)
def test_reports_have_the_same_fields_on_the_wire(kind):
    message = getattr(zoo_pb2, kind.__name__)
    assert [field.name for field in message.DESCRIPTOR.fields] == [
        field.name for field in dataclasses.fields(kind)
    ]


def test_reports_come_back_as_they_were():
    applied = reports.Applied("adapter", ("q_proj",), (4, 8), 100, ("DoRA",))
    runs = (
        reports.Run(0, 0, "embedding", 5, ("a", "b"), ()),
        reports.Run(1, 4, "layer", 7, (), (applied,)),
    )
    show = reports.ShowReport(
        "bot", 2, True, (1, 2), "adapter", DIGEST, "llama", 128, 40, runs, 1 << 40, 2, 3, {"f": 4}, {"k": "v"}
    )
    row = reports.VariantRow("bot", 2, "adapter", None, "llama", 3, 1, 2, "2026-01-01", DIGEST)
    problem = verify.Problem("blobs/x", True, "gone", ("bot@1",), True)
    for report in (
        show,
        row,
        dataclasses.replace(row, base="base@1"),
        reports.UsageReport((reports.UsageRow("bot", 1, 2, 3, 4),), 1, 2, 3, 4, 5),
        reports.RemoveReport("bot", (1,), ()),
        gc.GcReport(1, 2, 3, 4, 5, 6, False),
        verify.VerifyReport(1, 2, (problem,), ("stray",)),
    ):
        back = wire.from_message(wire.to_message(report), type(report))
        assert back == report
        assert dataclasses.asdict(back) == dataclasses.asdict(report)


def test_records_come_back_as_they_were():
    record = VariantRecord(
        VariantName("bot"),
        3,
        ChainId(DIGEST),
        "adapter",
        {"config.json": FileRef(DIGEST, 5)},
        {"base": "b@1"},
    )
    assert wire.record_from_message(wire.record_to_message(record)) == record


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"name": "../x"}, InvalidNameError),
        ({"chain": "x"}, InvalidInputError),
        ({"chain": ""}, InvalidInputError),
    ],
)
def test_records_that_cannot_be_are_refused(changes, error):
    with pytest.raises(error):
        wire.record_from_message(zoo_pb2.VariantRecord(**{"name": "bot", "chain": DIGEST, **changes}))


def test_where_a_blob_stands_comes_back():
    for standing in (
        Standing(stored=Stored(DIGEST, True, 70)),
        Standing(stored=Stored(DIGEST, False, 0)),
        Standing(is_there=True),
        Standing(received=12),
    ):
        assert wire.standing_from_message(DIGEST, wire.standing_to_message(standing)) == standing


def test_pieces_and_steps():
    message = zoo_pb2.BlobPiece(blob=DIGEST, dtype="BF16", shape=[2, 3], offset=4, data=b"xy", base=DIGEST)
    assert wire.piece_from_message(message) == Piece(DIGEST, DType.BF16, (2, 3), 4, b"xy", DIGEST)
    message.base = ""
    assert wire.piece_from_message(message).base is None
    message.dtype = "F8_E4M3"
    with pytest.raises(InvalidInputError, match="F8_E4M3"):
        wire.piece_from_message(message)
    step = Step("verifying", 10, 3)
    assert wire.step_from_message(wire.step_to_message(step)) == step
