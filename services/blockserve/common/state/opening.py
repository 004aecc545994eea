"""From settings to the store that they name; the library for Redis is imported only where it is needed."""

from __future__ import annotations

import logging
from contextlib import suppress

from blockserve.common.errors import ConfigurationError, StateStoreError
from blockserve.common.state.memory import InProcessStore
from blockserve.common.state.settings import StateConfig
from blockserve.common.state.store import StateStore
from blockserve.common.state.url import Kind

log = logging.getLogger(__name__)


def open_store(config: StateConfig) -> StateStore:
    """The store that the settings name; it connects with its first call.

    Raises:
        ConfigurationError: a file cannot be read, or the library for Redis is not installed.
    """
    if config.place.kind is Kind.MEMORY:
        log.warning("state.url is memory:, which other processes cannot reach; set it to a server")
        return InProcessStore()
    try:
        from blockserve.common.state.connection import connect
        from blockserve.common.state.redis import RedisStore
    except ImportError as error:
        raise ConfigurationError(
            "the library for Redis is not installed", hint="pip install 'blockzoo[cluster]'"
        ) from error
    return RedisStore(connect(config))


async def refuse_unfit(store: StateStore) -> None:
    """Ask a store once, so that a process does not start on a server that can never hold the shared state.

    One that does not answer may do so later.

    Raises:
        ConfigurationError: it is Redis Cluster.
    """
    with suppress(StateStoreError):
        await store.demand()
