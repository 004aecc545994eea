"""A zoo in this process's memory, for tests and throw-away experiments."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from blockzoo.errors import NotFoundError
from blockzoo.storage.base import Chunks, ObjectInfo, Staged, Stamp, keys_right_below


class MemoryStorage:
    """Objects in a dictionary; gone with the last reference."""

    is_remote = False
    url = "memory://"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._objects: dict[str, bytes] = {}

    def put_if_absent(self, key: str, data: Chunks, *, durable: bool = True) -> bool:  # noqa: ARG002
        """See `Storage`."""
        joined = b"".join(data)
        with self._lock:
            return self._objects.setdefault(key, joined) is joined

    def stage(self, data: Chunks) -> HeldBytes:
        """See `Storage`."""
        return HeldBytes(self, data)

    def flush(self, staged: Sequence[Staged]) -> None:
        """See `Storage`: there is nothing to do before the bytes are published."""

    def replace(self, key: str, data: Chunks) -> None:
        """See `Storage`."""
        with self._lock:
            self._objects[key] = b"".join(data)

    def get(self, key: str) -> memoryview:
        """See `Storage`."""
        with self._lock:
            try:
                return memoryview(self._objects[key])
            except KeyError:
                raise NotFoundError(f"{key} does not exist", key=key) from None

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See `Storage`."""
        return bytes(self.get(key)[start : start + length])

    def get_part(self, key: str, start: int, length: int) -> memoryview:
        """See `Storage`."""
        return self.get(key)[start : start + length]

    def size(self, key: str) -> int | None:
        """See `Storage`."""
        with self._lock:
            data = self._objects.get(key)
        return None if data is None else len(data)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `Storage`."""
        folder = prefix.rstrip("/") + "/" if prefix else ""
        with self._lock:
            found = [
                ObjectInfo(key, len(data)) for key, data in self._objects.items() if key.startswith(folder)
            ]
        return iter(found)

    def keys(self, folder: str) -> set[str]:
        """See `Storage`."""
        return keys_right_below(folder, self.list(folder))

    def stamp(self, folder: str) -> Stamp | None:  # noqa: ARG002
        """See `Storage`: a listing costs no more than asking whether it is needed."""
        return None

    def delete(self, key: str) -> bool:
        """See `Storage`."""
        with self._lock:
            return self._objects.pop(key, None) is not None

    def sync(self, keys: Iterable[str]) -> None:
        """See `Storage`: nothing survives power loss here."""

    def clean(self) -> int:
        """See `Storage`: a dead writer leaves nothing."""
        return 0


class PutIfAbsent(Protocol):
    """The part of a storage that `HeldBytes` needs."""

    def put_if_absent(self, key: str, data: Chunks) -> bool:
        """See `Storage`."""


class HeldBytes:
    """Staged bytes of a storage that has no place for them before they have a key."""

    def __init__(self, storage: PutIfAbsent, data: Chunks) -> None:
        self._storage = storage
        self._data: Chunks | None = data

    def publish(self, key: str) -> bool:
        """See `Staged`."""
        data, self._data = self._data, None
        assert data is not None, "published twice"
        return self._storage.put_if_absent(key, data)

    def discard(self) -> None:
        """See `Staged`."""
        self._data = None
