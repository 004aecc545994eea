"""Records as JSON: there and back, and between neighbouring releases."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockserve.common.api.cluster import (
    Assignment,
    LoadReport,
    ResidentSegment,
    Run,
    SegmentDigest,
    WorkerId,
    WorkerRecord,
    WorkerState,
)
from blockserve.common.errors import StateStoreError
from blockserve.common.state import codec
from blockzoo.manifest import ChainId

counts = st.integers(0, 1 << 62)
times = st.floats(0, 1e12)
names = st.text(max_size=8)
runs = st.builds(lambda first, length: Run(first, first + length), st.integers(0, 99), st.integers(1, 99))
records = st.builds(
    WorkerRecord,
    *(names, names, names, st.sampled_from(WorkerState), counts, names, counts, times, names),
)
loads = st.builds(
    LoadReport,
    *(counts, counts, counts, times, times, counts, counts, counts),
    hop_seconds=st.dictionaries(names, times, max_size=3),
    step_requests=times,
    step_crowding=times,
    unreadable=st.lists(names, max_size=3).map(tuple),
)
residencies = st.frozensets(st.builds(ResidentSegment, names, runs), max_size=5)
assignments = st.lists(st.builds(Assignment, names, runs, st.booleans()), max_size=3).map(tuple)


@given(records)
def test_records_come_back(record: WorkerRecord) -> None:
    assert codec.decode_record(codec.encode_record(record)) == record


@given(loads)
def test_loads_come_back(load: LoadReport) -> None:
    assert codec.decode_load(codec.encode_load(load)) == load


@given(residencies)
def test_residency_comes_back(segments: frozenset[ResidentSegment]) -> None:
    assert codec.decode_segments(codec.encode_segments(segments)) == segments


@given(assignments)
def test_assignments_come_back(wanted: tuple[Assignment, ...]) -> None:
    assert codec.decode_assignments(codec.encode_assignments(wanted)) == wanted


def test_the_same_residency_is_the_same_text() -> None:
    segments = [ResidentSegment(SegmentDigest(f"{number}"), Run(0, 1)) for number in range(9)]
    assert codec.encode_segments(segments) == codec.encode_segments(frozenset(reversed(segments)))


def test_what_is_written_is_what_docs_say() -> None:
    """Neighbouring releases read this; a change here is a change of the format."""
    record = WorkerRecord(WorkerId("w-1"), "w", "unix:/run/w")
    assert json.loads(codec.encode_record(record)) == {
        "id": "w-1",
        "name": "w",
        "address": "unix:/run/w",
        "state": "ready",
        "wire_version": 2,
        "kv_fingerprint": "",
        "block_bytes": 0,
        "speed": 1.0,
        "host": "",
    }
    assert codec.encode_load(LoadReport(queued_tokens=3)) == '{"queued_tokens":3}'
    assert codec.encode_segments([ResidentSegment(SegmentDigest("d"), Run(0, 4))]) == '[["d",0,4]]'
    wanted = (Assignment(ChainId("c"), Run(0, 4), True), Assignment(ChainId("c"), Run(4, 5)))
    assert codec.encode_assignments(wanted) == (
        '[{"chain":"c","run":[0,4],"pinned":true},{"chain":"c","run":[4,5]}]'
    )


def test_fields_of_a_newer_writer_are_ignored() -> None:
    record = codec.decode_record('{"id":"w","name":"w","address":"a","colour":"blue","racks":[1]}')
    assert record == WorkerRecord(WorkerId("w"), "w", "a", wire_version=1)
    assert codec.decode_load('{"queued_tokens":1,"mood":"good"}') == LoadReport(queued_tokens=1)
    assert codec.decode_segments('[["d",0,4,"gpu-1",{}]]') == {ResidentSegment(SegmentDigest("d"), Run(0, 4))}
    wanted = codec.decode_assignments('[{"chain":"c","run":[0,4],"until":9}]')
    assert wanted == (Assignment(ChainId("c"), Run(0, 4)),)


def test_fields_an_older_writer_lacks_are_defaulted() -> None:
    # The first releases spoke version 1 and did not say so.
    expected = WorkerRecord(WorkerId("w"), "w", "a", wire_version=1)
    assert codec.decode_record('{"id":"w","address":"a"}') == expected
    assert codec.decode_load("{}") == LoadReport()


def test_a_state_of_a_newer_release_gets_no_new_work() -> None:
    said = '{"id":"w","address":"a","state":"hibernating"}'
    assert codec.decode_record(said).state is WorkerState.DRAINING


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"id":"w"}', '{"address":"a"}', '{"id":"w","address":"a","speed":"fast"}', "7"],
)
def test_what_no_release_writes_is_a_typed_error(text: str) -> None:
    with pytest.raises(StateStoreError, match="worker record") as caught:
        codec.decode_record(text)
    assert caught.value.hint


@pytest.mark.parametrize("text", ["{}x", '[["d",0]]', '[["d",4,4]]', "[1]", "7"])
def test_residency_that_cannot_be_read(text: str) -> None:
    with pytest.raises(StateStoreError, match="residency"):
        codec.decode_segments(text)


@pytest.mark.parametrize("text", ["[1]", "7", '[{"chain":"c"}]', '[{"chain":"c","run":[4]}]'])
def test_a_placement_that_cannot_be_read(text: str) -> None:
    with pytest.raises(StateStoreError, match="placement"):
        codec.decode_assignments(text)
