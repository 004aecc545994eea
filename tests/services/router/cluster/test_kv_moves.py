"""What a worker is asked to fetch, in a form that an older one can only fail at; what came of it."""

import asyncio

import grpc
import pytest

from blockproto.v1 import worker_pb2, worker_pb2_grpc
from blockserve.common.api.cluster import (
    ChainSpan,
    ClusterView,
    PathStep,
    Run,
    WorkerId,
    WorkerRecord,
    WorkerView,
)
from blockserve.common.api.engine import EngineRequest, SamplingParams
from blockserve.common.rpc.channel import Credentials
from blockserve.router.cluster.kv_moves import KvMover, pull_message
from blockserve.router.cluster.kv_plan import KvCosts, Move
from blockserve.worker.peers.convert import prefix_from_message, prefix_to_message
from blockserve.worker.peers.kv_transfer import PrefixRef
from blockzoo.manifest import ChainId

REQUEST = EngineRequest("r", ChainId("c"), (1, 2), SamplingParams(), 5, cache_salt="s", output=(3,))


def _step(name: str, first: int, end: int) -> PathStep:
    return PathStep(WorkerId(name), f"unix:/{name}", Run(first, end))


def test_the_same_run_is_asked_for_as_older_workers_know_it() -> None:
    message = pull_message(REQUEST, [Move(_step("a", 2, 6), _step("b", 2, 6), Run(2, 5))])
    assert (message.source_worker_id, message.source_address) == ("a", "unix:/a")
    assert not message.parts
    prefix = message.prefix
    assert (prefix.chain_digest, prefix.first, prefix.end, prefix.cache_salt) == ("c", 2, 6, "s")
    assert (list(prefix.tokens), prefix.prompt_tokens) == ([1, 2, 3], 2)
    ref = prefix_from_message(prefix)
    assert ref == PrefixRef(ChainSpan(ChainId("c"), Run(2, 6)), "s", (1, 2, 3), 2)
    assert prefix_to_message(ref) == prefix


def test_other_parts_name_no_source_that_an_older_worker_would_ask() -> None:
    target = _step("c", 0, 6)
    moves = [Move(_step("a", 0, 2), target, Run(1, 2)), Move(_step("c", 2, 6), target, Run(2, 5))]
    message = pull_message(REQUEST, moves)
    assert (message.source_worker_id, message.source_address) == ("", "")
    assert (message.prefix.first, message.prefix.end) == (0, 6)
    found = [
        (one.source_worker_id, one.source_address, one.source_first, one.source_end, one.first, one.end)
        for one in message.parts
    ]
    assert found == [("a", "unix:/a", 0, 2, 1, 2), ("c", "unix:/c", 2, 6, 2, 5)]
    # One part of a longer run is a part too.
    assert pull_message(REQUEST, [Move(_step("a", 0, 9), _step("b", 0, 4), Run(1, 4))]).parts


class Target(worker_pb2_grpc.WorkerServiceServicer):
    """A worker that answers so when it is asked to fetch; None refuses."""

    def __init__(self, tokens: int | None) -> None:
        self.tokens = tokens

    async def PullKv(self, request, context):
        if self.tokens is None:
            await context.abort(grpc.StatusCode.DATA_LOSS, "a page is damaged")
        return worker_pb2.PullKvResponse(tokens=self.tokens, bytes=self.tokens * 100, seconds=0.1)


@pytest.mark.parametrize(
    ("tokens", "decision"),
    [
        (32, ("transfer", "cheaper")),
        (0, ("recompute", "nothing_cached")),
        (None, ("recompute", "failed")),
    ],
)
def test_what_came_of_a_transfer_is_counted(tmp_path, tokens, decision):
    async def main() -> KvMover:
        address = f"unix:{tmp_path}/b"
        server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(Target(tokens), server)
        server.add_insecure_port(address)
        await server.start()
        before = PathStep(WorkerId("a"), "unix:/nowhere", Run(0, 6))
        after = PathStep(WorkerId("b"), address, Run(0, 6))
        view = ClusterView(
            {
                one.worker: WorkerView(WorkerRecord(one.worker, one.worker, one.address))
                for one in (before, after)
            }
        )
        mover = KvMover(Credentials(), KvCosts(choice="transfer"))
        said = await mover.move(REQUEST, [before], [after], view, None)
        await server.stop(None)
        assert said == ": ".join(decision)
        return mover

    mover = asyncio.run(main())
    assert mover.decisions == {decision: 1}
    assert (mover.bytes_per_second > 0) == bool(tokens)
