"""What Redis does for the shared state in one step: the keys, and the Lua scripts over them.

docs/state.md explains each key. A script runs alone, so whoever reads sees every announcement whole. All
times are the server's own, in milliseconds: clocks of the workers' machines play no part.
"""

from __future__ import annotations

PREFIX = "bz:1:"

KEYS = tuple(
    PREFIX + name
    for name in (
        *("leases", "records", "residency", "loads", "stamps", "revisions", "meta", "changes"),
        *("placement", "assignments", "leader", "token", "demand", "placed"),
    )
)
CHANGES = PREFIX + "changes"
HISTORY = 64
"""Placements back to which a reader is told what has changed since; one that is further behind reads all."""

_COMMON = """
local leases, records, residency, loads, stamps, revisions, meta, changes = unpack(KEYS, 1, 8)
local placement, assignments, leader, token_key, demand, placed = unpack(KEYS, 9, 14)
local call = redis.call
local clock = call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

-- An abandoned cluster leaves nothing behind for longer than this; live ones renew it.
local function keep()
  if call('PTTL', leases) < 1800000 or call('PTTL', meta) < 1800000 then
    for i = 1, 8 do call('PEXPIRE', KEYS[i], 3600000) end
  end
end

-- Grows with each use, and by the clock: a replica that takes over without the last numbers does not use
-- them again. Text, because Lua would round it.
local function after(last)
  return string.format('%.0f', math.max((tonumber(last) or 0) + 1, now))
end

-- Something but load is different: number it, and wake those who wait in XREAD.
local function changed(epoch)
  call('HSETNX', meta, 'epoch', epoch)
  local change = after(call('HGET', meta, 'change'))
  call('HSET', meta, 'change', change)
  call('HSET', meta, 'at', call('XADD', changes, 'MAXLEN', 1, '*', 'change', change))
  return change
end

-- Whether all that the announcement of that stamp said is here. A store that was lost, in part or as a whole,
-- or that a replica replaced which lacks the last changes, needs it again.
local function has(worker, stamp)
  return call('HGET', stamps, worker) == stamp and call('ZSCORE', leases, worker)
    and call('HEXISTS', records, worker) == 1 and call('HEXISTS', residency, worker) == 1
    and call('ZSCORE', revisions, worker) and call('EXISTS', meta) == 1
end

local function forget(worker)
  local known = call('ZREM', leases, worker)
  for _, key in ipairs({records, residency, loads, stamps}) do call('HDEL', key, worker) end
  call('ZREM', revisions, worker)
  return known == 1
end

local function sweep(epoch)
  local dead = call('ZRANGEBYSCORE', leases, '-inf', now)
  for _, worker in ipairs(dead) do forget(worker) end
  if #dead > 0 then changed(epoch) end
end

-- The versions since which `placed` knows what has changed, oldest first. None when it is not about this
-- version: it was lost, or a release that does not keep it has placed.
local function history(version)
  if tonumber(call('ZSCORE', placed, '') or -1) ~= tonumber(version) then return '' end
  return call('HGET', placement, 'versions') or ''
end

-- By name, not by order: a replica that took over may lack a version that a reader has seen.
local function follows(version, known)
  return string.find(' ' .. history(version) .. ' ', ' ' .. known .. ' ', 1, true) ~= nil
end
"""

ANNOUNCE = (
    _COMMON
    + """
local epoch, worker, lease, load, stamp, record, segments, name = unpack(ARGV, 1, 8)
sweep(epoch)
if name ~= '' and not call('ZSCORE', leases, worker) then
  local aside = {}
  for i = 9, #ARGV do aside[ARGV[i]] = true end
  for _, other in ipairs(call('ZRANGE', leases, 0, -1)) do
    local known = not aside[other] and call('HGET', records, other)
    -- No other part of a record reads like this: quotes inside of texts are escaped.
    if known and string.find(known, name, 1, true) then return other end
  end
end
local same = has(worker, stamp)
call('ZADD', leases, now + lease, worker)
call('HSET', loads, worker, load)
if not same then
  call('HSET', records, worker, record)
  call('HSET', residency, worker, segments)
  call('HSET', stamps, worker, stamp)
  call('ZADD', revisions, changed(epoch), worker)
end
keep()
"""
)
"""Arguments: epoch, worker, lease in ms, load, stamp, record, segments, the name as it stands in
records ('' to ask about none), worker, worker, ... Returns nil, or a live worker of that name that is not
among the last ones."""

RENEW = (
    _COMMON
    + """
local epoch, worker, lease, load, stamp = unpack(ARGV)
sweep(epoch)
if not has(worker, stamp) then return 0 end
call('ZADD', leases, now + lease, worker)
call('HSET', loads, worker, load)
keep()
return 1
"""
)
"""Arguments: epoch, worker, lease in ms, load, stamp. Returns 1, or 0: the worker has to announce itself."""

WITHDRAW = _COMMON + "if forget(ARGV[2]) then changed(ARGV[1]) end"
"""Arguments: epoch, worker."""

VIEW = (
    _COMMON
    + """
sweep(ARGV[1])
local epoch = call('HGET', meta, 'epoch') or ''
local change = call('HGET', meta, 'change') or '0'
local since = '0'
if epoch == ARGV[2] and tonumber(ARGV[3]) <= tonumber(change) then since = ARGV[3] end
local news = {}
local new = call('ZRANGEBYSCORE', revisions, '(' .. since, '+inf')
for i, worker in ipairs(new) do
  news[i] = {worker, call('HGET', records, worker) or '', call('HGET', residency, worker) or ''}
end
local live = call('ZRANGE', leases, 0, -1)
local busy = {}
for i, worker in ipairs(live) do busy[i] = call('HGET', loads, worker) or '{}' end
local version = call('HGET', placement, 'version') or '0'
local known, wanted, whole = ARGV[4], {}, 0
if version ~= known and follows(version, known) then
  for _, worker in ipairs(call('ZRANGEBYSCORE', placed, '(' .. known, '+inf')) do
    if worker ~= '' then
      wanted[#wanted + 1] = worker
      wanted[#wanted + 1] = call('HGET', assignments, worker)
    end
  end
elseif version ~= known then
  wanted, whole = call('HGETALL', assignments), 1
end
return {epoch, change, call('HGET', meta, 'at') or '0-0', live, busy, news, version, wanted, whole}
"""
)
"""Arguments: a fresh epoch, the epoch, change and placement version the caller has. Returns, in one step:
epoch, change, stream position, live workers, their loads, [worker, record, segments] of those announced
since, the placement's version, worker, assignments, worker, ... as far as they differ from those of the
caller's version (nil: no longer named), and 1 when these are all workers, whatever the caller has."""

WANTED = (
    _COMMON
    + """
local worker, known = ARGV[1], ARGV[2]
local at = call('HGET', meta, 'at') or '0-0'
local version = call('HGET', placement, 'version') or '0'
local score = call('ZSCORE', placed, worker)
local same = version == known
  or follows(version, known) and tonumber(score or 0) <= tonumber(known)
return {at, version, same and 1 or 0, not same and call('HGET', assignments, worker)}
"""
)
"""Arguments: worker, the placement version the caller has. Returns the stream position, the placement's
version, 1 when it says of the worker what the caller's says, otherwise its assignments (nil: not named)."""

DEMAND_TOLD = (
    _COMMON
    + """
local epoch, router, ttl, rates, is_new = unpack(ARGV)
call('HSET', demand, router, string.format('%.0f', now + ttl) .. ' ' .. rates)
call('PEXPIRE', demand, math.max(tonumber(ttl), 3600000))
if is_new == '1' then changed(epoch) end
"""
)
"""Arguments: epoch, router, milliseconds to keep, rates, 1 when a chain is new among them."""

DEMAND = (
    _COMMON
    + """
local told = {}
local all = call('HGETALL', demand)
for i = 1, #all, 2 do
  local till, rates = string.match(all[i + 1], '^(%d+) (.*)$')
  if till and tonumber(till) > now then told[#told + 1] = rates else call('HDEL', demand, all[i]) end
end
return told
"""
)
"""No arguments. Returns the rates of every router that told them lately."""

POSITION = (
    _COMMON
    + """
sweep(ARGV[1])
local first = call('ZRANGE', leases, 0, 0, 'WITHSCORES')
return {call('HGET', meta, 'at') or '0-0', first[2] and math.max(first[2] - now, 0) or -1}
"""
)
"""Arguments: epoch. Returns the stream position, and milliseconds until the next lease ends, -1 for none."""

LEAD = (
    _COMMON
    + """
local holder, lease, known = unpack(ARGV)
local current = call('GET', leader)
if current and current ~= holder then return false end
local token = call('GET', token_key)
if not (current and token) then
  -- By the clock, so that tokens go on growing after the store has lost the last one.
  local micros = clock[1] * 1000000 + clock[2]
  token = string.format('%.0f', math.max((tonumber(token) or 0) + 1, tonumber(known) + 1, micros))
  call('SET', token_key, token)
end
call('SET', leader, holder, 'PX', lease)
return token
"""
)
"""Arguments: holder, lease in ms, the largest known token. Returns a token, or nil: another one leads."""

LEADER = _COMMON + "return call('GET', leader)"
"""No arguments. Returns the holder, or nil."""

RESIGN = _COMMON + "if call('GET', leader) == ARGV[1] then call('DEL', leader) end"
"""Arguments: holder."""

PLACE = (
    _COMMON
    + f"local most = {HISTORY}"
    + """
local epoch, token, known, base, count = unpack(ARGV, 1, 5)
local current = call('GET', token_key)
if current ~= token then return {0, current or ''} end
local stored = call('HGET', placement, 'version') or '0'
if base ~= '' and (stored ~= base or call('HLEN', assignments) ~= tonumber(count)) then return {2, stored} end
local version = after(math.max(tonumber(stored) or 0, tonumber(known)))
local versions = {}
if base == '' then
  call('DEL', assignments, placed)
else
  for one in string.gmatch(history(stored), '%S+') do versions[#versions + 1] = one end
  if #versions == 0 then
    call('DEL', placed)
    versions = {stored}
  end
end
versions[#versions + 1] = version
while #versions > most do table.remove(versions, 1) end
for i = 6, #ARGV, 2 do
  if ARGV[i + 1] == '' then
    call('HDEL', assignments, ARGV[i])
  else
    call('HSET', assignments, ARGV[i], ARGV[i + 1])
  end
  call('ZADD', placed, version, ARGV[i])
end
-- Nobody asks what had changed by the oldest version: who has an older one reads all.
call('ZREMRANGEBYSCORE', placed, '-inf', versions[1])
call('ZADD', placed, version, '')
call('HSET', placement, 'version', version, 'token', token, 'versions', table.concat(versions, ' '))
changed(epoch)
return {1, version}
"""
)
"""Arguments: epoch, token, the largest version the caller knows, the version that what follows is the
difference to and how many workers that one names ('' twice: what follows is all), then worker, assignments,
worker, ... ('': no longer named). Returns [1, version], [0, the current token] for a writer that leads no
more, or [2, version] when what is stored is not what the difference is to: all has to be sent."""
