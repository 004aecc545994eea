"""Credentials and channels of clients."""

from __future__ import annotations

import pytest

from blockserve.client.aio import AsyncClient
from blockserve.common.errors import ConfigurationError
from blockserve.common.rpc.channel import Credentials
from support.edge import async_test


@async_test
async def test_a_token_does_not_travel_readable() -> None:
    with pytest.raises(ConfigurationError, match="unencrypted"):
        AsyncClient("zoo.example:7450", credentials=Credentials(token="t0ken"))
    await AsyncClient("zoo.example:7450", credentials=Credentials(token="t0ken", insecure=True)).close()
    await AsyncClient("zoo.example:7450", credentials=Credentials(token="t0ken", tls=True)).close()
    assert "t0ken" not in repr(Credentials(token="t0ken"))
