"""The shared state in Redis or Valkey. docs/state.md has the keys and what happens when they are lost."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Collection, Mapping
from hashlib import blake2b

from blockserve.common.api.cluster import ClusterView, LoadReport, Placement, WorkerId
from blockserve.common.errors import StaleLeaderError, StateStoreError
from blockserve.common.state import codec, scripts
from blockserve.common.state.cache import ViewCache
from blockserve.common.state.connection import Connection
from blockserve.common.state.store import Announcement, FencingToken
from blockzoo.manifest import ChainId

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.1
"""Between two attempts of `wait_change` to reach a server that is gone."""
_STALE, _OTHER_BASE = 0, 2
"""Answers of `scripts.PLACE` that have stored nothing."""


class RedisStore:
    """A `StateStore` on a server; see the protocol for what the methods promise.

    Every method is one round trip and one step. Besides the loads, `view` brings only what was announced and
    placed since the last one. Open one store for each component: `wait_change` goes by its last reading.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._cache = ViewCache()
        self._using_cache = asyncio.Lock()
        # By worker: names the announcement that the server is to have.
        self._stamps: dict[WorkerId, str] = {}
        # A store that was flushed must not go behind what we have seen of it.
        self._newest_token = 0
        self._newest_version = 0
        self._told_demand: frozenset[ChainId] = frozenset()
        self._wanted: dict[WorkerId, Placement] = {}

    async def announce(
        self,
        announcement: Announcement,
        *,
        lease_seconds: float,
        instead_of: Collection[WorkerId] | None = None,
    ) -> WorkerId | None:
        """Take or renew a lease, unless another worker has the name, and replace what is said."""
        worker = announcement.record.id
        said = codec.encode_record(announcement.record), codec.encode_segments(announcement.segments)
        stamp = blake2b("\n".join(said).encode(), digest_size=8).hexdigest()
        lease, load = _milliseconds(lease_seconds), codec.encode_load(announcement.load)
        name = "" if instead_of is None else codec.encode_name(announcement.record.name)
        aside = sorted(instead_of or ())
        other = await self._connection.run(
            scripts.ANNOUNCE, _fresh_epoch(), worker, lease, load, stamp, *said, name, *aside
        )
        if other is not None:
            return WorkerId(other)
        self._stamps[worker] = stamp
        return None

    async def renew(self, worker: WorkerId, load: LoadReport, *, lease_seconds: float) -> bool:
        """Renew a lease and its load; False when the server lacks what this store last announced of it.

        Its lease ended, the server was flushed or restarted, or a replica took over that lagged behind.
        """
        stamp = self._stamps.get(worker)
        if stamp is None:
            return False
        arguments = (worker, _milliseconds(lease_seconds), codec.encode_load(load), stamp)
        return bool(await self._connection.run(scripts.RENEW, _fresh_epoch(), *arguments))

    async def withdraw(self, worker: WorkerId) -> None:
        """End a worker's lease now."""
        self._stamps.pop(worker, None)
        await self._connection.run(scripts.WITHDRAW, _fresh_epoch(), worker)

    async def view(self) -> ClusterView:
        """The workers with a live lease, and the placement; version 0 after the store was lost."""
        async with self._using_cache:
            cache = self._cache
            known = (cache.epoch, cache.change, cache.placement.version)
            reply = await self._connection.run(scripts.VIEW, _fresh_epoch(), *known)
            view = cache.apply(reply)
        self._newest_version = max(self._newest_version, view.placement.version)
        return view

    async def wanted(self, worker: WorkerId) -> Placement:
        """The placement as far as it names one worker; its runs travel when they are others."""
        async with self._using_cache:
            known = self._wanted.get(worker, Placement())
            position, version, same, text = await self._connection.run(scripts.WANTED, worker, known.version)
            runs = known.workers if same else {}
            if text is not None:
                runs = {worker: codec.decode_assignments(text)}
            self._wanted[worker] = wanted = Placement(int(version), runs)
            self._cache.position = position
        return wanted

    async def wait_change(self, timeout: float) -> None:
        """Return once something but load differs from this store's last reading, or after `timeout` seconds.

        Never raises StateStoreError: while the server cannot be reached it waits and tries again, and it
        returns early when the server is back with something else. So a loop of `view` and `wait_change`
        never spins.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        seen = self._cache.position
        while (left := deadline - loop.time()) > 0:
            try:
                position, lease_ms = await self._connection.run(scripts.POSITION, _fresh_epoch())
                seen = position if seen is None else seen
                if position != seen:
                    return
                # The end of a lease is a change that nobody announces.
                next_end = lease_ms / 1000 if lease_ms >= 0 else left
                await self._connection.wait_beyond(seen, min(left, next_end, self._connection.timeout / 2))
            except StateStoreError as error:
                log.debug("waiting for changes: %s", error)
                await asyncio.sleep(min(RETRY_SECONDS, max(0.0, deadline - loop.time())))

    async def lead(self, holder: str, *, lease_seconds: float) -> FencingToken | None:
        """Become or stay the leader; None while another one is."""
        lease = _milliseconds(lease_seconds)
        answer = await self._connection.run(scripts.LEAD, holder, lease, self._newest_token)
        if answer is None:
            return None
        self._newest_token = max(self._newest_token, int(answer))
        return FencingToken(int(answer))

    async def leader(self) -> str | None:
        """Who leads, as they call themselves; None while nobody does."""
        answer = await self._connection.run(scripts.LEADER)
        return None if answer is None else str(answer)

    async def resign(self, holder: str) -> None:
        """Give up leadership, if it is `holder`'s."""
        await self._connection.run(scripts.RESIGN, holder)

    async def place(self, placement: Placement, token: FencingToken) -> Placement:
        """Replace the placement; StaleLeaderError when the token is not the newest, or the store was lost."""
        async with self._using_cache:
            before = self._cache.placement
            done, value = await self._write(placement, token, before)
            if done == _OTHER_BASE:
                done, value = await self._write(placement, token, Placement())
            if done == _STALE:
                raise StaleLeaderError(
                    f"the write of leader {token} is refused: {value or 'nobody'} leads now",
                    hint="Stop leading until `lead` returns a new token.",
                )
            self._newest_version = int(value)
            self._cache.placement = stored = Placement(int(value), dict(placement.workers))
        return stored

    async def _write(self, placement: Placement, token: FencingToken, base: Placement) -> tuple[int, str]:
        """Send a placement as its difference to `base`; all of it when that is of version 0."""
        told = [
            text
            for worker, held in placement.changes(base).items()
            for text in (worker, "" if held is None else codec.encode_assignments(held))
        ]
        known = max(self._newest_version, placement.version)
        to = (str(base.version), len(base.workers)) if base.version else ("", "")
        done, value = await self._connection.run(scripts.PLACE, _fresh_epoch(), str(token), known, *to, *told)
        return int(done), str(value)

    async def tell_demand(self, router: str, demand: Mapping[ChainId, float], *, ttl_seconds: float) -> None:
        """Replace what a router's callers ask for, in requests/s."""
        is_new = not demand.keys() <= self._told_demand
        await self._connection.run(
            scripts.DEMAND_TOLD,
            _fresh_epoch(),
            router,
            _milliseconds(ttl_seconds),
            codec.encode_demand(demand),
            "1" if is_new else "0",
        )
        self._told_demand = frozenset(demand)

    async def demand(self) -> dict[ChainId, float]:
        """What the callers of all routers ask for, in requests/s."""
        told = await self._connection.run(scripts.DEMAND)
        return codec.add_rates(codec.decode_demand(rates) for rates in told)

    async def close(self) -> None:
        """Close the connections; leases run out by themselves."""
        await self._connection.close()


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _fresh_epoch() -> str:
    """What the store's content is called if this call is the first one after it was lost."""
    return secrets.token_hex(8)
