"""A router process: which services it offers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from blockserve.client.zoo import RemoteZoo
from blockserve.common.errors import NoLeaderError, RemoteError
from blockserve.router.server import RouterServer
from blockserve.router.settings import RouterSettings
from blockzoo.errors import BlockzooError
from blockzoo.zoo import Zoo
from support.edge import async_test


@pytest.mark.parametrize(
    ("given", "passes"),
    [
        ({"listen": "127.0.0.1:0"}, True),
        ({"listen": "unix:/r.sock"}, True),
        ({"listen": "0.0.0.0:0", "insecure": True}, False),
        ({"listen": "0.0.0.0:0", "tls_cert": "c", "tls_key": "k", "tls_client_ca": "a"}, False),
        ({"listen": "0.0.0.0:0", "tls_cert": "c", "tls_key": "k", "token_file": "t"}, True),
        ({"listen": "0.0.0.0:0", "insecure": True, "zoo_calls": True}, True),
        ({"listen": "127.0.0.1:0", "zoo_calls": False}, False),
    ],
)
def test_strangers_do_not_get_the_zoo_by_default(given: dict[str, Any], passes: bool) -> None:
    assert RouterSettings.load(zoo="z", **given).passes_zoo_calls is passes


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
