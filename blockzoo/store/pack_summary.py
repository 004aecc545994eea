"""Summaries: what thousands of packs hold, in one object, so that a process need not read each of them.

A summary lies beside the packs and is a cache of their indexes. One that is absent, old or damaged costs
time only: a pack that none lists is read itself, one that has gone is not listed in the storage, and before
an object is read the index of its pack is, which its name proves. The layout::

    8 bytes    magic "bzpsum" 0x00 0x01; the last byte is the version of this layout
    8 bytes    number of packs, little-endian
    8 bytes    number of entries, little-endian
    40 zeros
    packs      the digest of each (32 bytes)
    entries    8 bytes for each object, ascending: the first 40 bits of its digest, then 24 bits with the
               place of its pack in the list above; as one number, little-endian

The name of a summary is the BLAKE3 of all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from blockzoo import layout
from blockzoo.errors import CorruptManifestError
from blockzoo.storage.base import Chunks, Storage
from blockzoo.store.pack_index import NUMBER_BITS, Entries

_MAGIC = b"bzpsum\x00\x01"
_HEADER_BYTES = 64
_DIGEST_BYTES = 32
_ENTRY_BYTES = 8
_PIECE = 1 << 17


@dataclass(frozen=True, slots=True, eq=False)
class Summary:
    """What some packs hold.

    Attributes:
        key: where it is stored.
        packs: keys of packs.
        entries: their objects; see `blockzoo.store.pack_index`.
    """

    key: str
    packs: Sequence[str]
    entries: Entries


def build_summary(packs: Sequence[str], entries: Entries) -> tuple[str, Chunks]:
    """Return key and bytes of a summary of these packs."""
    header = _MAGIC + len(packs).to_bytes(8, "little") + len(entries).to_bytes(8, "little")
    names = b"".join(bytes.fromhex(key.rpartition("/")[2]) for key in packs)
    body = [header.ljust(_HEADER_BYTES, b"\0"), names, entries.astype("<u8", copy=False).tobytes()]
    digest = blake3()
    for part in body:
        digest.update(part)
    return layout.summary_key(digest.hexdigest()), body


def read_summary(storage: Storage, key: str, size: int) -> Summary:
    """Return a stored summary.

    Args:
        storage: where it is.
        key: its key.
        size: bytes of it, as the listing says.

    Raises:
        NotFoundError: there is no such summary.
        CorruptManifestError: it is damaged.
    """
    body = storage.get_part(key, 0, size)
    if layout.summary_key(blake3(body).hexdigest()) != key or body[:8] != _MAGIC:
        raise _damaged(key)
    count, num_entries = (int.from_bytes(body[at : at + 8], "little") for at in (8, 16))
    start = _HEADER_BYTES + count * _DIGEST_BYTES
    if len(body) != start + num_entries * _ENTRY_BYTES or count >= 1 << NUMBER_BITS:
        raise _damaged(key)
    entries = np.frombuffer(body, "<u8", offset=start).astype(np.uint64, copy=False)
    if not _is_sound(entries, count):
        raise _damaged(key)
    names = bytes(body[_HEADER_BYTES:start]).hex()
    digests = (names[at : at + 2 * _DIGEST_BYTES] for at in range(0, len(names), 2 * _DIGEST_BYTES))
    return Summary(key, [layout.pack_key(digest) for digest in digests], entries)


def _is_sound(entries: Entries, num_packs: int) -> bool:
    """Tell whether entries ascend and name listed packs; by pieces, because there are millions."""
    for start in range(0, len(entries), _PIECE):
        piece = entries[start : start + _PIECE + 1]
        numbers = piece & np.uint64((1 << NUMBER_BITS) - 1)
        if int(numbers.max()) >= num_packs or bool((piece[1:] < piece[:-1]).any()):
            return False
    return True


def _damaged(key: str) -> CorruptManifestError:
    return CorruptManifestError(f"{key} is damaged: what it lists is read from the packs", key=key)
