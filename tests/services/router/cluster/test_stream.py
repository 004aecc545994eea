"""The router's stream to a worker: what piled up for a request goes on as one."""

from blockserve.common.api.engine import EngineRequest, SamplingParams, TokenEvent
from blockserve.common.errors import PathBrokenError
from blockserve.router.cluster.stream import _Running
from blockzoo.manifest import ChainId


def running() -> _Running:
    request = EngineRequest("r", ChainId("c"), (1, 2), SamplingParams(), max_tokens=5)
    return _Running(request)


def event(index: int) -> TokenEvent:
    return TokenEvent(index, 100 + index)


def test_tokens_that_piled_up_are_taken_together() -> None:
    one = running()
    for outcome in ([event(0)], [event(1), event(2)], [event(3)]):
        one.put(outcome)
    assert list(one.take()) == [event(index) for index in range(4)]  # type: ignore[arg-type]
    assert not one.outcomes


def test_an_error_comes_after_the_tokens_before_it() -> None:
    one, error = running(), PathBrokenError("gone")
    one.put([event(0)])
    one.put([event(1)])
    one.put(error)
    assert one.take() == [event(0), event(1)]
    assert one.take() is error
