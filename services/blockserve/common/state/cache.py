"""What a reader of the shared state keeps, so that the next view brings only what is new. Pure."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blockserve.common.api.cluster import (
    Assignment,
    ClusterView,
    LoadReport,
    Placement,
    ResidentSegment,
    WorkerId,
    WorkerRecord,
    WorkerView,
)
from blockserve.common.errors import StateStoreError
from blockserve.common.state import codec

log = logging.getLogger(__name__)


@dataclass(slots=True)
class ViewCache:
    """The last view as it came.

    Attributes:
        epoch: names one life of the store's content; another one after a flush.
        change: number of the last change that the view has.
        position: of the stream of changes, where waiting goes on; None before the first view.
        placement: the last one read or written.
        workers: by id; None for an announcement that could not be read.
    """

    epoch: str = ""
    change: str = "0"
    position: str | None = None
    placement: Placement = field(default_factory=Placement)
    workers: dict[WorkerId, tuple[WorkerRecord, frozenset[ResidentSegment]] | None] = field(
        default_factory=dict
    )

    def apply(self, reply: Sequence[Any]) -> ClusterView:
        """The view after an answer of `scripts.VIEW`, which was asked for with what stands here.

        Raises:
            StateStoreError: the placement cannot be read.
        """
        epoch, change, position, live, busy, news, version, wanted, whole = reply
        if int(version) != self.placement.version:
            told = dict(zip(wanted[::2], wanted[1::2], strict=True))
            self.placement = _placement(int(version), {} if whole else self.placement.workers, told)
        if epoch != self.epoch:
            self.workers.clear()
        for worker, record, segments in news:
            self.workers[worker] = _announced(worker, record, segments)
        for worker in self.workers.keys() - set(live):
            del self.workers[worker]
        self.epoch, self.change, self.position = epoch, change, position
        views = {}
        for worker, load in zip(live, busy, strict=True):
            said = self.workers.get(worker)
            if said is not None:
                views[worker] = WorkerView(said[0], _load(worker, load), said[1])
        return ClusterView(views, self.placement)


def _placement(
    version: int, before: Mapping[WorkerId, tuple[Assignment, ...]], told: Mapping[WorkerId, str | None]
) -> Placement:
    """A placement from what it was and what is told of it since; None for a worker it no longer names."""
    workers = {worker: held for worker, held in before.items() if worker not in told}
    read = {worker: codec.decode_assignments(text) for worker, text in told.items() if text is not None}
    return Placement(version, workers | read)


def _announced(
    worker: WorkerId, record: str, segments: str
) -> tuple[WorkerRecord, frozenset[ResidentSegment]] | None:
    """One worker that cannot be read must not hide the others; it is left out until it says something new."""
    try:
        return codec.decode_record(record), codec.decode_segments(segments)
    except StateStoreError as error:
        log.warning("worker=%s is left out: %s", worker, error)
        return None


def _load(worker: WorkerId, load: str) -> LoadReport:
    try:
        return codec.decode_load(load)
    except StateStoreError as error:
        log.warning("load of worker=%s is left out: %s", worker, error)
        return LoadReport()
