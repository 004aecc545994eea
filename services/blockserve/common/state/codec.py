"""Records of the shared state to JSON and back. Pure.

Neighbouring releases share one store: fields that a newer writer added are ignored, fields that an older one
lacks get their defaults. Fields are only ever added, and a value keeps its type and meaning.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

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
from blockzoo.manifest import ChainId

Decoded = TypeVar("Decoded")


def encode_record(record: WorkerRecord) -> str:
    """What a worker is, as one JSON object named after the fields."""
    return _dump({name: getattr(record, name) for name in WorkerRecord.__slots__})


def decode_record(text: str) -> WorkerRecord:
    """The way back.

    Raises:
        StateStoreError: the text is not what a worker of any version writes.
    """
    return _decode(text, "worker record", _record)


def encode_load(load: LoadReport) -> str:
    """How busy a worker is, as one JSON object named after the fields; defaults are left out."""
    values = {name: getattr(load, name) for name in LoadReport.__slots__}
    return _dump({name: value for name, value in values.items() if value})


def decode_load(text: str) -> LoadReport:
    """The way back; raises as `decode_record`."""
    return _decode(text, "load report", _load)


def encode_segments(segments: Collection[ResidentSegment]) -> str:
    """What a worker holds, as sorted rows `[digest, first, end]`: the same set is always the same text."""
    return _dump(sorted([item.digest, item.run.first, item.run.end] for item in segments))


def encode_demand(demand: Mapping[ChainId, float]) -> str:
    """Requests/s of each chain, as one JSON object."""
    return _dump({chain: round(rate, 6) for chain, rate in sorted(demand.items())})


def decode_demand(text: str) -> dict[ChainId, float]:
    """The way back; raises as `decode_record`."""
    return _decode(
        text, "demand", lambda value: {ChainId(chain): float(rate) for chain, rate in value.items()}
    )


def add_rates(told: Iterable[Mapping[ChainId, float]]) -> dict[ChainId, float]:
    """The sum of what several routers tell."""
    total: dict[ChainId, float] = {}
    for rates in told:
        for chain, rate in rates.items():
            total[chain] = total.get(chain, 0.0) + rate
    return total


def decode_segments(text: str) -> frozenset[ResidentSegment]:
    """The way back; rows may have grown further columns. Raises as `decode_record`."""
    return _decode(
        text,
        "residency",
        lambda rows: frozenset(
            ResidentSegment(SegmentDigest(str(digest)), Run(int(first), int(end)))
            for digest, first, end, *_ in rows
        ),
    )


def encode_assignments(assignments: Sequence[Assignment]) -> str:
    """What a worker is to hold: `[{chain, run: [first, end], pinned?}]`."""
    return _dump(
        [
            {"chain": item.chain, "run": [item.run.first, item.run.end]}
            | ({"pinned": True} if item.pinned else {})
            for item in assignments
        ]
    )


def decode_assignments(text: str) -> tuple[Assignment, ...]:
    """The way back; raises as `decode_record`."""
    return _decode(
        text,
        "placement",
        lambda items: tuple(
            Assignment(
                ChainId(str(item["chain"])),
                Run(int(item["run"][0]), int(item["run"][1])),
                bool(item.get("pinned", False)),
            )
            for item in items
        ),
    )


def _record(values: dict[str, Any]) -> WorkerRecord:
    try:
        state = WorkerState(values.get("state", WorkerState.READY))
    except ValueError:
        # A state that a newer release invented: whatever it means, ask this worker for nothing new.
        state = WorkerState.DRAINING
    return WorkerRecord(
        id=WorkerId(str(values["id"])),
        name=str(values.get("name", values["id"])),
        address=str(values["address"]),
        state=state,
        wire_version=int(values.get("wire_version", 1)),
        kv_fingerprint=str(values.get("kv_fingerprint", "")),
        block_bytes=int(values.get("block_bytes", 0)),
        speed=float(values.get("speed", 1.0)),
        host=str(values.get("host", "")),
    )


def _load(values: dict[str, Any]) -> LoadReport:
    read = values.get
    return LoadReport(
        waiting_requests=int(read("waiting_requests", 0)),
        running_requests=int(read("running_requests", 0)),
        queued_tokens=int(read("queued_tokens", 0)),
        step_seconds=float(read("step_seconds", 0.0)),
        step_requests=float(read("step_requests", 0.0)),
        step_crowding=float(read("step_crowding", 0.0)),
        prefill_tokens_per_second=float(read("prefill_tokens_per_second", 0.0)),
        kv_pages_free=int(read("kv_pages_free", 0)),
        kv_pages_total=int(read("kv_pages_total", 0)),
        block_bytes_used=int(read("block_bytes_used", 0)),
        kv_token_bytes=int(read("kv_token_bytes", 0)),
        hop_seconds={WorkerId(peer): float(time) for peer, time in read("hop_seconds", {}).items()},
        unreadable=tuple(ChainId(str(chain)) for chain in read("unreadable", ())),
    )


def _dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False, default=dict)


def _decode(text: str, what: str, build: Callable[[Any], Decoded]) -> Decoded:
    try:
        return build(json.loads(text))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise StateStoreError(
            f"the shared state holds a {what} that cannot be read: {type(error).__name__}: {error}",
            hint="A release that is not a neighbour, or another program, writes to the same store: see "
            "docs/state.md.",
        ) from error
