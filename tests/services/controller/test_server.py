"""A controller process: what it tells routers of itself."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from blockserve.common.api.leader import leader_address
from blockserve.common.state.memory import InProcessStore
from blockserve.controller import server as module
from blockserve.controller.server import ControllerServer
from blockserve.controller.settings import ControllerSettings
from support.edge import async_test


@pytest.mark.parametrize(
    ("listen", "advertise", "published"),
    [
        ("0.0.0.0:0", "", ""),
        ("[::]:0", "", ""),
        ("0.0.0.0:0", "zoo:7452", "zoo:7452"),
        ("127.0.0.1:0", "", "own"),
    ],
)
@async_test
async def test_routers_are_told_no_address_that_nobody_can_call(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    listen: str,
    advertise: str,
    published: str,
) -> None:
    store = InProcessStore()
    monkeypatch.setattr(module, "open_store", lambda _: store)
    settings = ControllerSettings.load(
        zoo=str(tmp_path / "zoo"),
        create_zoo=True,
        listen=listen,
        advertise=advertise,
        insecure=True,
        metrics_listen="off",
        state={"url": "memory:"},
    )
    server = ControllerServer(settings)
    with caplog.at_level(logging.WARNING):
        await server.start()
        try:
            while (leader := await store.leader()) is None:
                await asyncio.sleep(0.01)
        finally:
            await server.stop()
    assert leader_address(leader) == (server.address if published == "own" else published)
    assert ("set `advertise`" in caplog.text) == (not published)
