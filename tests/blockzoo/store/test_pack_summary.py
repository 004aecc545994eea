"""Summaries as bytes: what is written is read, and what is damaged is not believed."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from blake3 import blake3

from blockzoo import layout
from blockzoo.errors import CorruptManifestError, NotFoundError
from blockzoo.storage import MemoryStorage
from blockzoo.store.pack_index import PackIndex
from blockzoo.store.pack_summary import build_summary, read_summary
from blockzoo.store.packs import Pack, build


def prepared() -> tuple[list[str], np.ndarray]:
    index = PackIndex()
    for number in range(5):
        objects = [hashlib.sha256(b"%d %d" % (number, item)).hexdigest() for item in range(number)]
        key, chunks = build({layout.blob_key(digest): b"" for digest in objects})
        index.add([Pack(key, bytes(chunks[1]))])
    packs = sorted(index.packs)
    return packs, index.entries_of(packs)


def stored(body: bytes, key: str | None = None) -> tuple[MemoryStorage, str]:
    storage = MemoryStorage()
    key = key or layout.summary_key(blake3(body).hexdigest())
    storage.put_if_absent(key, [body])
    return storage, key


def test_round_trip():
    packs, entries = prepared()
    key, body = build_summary(packs, entries)
    assert layout.is_summary(key)
    assert not layout.is_pack(key)
    storage, _ = stored(b"".join(body), key)
    summary = read_summary(storage, key, storage.size(key))
    assert (summary.key, summary.packs, summary.entries.tolist()) == (key, packs, entries.tolist())


def test_no_packs():
    key, body = build_summary([], np.zeros(0, np.uint64))
    storage, _ = stored(b"".join(body), key)
    assert read_summary(storage, key, 64).packs == []


def test_every_damaged_byte_and_length_is_noticed():
    key, chunks = build_summary(*prepared())
    body = b"".join(chunks)
    for at in range(len(body)):
        storage, _ = stored(body[:at] + bytes([body[at] ^ 4]) + body[at + 1 :], key)
        with pytest.raises(CorruptManifestError):
            read_summary(storage, key, len(body))
        storage, _ = stored(body[:at], key)
        with pytest.raises(CorruptManifestError):
            read_summary(storage, key, at)


def test_what_no_version_writes_is_not_believed():
    """Bytes under their right name: of another layout, with numbers of no pack, or out of order."""
    packs, entries = prepared()
    _, chunks = build_summary(packs, entries)
    body = b"".join(chunks)
    unsorted = b"".join(build_summary(packs, entries[::-1])[1])
    no_pack = b"".join(build_summary(packs[:1], entries)[1])
    longer = body + b"\0" * 8
    for bad in (b"bzpsum\x00\x02" + body[8:], unsorted, no_pack, longer, b"", body[:20]):
        storage, key = stored(bad)
        with pytest.raises(CorruptManifestError):
            read_summary(storage, key, len(bad))


def test_a_summary_that_has_gone():
    with pytest.raises(NotFoundError):
        read_summary(MemoryStorage(), layout.summary_key("ab" * 32), 64)
