"""What a request is expected to cost at each worker: the numbers that path assembly minimises.

A worker that holds so many positions and needs `step_seconds` for a pass spends `step_seconds / positions`
on a link. Where nothing was measured yet, the model's own numbers over the worker's speed stand in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from blockserve.common.cluster import WorkerId, WorkerView

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CostModel:
    """Weights of an estimate; measured values come before these.

    Attributes:
        link_seconds: of one link in one decode pass at a worker of speed 1 that has reported nothing.
        prefill_link_seconds: of one prompt token in one link, at such a worker.
        crowding: by how much of itself a pass grows with every request that its last measure did not see.
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
        step: of one link in a decode pass, before crowding.
        crowd: requests that `step` has not seen.
        prefill: of one token in one link.
        backlog: until the tokens that wait there are computed.
    """

    step: Floats
    crowd: Floats
    prefill: Floats
    backlog: Floats


def worker_costs(views: Sequence[WorkerView], positions: Sequence[int], model: CostModel) -> WorkerCosts:
    """The costs at each worker, from its load report or the model."""
    step, crowd, prefill, backlog = [], [], [], []
    for view, held in zip(views, positions, strict=True):
        load, links = view.load, max(held, 1)
        speed = view.record.speed if view.record.speed > 0 else 1.0
        measured = load.step_seconds > 0
        step.append(load.step_seconds / links if measured else model.link_seconds / speed)
        crowd.append(load.waiting_requests + (0 if measured else load.running_requests))
        rate = load.prefill_tokens_per_second * links
        prefill.append(1 / rate if rate > 0 else model.prefill_link_seconds / speed)
        full = load.kv_pages_total > 0 and load.kv_pages_free == 0
        backlog.append(load.queued_tokens * prefill[-1] * links + (model.full_kv_seconds if full else 0.0))
    return WorkerCosts(np.array(step), np.array(crowd, dtype=float), np.array(prefill), np.array(backlog))


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
