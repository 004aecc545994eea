"""A router process: which services it offers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from blockserve.client.zoo import RemoteZoo
from blockserve.common.errors import NoLeaderError, RemoteError
from blockserve.router.server import RouterServer
from blockserve.router.settings import RouterSettings
from blockzoo.errors import BlockzooError
from blockzoo.zoo import Zoo
from support.edge import async_test


@pytest.mark.parametrize("zoo_calls", [True, False])
@async_test
async def test_zoo_calls_are_passed_on_unless_that_is_turned_off(tmp_path: Path, zoo_calls: bool) -> None:
    Zoo.open(tmp_path / "zoo", create=True)
    settings = RouterSettings.load(
        zoo=str(tmp_path / "zoo"), listen="127.0.0.1:0", metrics_listen="off", zoo_calls=zoo_calls
    )
    server = RouterServer(settings)
    await server.start()
    try:
        with RemoteZoo(server.address) as zoo, pytest.raises(BlockzooError) as caught:
            await asyncio.to_thread(zoo.ls)
    finally:
        await server.stop(drain_seconds=0)
    if zoo_calls:
        assert isinstance(caught.value, NoLeaderError)
    else:
        assert isinstance(caught.value, RemoteError)
        assert caught.value.code == "UNIMPLEMENTED"
