"""The connection to Redis: from settings to a client, and every failure to one type.

A call either answers within its time or raises `StateStoreError`; nothing waits for a server that is paused,
and nothing has to be done after one was restarted: the next call connects again.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import ConnectionPool, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from blockserve.common.errors import ConfigurationError, StateStoreError
from blockserve.common.state import scripts
from blockserve.common.state.settings import StateConfig
from blockserve.common.state.url import Kind, StateUrl


class Connection:
    """Scripts on one server, with a time limit on each.

    Args:
        client: answers as text.
        where: the server in messages, without secrets.
        timeout: seconds that a call may take.
        on_close: lets go of what else belongs to the client.
    """

    def __init__(
        self, client: Redis, where: StateUrl, timeout: float, on_close: Sequence[Redis] = ()
    ) -> None:
        self._clients = [client, *on_close]
        self._client = client
        self._where = where
        self._scripts: dict[str, AsyncScript] = {}
        self._checked = False
        self.timeout = timeout

    async def run(self, script: str, *arguments: str | int) -> Any:
        """Run a script of `state_scripts`.

        Raises:
            StateStoreError: no answer in time, or a refusal.
            ConfigurationError: the server is a node of Redis Cluster.
        """
        async with self._guard():
            await self._check()
            if script not in self._scripts:
                self._scripts[script] = self._client.register_script(script)
            return await self._scripts[script](keys=scripts.KEYS, args=arguments)

    async def wait_beyond(self, position: str, seconds: float) -> None:
        """Return once the stream of changes has gone beyond a position, or after some seconds.

        Args:
            position: of the stream.
            seconds: at most half of `timeout`, so that a silent server is told from a quiet one.

        Raises:
            StateStoreError: as `run`.
        """
        async with self._guard():
            await self._client.xread({scripts.CHANGES: position}, block=max(1, int(seconds * 1000)))

    async def close(self) -> None:
        """Close all connections; a server that is gone is no reason to fail."""
        for client in self._clients:
            try:
                async with asyncio.timeout(self.timeout):
                    await client.aclose()
            except (RedisError, OSError, TimeoutError):
                continue

    async def _check(self) -> None:
        """Refuse Redis Cluster: its nodes share the keys out, and our scripts need them in one place."""
        if self._checked:
            return
        try:
            answer = await self._client.info("cluster")
        except ResponseError:  # INFO is not allowed to this user
            answer = {}
        if answer.get("cluster_enabled") == 1:
            raise ConfigurationError(
                f"{self._where} is a node of Redis Cluster, which cannot hold the shared state: "
                "the state is small and changes in single steps over all of its keys",
                hint="Use one server, or several behind Sentinel: redis+sentinel://host:port,host:port/service",
            )
        self._checked = True

    @asynccontextmanager
    async def _guard(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.timeout):
                yield
        except TimeoutError as error:
            raise self._failure(f"gave no answer within {self.timeout:g} s") from error
        except (RedisError, OSError) as error:
            raise self._failure(f"failed: {error}") from error

    def _failure(self, what: str) -> StateStoreError:
        return StateStoreError(
            f"the shared state at {self._where} {what}",
            hint="Requests continue with the last known view. Check that the server runs and that "
            "state.url is right.",
        )


def connect(config: StateConfig) -> Connection:
    """A connection as the settings say; made with its first use.

    Raises:
        ConfigurationError: a password, certificate or key cannot be read.
    """
    place = config.place
    password = _secret(config.password_file) if config.password_file else place.password
    options = {
        "db": place.database,
        "username": place.username or None,
        "password": password or None,
        **_common(config.timeout_seconds),
    }
    tls = _tls(config) if place.tls else {}
    if place.kind is Kind.SENTINEL:
        return _behind_sentinels(config, options, tls)
    pool: ConnectionPool
    if place.kind is Kind.UNIX:
        pool = ConnectionPool(UnixDomainSocketConnection, path=place.path, **options)
    else:
        [(host, port)] = place.hosts
        kind: dict[str, Any] = {"connection_class": SSLConnection} if place.tls else {}
        pool = ConnectionPool(host=host, port=port, **kind, **tls, **options)
    return Connection(Redis.from_pool(pool), place, config.timeout_seconds)


def _behind_sentinels(config: StateConfig, options: dict[str, Any], tls: dict[str, Any]) -> Connection:
    """The server that the sentinels name, asked again with every new connection."""
    place = config.place
    secure = {"ssl": True, **tls} if place.tls else {}
    # The first sentinels asked may be paused; one that is alive has to be found within a call's time.
    share = config.timeout_seconds / (len(place.hosts) + 1)
    own = _secret(config.sentinel_password_file) if config.sentinel_password_file else None
    sentinel: Sentinel = Sentinel(
        place.hosts, sentinel_kwargs={**_common(share), **secure, "password": own}, **options, **secure
    )
    client = sentinel.master_for(place.service)
    return Connection(client, place, config.timeout_seconds, on_close=sentinel.sentinels)


def _common(timeout: float) -> dict[str, Any]:
    return {
        "decode_responses": True,
        # What is not text was not written by us; the codec refuses it by name.
        "encoding_errors": "replace",
        # The older protocol: every server knows it, and it needs no greeting.
        "protocol": 2,
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        # Once: a pooled connection may be one to a server that has been restarted.
        "retry": Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
        "client_name": "blockzoo",
    }


def _tls(config: StateConfig) -> dict[str, Any]:
    for path in (config.ca_file, config.cert_file, config.key_file):
        if path is not None:
            _read(path)
    return {
        "ssl_cert_reqs": "required",
        "ssl_check_hostname": True,
        "ssl_min_version": ssl.TLSVersion.TLSv1_2,
        "ssl_ca_certs": config.ca_file and str(config.ca_file),
        "ssl_certfile": config.cert_file and str(config.cert_file),
        "ssl_keyfile": config.key_file and str(config.key_file),
    }


def _secret(path: Path) -> str:
    return _read(path).strip()


def _read(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}", path=path) from error
