"""Where a zoo's objects are: a local folder, an object store, or memory."""

from __future__ import annotations

from pathlib import Path

from blockzoo.errors import InvalidInputError
from blockzoo.storage.base import Chunks, ObjectInfo, Staged, Stamp, Storage
from blockzoo.storage.local import LocalStorage
from blockzoo.storage.memory import MemoryStorage

REMOTE_SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss")
"""URL schemes that are object stores."""


def open_storage(url: str | Path) -> Storage:
    """Return the storage at a folder path, `file://` URL, object store URL or `memory://`.

    Object stores take their credentials and endpoint from the environment, spelled as
    their own tools spell them (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, ...). Nothing is
    read or written yet.

    Raises:
        InvalidInputError: the URL's scheme is unknown.
        StorageError: an object store refuses its configuration.
    """
    text = str(url)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return LocalStorage(Path(text).expanduser())
    if scheme == "file":
        return LocalStorage(Path(rest))
    if scheme == "memory":
        return MemoryStorage()
    if scheme in REMOTE_SCHEMES:
        # Imported late: a local zoo should not pay for the object store client's start.
        from blockzoo.storage.objects import ObjectStorage

        return ObjectStorage.from_url(text)
    raise InvalidInputError(
        f"a zoo cannot be at a {scheme}:// URL",
        hint=f"Use a folder path or one of {', '.join(f'{name}://' for name in REMOTE_SCHEMES)}.",
        url=text,
    )


__all__ = [
    "Chunks",
    "LocalStorage",
    "MemoryStorage",
    "ObjectInfo",
    "Staged",
    "Stamp",
    "Storage",
    "open_storage",
]
