"""Packs as bytes: what is written is found, and what is damaged is not believed."""

from __future__ import annotations

import pytest

from blockzoo import layout
from blockzoo.canonical import digest_bytes
from blockzoo.errors import CorruptManifestError, NotFoundError
from blockzoo.storage import MemoryStorage
from blockzoo.store.packs import build, can_hold, prefix_of, read_index


def objects(count: int) -> dict[str, bytes]:
    """Objects of all kinds and of odd sizes, some empty."""
    bodies = [bytes([index % 251]) * (index * 37 % 200) + index.to_bytes(4, "big") for index in range(count)]
    bodies[:1] = [b""]
    keys = (layout.blob_key, layout.block_key, layout.chain_key)
    return {keys[i % 3](digest_bytes(b"%d" % i)): body for i, body in enumerate(bodies)}


def stored(held: dict[str, bytes]) -> tuple[MemoryStorage, str]:
    storage = MemoryStorage()
    key, chunks = build(held)
    storage.put_if_absent(key, chunks)
    return storage, key


@pytest.mark.parametrize("count", [1, 2, 700, 3000])
def test_round_trip(count):
    """Indexes that fit the first look, and ones that do not."""
    held = objects(count)
    storage, key = stored(held)
    pack = read_index(storage, key)
    assert len(pack) == count
    assert {name: storage.get_part(key, entry.offset, entry.size) for name, entry in pack.objects()} == held
    assert dict(pack.objects()) == dict(pack.at(slot) for slot in range(count))
    assert all(entry.offset % 64 == 0 for _, entry in pack.objects())
    assert [int(prefix) for prefix in pack.prefixes()] == sorted(map(prefix_of, held))


def test_the_same_objects_make_the_same_pack():
    held = objects(9)
    assert build(held) == build(dict(reversed(held.items())))
    assert build(held)[0] != build(objects(10))[0]


def test_a_name_that_two_kinds_share():
    digest = digest_bytes(b"both")
    held = {layout.blob_key(digest): b"blob", layout.chain_key(digest): b"chain"}
    storage, key = stored(held)
    assert {
        name: bytes(storage.get_part(key, e.offset, e.size)) for name, e in read_index(storage, key).objects()
    } == held


def test_what_may_be_in_a_pack():
    digest = digest_bytes(b"x")
    assert all(map(can_hold, (layout.blob_key(digest), layout.block_key(digest), layout.chain_key(digest))))
    assert not any(
        map(can_hold, ("zoo.json", "refs/variants/bot/1", "leases/1.json", layout.pack_key(digest)))
    )
    assert not can_hold(layout.blob_key(digest) + ".bak")


@pytest.mark.parametrize("at", [0, 7, 8, 15, 16, 63, 64, 100, 64 + 48 * 5 - 1])
def test_a_changed_byte_of_the_index_is_noticed(at):
    storage, key = stored(objects(5))
    body = bytearray(storage.get(key))
    body[at] ^= 1
    storage.replace(key, [bytes(body)])
    with pytest.raises(CorruptManifestError, match="is damaged"):
        read_index(storage, key)


@pytest.mark.parametrize("size", [0, 7, 63, 64, 200])
def test_a_short_pack_is_noticed(size):
    storage, key = stored(objects(5))
    storage.replace(key, [bytes(storage.get(key))[:size]])
    with pytest.raises(CorruptManifestError):
        read_index(storage, key)


def test_a_pack_that_has_gone():
    with pytest.raises(NotFoundError):
        read_index(MemoryStorage(), layout.pack_key(digest_bytes(b"gone")))
