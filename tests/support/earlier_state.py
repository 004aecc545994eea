"""A store as it was before placements travelled as changes: the scripts of that release, word for word.

Neighbouring releases share a server, so what it reads and writes must go on to be right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from blockserve.common.api.cluster import ClusterView, Placement
from blockserve.common.state import codec, scripts
from blockserve.common.state.redis import RedisStore
from blockserve.common.state.store import FencingToken, StateStore

_EARLIER_KEYS = [
    *("leases", "records", "residency", "loads", "stamps", "revisions", "meta", "changes"),
    *("placement", "assignments", "leader", "token", "demand"),
]
_COMMON = """
local leases, records, residency, loads, stamps, revisions, meta, changes = unpack(KEYS, 1, 8)
local placement, assignments, leader, token_key, demand = unpack(KEYS, 9, 13)
local call = redis.call
local clock = call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local function after(last)
  return string.format('%.0f', math.max((tonumber(last) or 0) + 1, now))
end
local function changed(epoch)
  call('HSETNX', meta, 'epoch', epoch)
  local change = after(call('HGET', meta, 'change'))
  call('HSET', meta, 'change', change)
  call('HSET', meta, 'at', call('XADD', changes, 'MAXLEN', 1, '*', 'change', change))
  return change
end
"""
_PLACE = (
    _COMMON
    + """
local epoch, token, known = unpack(ARGV, 1, 3)
local current = call('GET', token_key)
if current ~= token then return {0, current or ''} end
local stored = tonumber(call('HGET', placement, 'version')) or 0
local version = after(math.max(stored, tonumber(known)))
call('HSET', placement, 'version', version, 'token', token)
call('DEL', assignments)
for i = 4, #ARGV, 2 do call('HSET', assignments, ARGV[i], ARGV[i + 1]) end
changed(epoch)
return {1, version}
"""
)
_READ = (
    _COMMON
    + """
local version = call('HGET', placement, 'version') or '0'
return {version, version ~= ARGV[1] and call('HGETALL', assignments) or {}}
"""
)


class _EarlierStore(RedisStore):
    """Places and reads placements whole."""

    _known = Placement()

    async def view(self) -> ClusterView:
        version, wanted = await self._connection.run(_READ, self._known.version)
        if int(version) != self._known.version:
            self._known = _decode(int(version), wanted)
        return ClusterView({}, self._known)

    async def place(self, placement: Placement, token: FencingToken) -> Placement:
        wanted = [
            text
            for name, held in placement.workers.items()
            for text in (name, codec.encode_assignments(held))
        ]
        arguments = (str(token), max(placement.version, self._known.version), *wanted)
        done, version = await self._connection.run(_PLACE, "0" * 16, *arguments)
        assert done, version
        return Placement(int(version), placement.workers)


def before_changes(store: StateStore) -> RedisStore:
    """That release's store, on the connection of another one."""
    assert isinstance(store, RedisStore)
    assert [key.removeprefix(scripts.PREFIX) for key in scripts.KEYS[:13]] == _EARLIER_KEYS
    return _EarlierStore(store._connection)


def _decode(version: int, wanted: Sequence[Any]) -> Placement:
    pairs = zip(wanted[::2], wanted[1::2], strict=True)
    return Placement(version, {name: codec.decode_assignments(text) for name, text in pairs})
