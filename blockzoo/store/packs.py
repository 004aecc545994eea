"""Packs: many small objects in one file, because an adapter has hundreds and a file system minds each.

A pack is itself an object of the storage, and is named by what it holds::

    8 bytes    magic "bzpack" 0x00 0x01; the last byte is the version of this layout
    8 bytes    number of entries, little-endian
    48 zeros
    index      48 bytes for each entry, ascending: digest (32 bytes), kind (u32), bytes (u32), offset (u64)
    entries    the objects as they would be stored on their own, each at a multiple of 64

The name of a pack is the BLAKE3 of its index, so a damaged index shows, and writing a pack twice is
writing it once. The bytes of an entry are checked by whoever reads it, as those of any object: its key is
its digest.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from blockzoo import layout
from blockzoo.digest import Buffer
from blockzoo.errors import CorruptManifestError
from blockzoo.storage.base import Chunks, Storage

MAX_OBJECT_BYTES = 1 << 20
"""Objects below go into packs: the factors of a LoRA adapter, norms, manifests, small files. What is larger
gains nothing, and gc would copy it when something beside it goes."""

MAX_PACK_BYTES = 64 << 20
"""Bytes that a writer gathers, in memory, before it writes them as a pack."""

FOLDERS = (layout.BLOBS, layout.BLOCKS, layout.CHAINS)
"""Whose objects may be in packs: what comes first never needs what comes later. The kind of an entry is an
index into this."""

_MAGIC = b"bzpack\x00\x01"
_HEADER_BYTES = 64
_ALIGNMENT = 64
_PROBE = 32 << 10
"""Bytes fetched to see an index; that of an adapter with 600 objects fits."""
_MAX_ENTRIES = 1 << 20
_KEYS = (layout.blob_key, layout.block_key, layout.chain_key)
_ENTRY = struct.Struct("<32sIIQ")


@dataclass(frozen=True, slots=True)
class Entry:
    """Where an object is: in which pack, from which byte, how many bytes."""

    pack: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """The index of one pack, by slots from 0.

    Attributes:
        key: where the pack is.
        index: as it is stored.
    """

    key: str
    index: bytes

    def __len__(self) -> int:
        return len(self.index) // _ENTRY.size

    def at(self, slot: int) -> tuple[str, Entry]:
        """Return key and place of the object in a slot."""
        digest, kind, size, offset = _ENTRY.unpack_from(self.index, slot * _ENTRY.size)
        return _KEYS[kind](digest.hex()), Entry(self.key, offset, size)

    def find(self, key: str) -> Entry | None:
        """Return the place of an object, None where the pack does not hold it."""
        digest, kind = bytes.fromhex(key.rpartition("/")[2][:64]), FOLDERS.index(key.partition("/")[0])
        slot = bisect_left(range(len(self)), digest, key=self._digest)
        while slot < len(self) and self._digest(slot) == digest:
            _, found, size, offset = _ENTRY.unpack_from(self.index, slot * _ENTRY.size)
            if found == kind:
                return Entry(self.key, offset, size)
            slot += 1
        return None

    def _digest(self, slot: int) -> bytes:
        return self.index[slot * _ENTRY.size : slot * _ENTRY.size + 32]

    def objects(self) -> Iterator[tuple[str, Entry]]:
        """Yield each object's key and place."""
        for digest, kind, size, offset in _ENTRY.iter_unpack(self.index):
            yield _KEYS[kind](digest.hex()), Entry(self.key, offset, size)

    def prefixes(self) -> npt.NDArray[np.uint64]:
        """Return what `prefix_of` says of each slot; ascending."""
        rows = self._rows()
        return np.ascontiguousarray(rows[:, :8]).view(">u8").reshape(len(self)).astype(np.uint64)

    def has_known_kinds(self) -> bool:
        """Tell whether all objects are of kinds that packs may hold."""
        kinds = np.ascontiguousarray(self._rows()[:, 32:36]).view("<u4")
        return bool((kinds < len(FOLDERS)).all())

    def _rows(self) -> npt.NDArray[np.uint8]:
        return np.frombuffer(self.index, np.uint8).reshape(len(self), _ENTRY.size)


def can_hold(key: str) -> bool:
    """Tell whether the object of a key may be in a pack: it is named by a digest, and never changes."""
    return layout.is_content(key)


def prefix_of(key: str) -> int:
    """Return the first eight bytes of the digest that a key names, as the index compares them."""
    return int.from_bytes(bytes.fromhex(key.rpartition("/")[2][:16]), "big")


def build(objects: Mapping[str, Buffer]) -> tuple[str, Chunks]:
    """Return key and bytes of a pack of these objects, which `can_hold` must allow."""
    parts: list[tuple[bytes, int, Buffer]] = []
    for key, data in objects.items():
        named = layout.digest_of(key)
        assert named is not None, key
        parts.append((bytes.fromhex(named), FOLDERS.index(key.partition("/")[0]), data))
    parts.sort(key=lambda part: part[:2])
    index = bytearray()
    chunks: list[Buffer] = []
    end = _HEADER_BYTES + len(parts) * _ENTRY.size
    for digest, kind, data in parts:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        size = memoryview(data).nbytes
        chunks += [bytes(start - end), data]
        index += _ENTRY.pack(digest, kind, size, start)
        end = start + size
    header = (_MAGIC + len(parts).to_bytes(8, "little")).ljust(_HEADER_BYTES, b"\0")
    return layout.pack_key(blake3(index).hexdigest()), [header, bytes(index), *chunks]


def read_index(storage: Storage, key: str) -> Pack:
    """Return the index of a stored pack.

    Raises:
        NotFoundError: there is no such pack.
        CorruptManifestError: its index is damaged, so nobody can tell what it holds.
    """
    head = storage.get_range(key, 0, _PROBE)
    count = int.from_bytes(head[8:16], "little")
    if len(head) < _HEADER_BYTES or head[:8] != _MAGIC or any(head[16:_HEADER_BYTES]) or count > _MAX_ENTRIES:
        raise damaged(key)
    end = _HEADER_BYTES + count * _ENTRY.size
    if end > len(head):
        head = storage.get_range(key, 0, end)
    index = head[_HEADER_BYTES:end]
    if layout.pack_key(blake3(index).hexdigest()) != key:
        raise damaged(key)
    pack = Pack(key, index)
    if not pack.has_known_kinds():
        raise damaged(key)
    return pack


def damaged(key: str) -> CorruptManifestError:
    """Return the error for a pack whose index is not what its name says."""
    return CorruptManifestError(
        f"{key} is damaged: what is in this pack counts as missing",
        hint="Run `blockzoo verify --repair FROM` with a backup, then `blockzoo gc`.",
        key=key,
    )
