"""Transfer or recompute: what becomes of a request's keys and values when it changes workers.

The worker that has them is preferred as long as it takes requests. When a request leaves it, the pages it
left in the prefix cache can be sent to who executes its layers next (`kv_plan`), or prompt and answer are
computed again. What is expected to be over first is done. A middle worker cannot compute from tokens alone:
computing again is done along the whole path, and a transfer pays only when all of the path has the keys.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

import grpc

from blockproto.v1 import worker_pb2, worker_pb2_grpc
from blockserve.common.api.cluster import ClusterView, PathStep, WorkerId
from blockserve.common.api.engine import EngineRequest
from blockserve.common.rpc.channel import Credentials, open_channel
from blockserve.router.cluster.kv_plan import KvCosts, Move, Reason, estimate, plan_moves

log = logging.getLogger(__name__)

MAX_TRANSFER_SECONDS = 30.0
"""A transfer that takes longer is given up."""


class KvMover:
    """Decides and fetches for one router. One event loop.

    Attributes:
        decisions: how often each was taken, by ("transfer" or "recompute", reason).
        bytes_per_second: of one source, a moving mean over transfers; 0 before the first.
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
                reason = await self._fetch_all(request, moves)
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

    async def _fetch_all(self, request: EngineRequest, moves: Sequence[Move]) -> Reason:
        by_target = [list(group) for _, group in groupby(moves, lambda move: move.target)]
        tokens = await asyncio.gather(*(self._fetch(request, group) for group in by_target))
        if None in tokens:
            return Reason.FAILED
        return Reason.CHEAPER if all(tokens) else Reason.NOTHING_CACHED

    async def _fetch(self, request: EngineRequest, moves: Sequence[Move]) -> int | None:
        """Have one worker fetch what it needs: how many leading tokens it has then; None for a failure."""
        target = moves[0].target
        async with open_channel(target.address, self._credentials) as channel:
            try:
                pulled = await worker_pb2_grpc.WorkerServiceStub(channel).PullKv(
                    pull_message(request, moves),
                    timeout=MAX_TRANSFER_SECONDS,
                    metadata=self._credentials.metadata(),
                )
            except grpc.aio.AioRpcError as error:
                log.warning("kv transfer failed id=%s: %s", request.request_id, error.details())
                return None
        if pulled.bytes:
            num_sources = len({move.source.worker for move in moves if not move.is_local})
            rate = pulled.bytes / max(pulled.seconds, 1e-6) / num_sources
            known = self.bytes_per_second
            self.bytes_per_second = rate if not known else known + 0.2 * (rate - known)
        return pulled.tokens


def pull_message(request: EngineRequest, moves: Sequence[Move]) -> worker_pb2.PullKvRequest:
    """What a worker is asked to fetch.

    A run that one worker executed as it was is asked for as ever. For other parts no source stands in the
    fields that an older worker reads: it fails, and what it lacks is computed.
    """
    target = moves[0].target
    message = worker_pb2.PullKvRequest(
        prefix=worker_pb2.PrefixRef(
            chain_digest=request.chain,
            first=target.run.first,
            end=target.run.end,
            cache_salt=request.cache_salt,
            tokens=(*request.prompt, *request.output),
            prompt_tokens=len(request.prompt),
        )
    )
    if len(moves) == 1 and moves[0].source.run == target.run:
        message.source_worker_id, message.source_address = moves[0].source.worker, moves[0].source.address
        return message
    for move in moves:
        message.parts.add(
            first=move.layers.first,
            end=move.layers.end,
            source_worker_id=move.source.worker,
            source_address=move.source.address,
            source_first=move.source.run.first,
            source_end=move.source.run.end,
        )
    return message
