"""What a request is expected to cost at each worker: the numbers that path assembly minimises.

A worker that holds so many positions and needs `step_seconds` for a pass spends `step_seconds / positions`
on a link, more the more requests share the pass. What it measured among so many requests is brought down to a
request alone, and up again to those it has now: so a worker that was crowded a minute ago and is idle now
counts as idle, and one whose neighbours alone have measured counts as they would be, alone. A worker that has
not measured is reckoned with the median of those that have, over its speed; the model's own numbers count
where nobody has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from blockserve.common.api.cluster import LoadReport, WorkerId, WorkerView

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CostModel:
    """Weights of an estimate; measured values come before these.

    Attributes:
        link_seconds: of one link in a decode pass of one request, speed 1, while no worker has measured.
        prefill_link_seconds: of one prompt token in one link, in the same way.
        crowding: by how much of itself such a pass grows with every further request, in the same way.
        hop_seconds: one way between two hosts.
        same_host_hop_seconds: one way inside a host.
        row_bytes: of the hidden state of one token.
        bytes_per_second: between two hosts.
        same_host_bytes_per_second: inside a host.
        full_kv_seconds: expected wait at a worker without a free KV page.
        meeting_share: share of a request's bare time that may be spent on meeting others at the replica that
            all who need the same base block would choose first; 0 sends each to whoever is fastest.
    """

    link_seconds: float = 0.001
    prefill_link_seconds: float = 2e-5
    crowding: float = 0.03
    hop_seconds: float = 0.001
    same_host_hop_seconds: float = 0.0003
    row_bytes: int = 8192
    bytes_per_second: float = 1e9
    same_host_bytes_per_second: float = 4e9
    full_kv_seconds: float = 1.0
    meeting_share: float = 0.1


@dataclass(frozen=True, slots=True)
class RequestSize:
    """How much a request will compute.

    Attributes:
        prompt_tokens: in all, known to some worker or not.
        output_tokens: expected.
        cached_tokens: leading prompt tokens whose KV a worker has for every link of this chain that it holds.
            A path saves the least of its workers' numbers, because who lacks a token needs its hidden state
            from those before.
    """

    prompt_tokens: int
    output_tokens: int
    cached_tokens: Mapping[WorkerId, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WorkerCosts:
    """Expected seconds at each worker, arrays of shape [workers].

    Attributes:
        step: of one link in a decode pass of one request.
        crowding: by how much of itself that grows with every further request.
        crowd: requests that are there.
        prefill: of one token in one link.
        backlog: until the tokens that wait there are computed.
        typical_step, typical_prefill: of a worker of speed 1, by the median of what was measured.
    """

    step: Floats
    crowding: Floats
    crowd: Floats
    prefill: Floats
    backlog: Floats
    typical_step: float
    typical_prefill: float


def worker_costs(views: Sequence[WorkerView], positions: Sequence[int], model: CostModel) -> WorkerCosts:
    """The costs at each worker, from its load report, the others', or the model."""
    loads = [view.load for view in views]
    speed = np.array([view.record.speed if view.record.speed > 0 else 1.0 for view in views])
    links = np.maximum(np.array(positions, dtype=float), 1.0)
    crowding, _ = _filled(_numbers(loads, "step_crowding"), np.ones(len(views)), model.crowding)
    shared = np.array([_step_requests(load) for load in loads])
    alone = _numbers(loads, "step_seconds") / links / (1 + crowding * (shared - 1))
    step, typical_step = _filled(alone, speed, model.link_seconds)
    rate = _numbers(loads, "prefill_tokens_per_second") * links
    measured = np.divide(1.0, rate, out=np.zeros(len(views)), where=rate > 0)
    prefill, typical_prefill = _filled(measured, speed, model.prefill_link_seconds)
    full = np.array([load.kv_pages_total > 0 and load.kv_pages_free == 0 for load in loads], dtype=float)
    return WorkerCosts(
        step=step,
        crowding=crowding,
        crowd=_numbers(loads, "waiting_requests") + _numbers(loads, "running_requests"),
        prefill=prefill,
        backlog=_numbers(loads, "queued_tokens") * prefill * links + model.full_kv_seconds * full,
        typical_step=typical_step,
        typical_prefill=typical_prefill,
    )


def _filled(measured: Floats, speed: Floats, otherwise: float) -> tuple[Floats, float]:
    """Zeros replaced by the median of the rest at speed 1, over the own speed; and that median."""
    known = measured > 0
    typical = float(np.median(measured[known] * speed[known])) if known.any() else otherwise
    return np.where(known, measured, typical / speed), typical


def _step_requests(load: LoadReport) -> float:
    """Requests that the measured passes had; a worker that does not say had those that run there."""
    return max(load.step_requests or load.running_requests, 1.0)


def _numbers(loads: Sequence[LoadReport], name: str) -> Floats:
    return np.array([getattr(load, name) for load in loads], dtype=float)


def hop_latency(views: Sequence[WorkerView], model: CostModel) -> tuple[Floats, Floats]:
    """Seconds of one message and seconds of one more hidden row, both [from, to]."""
    hosts: dict[str, int] = {}
    codes = np.array(
        [hosts.setdefault(view.record.host or f"\0{number}", number) for number, view in enumerate(views)]
    )
    same = codes[:, None] == codes[None, :]
    latency = np.where(same, model.same_host_hop_seconds, model.hop_seconds)
    row = np.where(
        same, model.row_bytes / model.same_host_bytes_per_second, model.row_bytes / model.bytes_per_second
    )
    numbers = {view.record.id: number for number, view in enumerate(views)}
    for number, view in enumerate(views):
        known = [
            (numbers[peer], seconds) for peer, seconds in view.load.hop_seconds.items() if peer in numbers
        ]
        if known:
            peers, seconds = zip(*known, strict=True)
            latency[number, list(peers)] = seconds
    return latency, row
