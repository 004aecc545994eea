"""A server whose engine has ended waits for nobody's answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from blockserve.common.errors import EngineFailedError
from blockserve.embedded.server import EmbeddedServer
from blockserve.embedded.settings import EmbeddedSettings
from support.edge import async_test


@async_test
async def test_an_engine_that_ended_is_not_waited_for() -> None:
    waited: list[float] = []

    async def failed() -> EngineFailedError:
        return EngineFailedError("a bug")

    async def drain(seconds: float) -> int:
        waited.append(seconds)
        return 0

    async def close() -> None:
        pass

    server = EmbeddedServer(EmbeddedSettings.load(zoo="z", drain_seconds=20))
    parts: Any = server
    parts._engine = SimpleNamespace(failed=failed, stop=lambda: None)
    parts._router = SimpleNamespace(admission=SimpleNamespace(num_requests=1, drain=drain), close=close)
    assert "a bug" in str(await server.failed())
    await server.stop()
    assert waited == [0.0]
