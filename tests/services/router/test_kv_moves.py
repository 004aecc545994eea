"""What a worker is asked to fetch, in a form that an older one can only fail at."""

from blockserve.common.cluster import PathStep, Run, WorkerId
from blockserve.common.engine_api import EngineRequest, SamplingParams
from blockserve.router.kv_moves import pull_message
from blockserve.router.kv_plan import Move
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
    assert list(prefix.tokens) == [1, 2, 3]


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
