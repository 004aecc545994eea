"""Transfer or recompute: what becomes of a request's keys and values when it changes workers.

The worker that has them is preferred as long as it takes requests. When a request leaves it, the pages it
left in the prefix cache can be sent to who executes the same run next, or prompt and answer are computed
again. What is expected to be over first is done. A middle worker cannot compute from tokens alone, so
computing again is done along the whole path, and a transfer pays only when all of the path has the keys.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import grpc

from blockproto.v1 import worker_pb2, worker_pb2_grpc
from blockserve.common.channel import Credentials, open_channel
from blockserve.common.cluster import ClusterView, PathStep, WorkerId
from blockserve.common.config import Section, setting
from blockserve.common.engine_api import EngineRequest

log = logging.getLogger(__name__)

MAX_TRANSFER_SECONDS = 30.0
"""A transfer that takes longer is given up."""


class Reason(enum.StrEnum):
    """Why a request's keys and values were transferred or not."""

    CHEAPER = "cheaper"
    COMPUTING_IS_CHEAPER = "computing_is_cheaper"
    OWNER_LOST = "owner_lost"
    OTHER_RUNS = "other_runs"
    OTHER_LAYOUT = "other_layout"
    FAILED = "failed"


class KvCosts(Section):
    """When keys and values follow a request to another worker."""

    choice: Literal["auto", "transfer", "recompute"] = setting(
        "auto",
        "Fetch keys and values where that is possible, compute them again, or what is expected to be faster.",
        reason="Both ways give the same answer; the other values are for measuring and for broken networks.",
    )
    bytes_per_second: float = setting(
        500e6,
        "Speed of a transfer between two workers, until one was measured.",
        unit="bytes per second",
        reason="Half of what one machine's loopback gives through gRPC.",
        gt=0,
    )
    transfer_seconds: float = setting(
        0.01,
        "What any transfer takes beside its bytes.",
        unit="seconds",
        reason="A connection, and a pause between two passes at either end.",
        ge=0,
    )
    prefill_tokens_per_second: float = setting(
        1000.0,
        "Speed of prompts along a path, until a worker has measured its own.",
        unit="tokens per second",
        reason="A small model on a few cores.",
        gt=0,
    )


@dataclass(frozen=True, slots=True)
class Move:
    """Keys and values to fetch: from one worker to the one that executes the same run next."""

    source: PathStep
    target: PathStep


@dataclass(frozen=True, slots=True)
class Estimate:
    """Expected seconds of both ways.

    Attributes:
        transfer: all moves at the same time.
        recompute: prompt and answer through the path.
    """

    transfer: float
    recompute: float


def plan_moves(
    before: Sequence[PathStep], after: Sequence[PathStep], view: ClusterView, lost: WorkerId | None
) -> tuple[list[Move], Reason | None]:
    """What would have to be fetched, and why that is impossible where it is."""
    moves: list[Move] = []
    for step in after:
        source = next((one for one in before if one.run == step.run), None)
        if source is None:
            return [], Reason.OTHER_RUNS
        if source.worker == step.worker:
            continue
        if source.worker == lost or source.worker not in view.workers:
            return [], Reason.OWNER_LOST
        layouts = {view.workers[one].record.kv_fingerprint for one in (source.worker, step.worker)}
        if len(layouts) > 1:
            return [], Reason.OTHER_LAYOUT
        moves.append(Move(source, step))
    return moves, None


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
        bytes_per_second: measured by transfers so far; 0 for never.
    """
    rate = bytes_per_second or costs.bytes_per_second
    sizes = [
        tokens * len(move.target.run) * view.workers[move.source.worker].load.kv_token_bytes for move in moves
    ]
    speeds = [view.workers[step.worker].load.prefill_tokens_per_second for step in after]
    # Spans compute chunk after chunk at the same time; the slowest decides, and one chunk passes through all.
    slowest = min((speed for speed in speeds if speed), default=costs.prefill_tokens_per_second)
    return Estimate(costs.transfer_seconds + sum(sizes) / rate, tokens / slowest)


class KvMover:
    """Decides and fetches for one router. One event loop.

    Attributes:
        decisions: how often each was taken, by ("transfer" or "recompute", reason).
        bytes_per_second: a moving mean over transfers; 0 before the first.
    """

    def __init__(self, credentials: Credentials, costs: KvCosts | None = None) -> None:
        """Begin without measurements."""
        self._credentials = credentials
        self._costs = costs or KvCosts()
        self.decisions: Counter[tuple[str, Reason]] = Counter()
        self.bytes_per_second = 0.0

    async def move(
        self,
        request: EngineRequest,
        before: Sequence[PathStep],
        after: Sequence[PathStep],
        view: ClusterView,
        lost: WorkerId | None,
    ) -> str:
        """Have a request's keys and values where it goes on, or leave them to be computed.

        Args:
            request: with all tokens told so far in `output`.
            before: the path it leaves.
            after: the path it takes.
            view: the cluster.
            lost: a worker of the old path that cannot be asked.

        Returns:
            What was done and why; empty when there was nothing to decide.
        """
        moves, reason = plan_moves(before, after, view, lost)
        tokens = len(request.prompt) + len(request.output)
        if reason is None and moves:
            if self._prefers_transfer(moves, after, tokens, view):
                reason = Reason.CHEAPER if await self._fetch_all(request, moves) else Reason.FAILED
            else:
                reason = Reason.COMPUTING_IS_CHEAPER
        if reason is None:
            return ""
        what = "transfer" if reason is Reason.CHEAPER else "recompute"
        self.decisions[what, reason] += 1
        log.info("kv %s reason=%s id=%s tokens=%d", what, reason, request.request_id, tokens)
        return f"{what}: {reason}"

    def _prefers_transfer(
        self, moves: Sequence[Move], after: Sequence[PathStep], tokens: int, view: ClusterView
    ) -> bool:
        if self._costs.choice != "auto":
            return self._costs.choice == "transfer"
        expected = estimate(moves, after, tokens, view, self._costs, self.bytes_per_second)
        return expected.transfer < expected.recompute

    async def _fetch_all(self, request: EngineRequest, moves: Sequence[Move]) -> bool:
        done = await asyncio.gather(*(self._fetch(request, move) for move in moves))
        return all(done)

    async def _fetch(self, request: EngineRequest, move: Move) -> bool:
        run = move.target.run
        message = worker_pb2.PullKvRequest(
            prefix=worker_pb2.PrefixRef(
                chain_digest=request.chain,
                first=run.first,
                end=run.end,
                cache_salt=request.cache_salt,
                tokens=(*request.prompt, *request.output),
            ),
            source_worker_id=move.source.worker,
            source_address=move.source.address,
        )
        async with open_channel(move.target.address, self._credentials) as channel:
            try:
                pulled = await worker_pb2_grpc.WorkerServiceStub(channel).PullKv(
                    message, timeout=MAX_TRANSFER_SECONDS, metadata=self._credentials.metadata()
                )
            except grpc.aio.AioRpcError as error:
                log.warning("kv transfer failed id=%s: %s", request.request_id, error.details())
                return False
        if pulled.bytes:
            rate = pulled.bytes / max(pulled.seconds, 1e-6)
            known = self.bytes_per_second
            self.bytes_per_second = rate if not known else known + 0.2 * (rate - known)
        return bool(pulled.tokens)
