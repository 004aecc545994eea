"""When a worker ends itself: its engine has ended, too many of its passes fail, or its name is another's."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from blockserve.common.errors import ConfigurationError, EngineFailedError
from blockserve.worker import server as module
from blockserve.worker.server import SICK_SECONDS, WorkerServer
from blockserve.worker.settings import WorkerSettings


async def never() -> EngineFailedError:
    await asyncio.sleep(3600)
    raise AssertionError


async def ended() -> EngineFailedError:
    return EngineFailedError("the engine ended")


def failure(
    monkeypatch: pytest.MonkeyPatch, failed: Any, passes: int, *, replaced: str = "", **settings: Any
) -> str:
    """What ends the worker; "" when nothing does."""
    monkeypatch.setattr(module, "HEALTH_SECONDS", 0.01)
    asked: list[float] = []

    def failed_requests(seconds: float) -> int:
        asked.append(seconds)
        return passes

    async def work() -> str:
        server = WorkerServer(WorkerSettings.load(zoo="z", state={"url": "memory:"}, **settings))
        server._engine = SimpleNamespace(failed=failed, failed_requests=failed_requests)  # type: ignore[assignment]
        announcer = SimpleNamespace(replaced=asyncio.get_running_loop().create_future())
        server._announcer = announcer  # type: ignore[assignment]
        if replaced:
            announcer.replaced.set_result(ConfigurationError(replaced))
        try:
            return str(await asyncio.wait_for(server.failed(), 0.2))
        except TimeoutError:
            return ""

    said = asyncio.run(work())
    assert set(asked) <= {SICK_SECONDS}
    return said


def test_an_engine_that_ended_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    assert failure(monkeypatch, ended, 0) == "the engine ended"


@pytest.mark.parametrize(
    ("passes", "most", "ends"), [(17, 16, True), (16, 16, False), (200, 0, False), (1, 0, False)]
)
def test_so_do_passes_that_go_on_failing(
    monkeypatch: pytest.MonkeyPatch, passes: int, most: int, ends: bool
) -> None:
    said = failure(monkeypatch, never, passes, max_failed_passes=most)
    assert said == ("passes of 17 requests failed within 60 s, and none succeeded" if ends else "")


def test_so_does_another_worker_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert failure(monkeypatch, never, 0, replaced="another worker is called 'w'").startswith(
        "another worker"
    )
