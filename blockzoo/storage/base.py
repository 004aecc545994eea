"""What the zoo needs of a storage: named immutable objects, created only if absent.

Every key is `/`-separated ASCII made by blockzoo itself; callers never pass user
input as a key without `names.check_name` or `digest.is_digest` before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from blockzoo.digest import Buffer

Chunks = Sequence[Buffer]
"""The bytes of one object, in parts that need not be joined."""
Stamp = tuple[int, ...]
"""Compared with `==` only; see `Storage.stamp`."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object in a listing.

    Attributes:
        key: full key.
        size: stored bytes.
        modified: seconds since 1970 by the storage's clock; None where it has none of its own.
    """

    key: str
    size: int
    modified: float | None = field(default=None, compare=False)


def keys_right_below(folder: str, listed: Iterable[ObjectInfo]) -> set[str]:
    """Return what `Storage.keys` does, from what `Storage.list` yields for the folder."""
    return {info.key for info in listed if "/" not in info.key[len(folder) + 1 :]}


class Staged(Protocol):
    """Bytes on their way into the storage, not yet visible under any key."""

    def publish(self, key: str) -> bool:
        """Make the bytes the object `key` unless there is one; tell whether there was none.

        The bytes are made durable first, unless `Storage.flush` did; the name is durable only
        after `Storage.sync([key])`.
        May be called once; the staged bytes are gone afterwards, whatever the answer.
        """

    def discard(self) -> None:
        """Drop the bytes. Harmless after `publish`."""


@runtime_checkable
class Storage(Protocol):
    """A place for a zoo. All methods may be called from several threads at once.

    Errors: NotFoundError for a missing object, StorageFullError when there is no room,
    UnsupportedStoreError when the place lacks what the zoo needs, StorageError for the rest.
    """

    @property
    def url(self) -> str:
        """Where the storage is, as `open_storage` accepts it."""

    @property
    def is_remote(self) -> bool:
        """True when each operation is a request over a network."""

    def put_if_absent(self, key: str, data: Chunks, *, durable: bool = True) -> bool:
        """Create the object unless it exists; tell whether it was created.

        With `durable` it survives power loss from here on; without, it need not.
        """

    def stage(self, data: Chunks) -> Staged:
        """Bring bytes to the storage before it is known whether they are needed.

        The buffers must not change before the result is published or discarded.
        """

    def flush(self, staged: Sequence[Staged]) -> None:
        """Make the bytes of many staged objects of this storage durable at once."""

    def replace(self, key: str, data: Chunks) -> None:
        """Create or overwrite the object durably. Only for repairing corrupt objects."""

    def get(self, key: str) -> memoryview:
        """Return the object's bytes, read-only; large local objects are mapped, not read."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return at most `length` bytes from `start`; fewer where the object ends."""

    def get_part(self, key: str, start: int, length: int) -> memoryview:
        """As `get`, for at most `length` bytes from `start`; fewer where the object ends."""

    def size(self, key: str) -> int | None:
        """Return the object's bytes, or None when it does not exist."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects below a folder `prefix` ("" for all), in no particular order."""

    def keys(self, folder: str) -> set[str]:
        """Return the keys of the objects right below a folder: on a disk faster than `list`."""

    def stamp(self, folder: str) -> Stamp | None:
        """Return what changes whenever an object right below a folder comes or goes.

        Equal stamps mean that a listing made after the first one still holds. None where only a listing
        can tell. Never waits for a network, so an event loop may ask.
        """

    def delete(self, key: str) -> bool:
        """Delete the object; tell whether it existed (always True on remote storages)."""

    def sync(self, keys: Iterable[str]) -> None:
        """Make creations and deletions of these keys survive power loss."""

    def clean(self) -> int:
        """Remove what dead writers left behind; return the bytes freed."""
