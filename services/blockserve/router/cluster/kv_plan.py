"""What of a request's keys and values could be fetched for its next path, and what that would take. Pure.

Keys and values are kept by layer, so the new path may be cut at other places than the old one: each of its
workers fetches every layer from whichever worker of the old path executed it.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from blockserve.common.api.cluster import ClusterView, PathStep, Run, WorkerId
from blockserve.common.settings import Section, setting


class Reason(enum.StrEnum):
    """Why a request's keys and values were transferred or not."""

    CHEAPER = "cheaper"
    COMPUTING_IS_CHEAPER = "computing_is_cheaper"
    OWNER_LOST = "owner_lost"
    OTHER_RUNS = "other_runs"
    OTHER_LAYOUT = "other_layout"
    NOTHING_CACHED = "nothing_cached"
    FAILED = "failed"


class KvCosts(Section):
    """When keys and values follow a request to another worker."""

    choice: Literal["auto", "transfer", "recompute"] = setting(
        "auto",
        "Always fetch keys and values if possible, always compute them again, or do what is expected to "
        "be faster.",
        reason="Both ways give the same answer; the other values are for measuring and for broken networks.",
    )
    bytes_per_second: float = setting(
        500e6,
        "Assumed speed of a transfer between two workers, until one was measured.",
        unit="bytes per second",
        reason="Half of what one machine's loopback gives through gRPC.",
        gt=0,
    )
    transfer_seconds: float = setting(
        0.01,
        "Assumed fixed time of a transfer.",
        unit="seconds",
        reason="A connection, and a wait for the gap between two passes at both workers.",
        ge=0,
    )
    prefill_tokens_per_second: float = setting(
        1000.0,
        "Assumed prefill speed along a path, until its workers have measured theirs.",
        unit="tokens per second",
        reason="A small model on a few cores.",
        gt=0,
    )


@dataclass(frozen=True, slots=True)
class Move:
    """Keys and values to fetch.

    Attributes:
        source: who has them, and the run that it executed.
        target: who is to have them, and the run that it will execute; it may be the source.
        layers: positions of the layers, in both runs.
    """

    source: PathStep
    target: PathStep
    layers: Run

    @property
    def is_local(self) -> bool:
        """Whether nothing has to be sent: the worker has these layers, cached for another run."""
        return self.source.worker == self.target.worker


@dataclass(frozen=True, slots=True)
class Estimate:
    """Expected seconds of both ways.

    Attributes:
        transfer: all moves at the same time, those of one source one after another.
        recompute: prompt and answer through the path.
    """

    transfer: float
    recompute: float


def plan_moves(
    before: Sequence[PathStep], after: Sequence[PathStep], view: ClusterView, lost: WorkerId | None
) -> tuple[list[Move], Reason | None]:
    """What would have to be fetched, and why that is impossible where it is.

    A worker that executes the same run on both paths has what it needs.

    Args:
        before: the path that a request leaves, in order.
        after: the path that it takes, over the same chain.
        view: the cluster.
        lost: a worker of the old path that cannot be asked.

    Returns:
        The moves by target, in order of layers, each layer once; none when there is a reason.
    """
    moves: list[Move] = []
    for target in after:
        # Neither the embedding at the chain's begin nor the head at its end has keys and values.
        wanted = target.run.overlap(Run(1, max(2, after[-1].run.end - 1)))
        if wanted is None or any(one.worker == target.worker and one.run == target.run for one in before):
            continue
        parts = [
            Move(source, target, layers)
            for source in before
            if (layers := source.run.overlap(wanted)) is not None
        ]
        if sum(len(part.layers) for part in parts) != len(wanted):
            return [], Reason.OTHER_RUNS
        for part in parts:
            if (reason := _hindrance(part, view, lost)) is not None:
                return [], reason
        moves += parts
    return moves, None


def _hindrance(move: Move, view: ClusterView, lost: WorkerId | None) -> Reason | None:
    """Why a move cannot be made."""
    source, target = move.source.worker, move.target.worker
    if source == lost or source not in view.workers:
        return Reason.OWNER_LOST
    if view.workers[source].record.kv_fingerprint != view.workers[target].record.kv_fingerprint:
        return Reason.OTHER_LAYOUT
    return None


def estimate(
    moves: Sequence[Move],
    after: Sequence[PathStep],
    tokens: int,
    view: ClusterView,
    costs: KvCosts,
    bytes_per_second: float,
) -> Estimate:
    """Expected seconds of fetching and of computing `tokens` tokens.

    Args:
        moves: what would be fetched.
        after: the new path.
        tokens: prompt and answer so far.
        view: what workers measured.
        costs: what stands in where nothing was measured.
        bytes_per_second: of one source, measured by transfers so far; 0 for never.
    """
    rate = bytes_per_second or costs.bytes_per_second
    sizes: Counter[WorkerId] = Counter()
    for move in moves:
        if not move.is_local:
            source = move.source.worker
            sizes[source] += tokens * len(move.layers) * view.workers[source].load.kv_token_bytes
    speeds = [view.workers[step.worker].load.prefill_tokens_per_second for step in after]
    # Spans compute chunk after chunk at the same time; the slowest decides, and one chunk passes through all.
    slowest = min((speed for speed in speeds if speed), default=costs.prefill_tokens_per_second)
    return Estimate(costs.transfer_seconds + max(sizes.values(), default=0) / rate, tokens / slowest)
