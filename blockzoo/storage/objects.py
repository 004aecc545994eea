"""A zoo in an object store (S3 and compatible, Google Cloud Storage, Azure Blob), through obstore.

Creation is a conditional PUT, so the store decides which of two writers was first.
Multipart uploads know no condition, therefore an object is one PUT and at most
5 GB, far above the largest tensor (or row chunk) of known models.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore import exceptions
from obstore.store import MemoryStore, ObjectStore, from_url

from blockzoo.errors import (
    BlockzooError,
    NotFoundError,
    StorageError,
    StorageFullError,
    UnsupportedStoreError,
)
from blockzoo.storage.base import Chunks, ObjectInfo, Staged, Stamp, keys_right_below
from blockzoo.storage.memory import HeldBytes

_CONDITIONAL_HINT = "Use a store with conditional writes (`If-None-Match: *`), or a local folder."
_FULL_WORDS = (
    "507 ",
    "insufficient storage",
    "insufficientstorage",
    "quotaexceeded",
    "quota exceeded",
    "entitytoolarge",
)


PROBE_SECONDS = 10.0
"""How long a store may take to answer the first small request. Large uploads may take longer."""
_RETRIES: Any = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}


class ObjectStorage:
    """Objects below a prefix of a bucket."""

    is_remote = True

    def __init__(self, store: ObjectStore, url: str) -> None:
        self._store = store
        self.url = url

    @classmethod
    def from_url(cls, url: str) -> ObjectStorage:
        """Connect to `s3://bucket/prefix`, `gs://bucket/prefix` or `az://account/container/prefix`."""
        options = _options(url)
        with _translate(url):
            if "://" in url and not url.startswith("memory:"):
                _probe(url, options)
            return cls(from_url(url, retry_config=_RETRIES, **options), url.rstrip("/"))

    @classmethod
    def in_memory(cls) -> ObjectStorage:
        """Return an empty store inside this process, for tests of this module."""
        return cls(MemoryStore(), "memory://")

    def put_if_absent(self, key: str, data: Chunks, *, durable: bool = True) -> bool:  # noqa: ARG002
        """See `Storage`: a store answers only when the object is durable."""
        body = bytes(data[0]) if len(data) == 1 else b"".join(data)
        with _translate(key):
            try:
                obstore.put(self._store, key, body, mode="create", use_multipart=False)
            except exceptions.AlreadyExistsError:
                return False
            except exceptions.PreconditionError:
                # What some S3-compatible servers answer instead.
                return False
        return True

    def stage(self, data: Chunks) -> HeldBytes:
        """See `Storage`: the bytes travel when they are published."""
        return HeldBytes(self, data)

    def flush(self, staged: Sequence[Staged]) -> None:
        """See `Storage`: there is nothing to do before the bytes are published."""

    def replace(self, key: str, data: Chunks) -> None:
        """See `Storage`."""
        with _translate(key):
            obstore.put(self._store, key, b"".join(data), use_multipart=False)

    def get(self, key: str) -> memoryview:
        """See `Storage`."""
        with _translate(key):
            return memoryview(obstore.get(self._store, key).bytes())

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See `Storage`."""
        if length == 0:
            if self.size(key) is None:
                raise NotFoundError(f"{key} does not exist", key=key)
            return b""
        try:
            with _translate(key):
                # `get` cuts a range at the end of the object, where `get_range` fails.
                return bytes(
                    obstore.get(self._store, key, options={"range": (start, start + length)}).bytes()
                )
        except NotFoundError:
            raise
        except StorageError:
            # A range that begins behind the end is an error to the store and nothing to us.
            size = self.size(key)
            if size is not None and start >= size:
                return b""
            raise

    def get_part(self, key: str, start: int, length: int) -> memoryview:
        """See `Storage`."""
        return memoryview(self.get_range(key, start, length))

    def size(self, key: str) -> int | None:
        """See `Storage`."""
        try:
            with _translate(key):
                return int(obstore.head(self._store, key)["size"])
        except NotFoundError:
            return None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `Storage`."""
        with _translate(prefix):
            for batch in obstore.list(self._store, prefix or None):
                for entry in batch:
                    modified = entry["last_modified"].timestamp()
                    yield ObjectInfo(entry["path"], int(entry["size"]), modified)

    def keys(self, folder: str) -> set[str]:
        """See `Storage`."""
        return keys_right_below(folder, self.list(folder))

    def stamp(self, folder: str) -> Stamp | None:  # noqa: ARG002
        """See `Storage`: to ask is to wait."""
        return None

    def delete(self, key: str) -> bool:
        """See `Storage`."""
        try:
            with _translate(key):
                obstore.delete(self._store, key)
        except NotFoundError:
            return False
        return True

    def sync(self, keys: Iterable[str]) -> None:
        """See `Storage`: a store answers only when the object is durable."""

    def clean(self) -> int:
        """See `Storage`: an interrupted PUT leaves nothing."""
        return 0


def _options(url: str) -> dict[str, Any]:
    """Client options that obstore does not take from the environment by itself."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if urlsplit(url).scheme in ("s3", "s3a") and endpoint:
        # A plain-text endpoint is the operator's explicit choice, as with every S3 tool.
        return {"endpoint": endpoint, "client_options": {"allow_http": endpoint.startswith("http://")}}
    return {}


def _probe(url: str, options: dict[str, Any]) -> None:
    """Ask for something small: an endpoint that takes connections and says nothing is found out here.

    Raises:
        StorageError: it does not answer in time.
    """
    given = options.get("client_options", {})
    patience = {"timeout": f"{PROBE_SECONDS}s", "connect_timeout": f"{PROBE_SECONDS}s"}
    probing = {**options, "client_options": {**given, **patience}, "retry_config": {"max_retries": 0}}
    started = time.monotonic()
    try:
        obstore.head(from_url(url, **probing), "zoo.json")
    except FileNotFoundError:
        return
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError, PermissionError):
        raise
    except exceptions.BaseError as error:
        if time.monotonic() - started < 0.9 * PROBE_SECONDS:
            return  # something answers, or nothing ever will; the requests that follow say more
        raise StorageError(
            f"{urlsplit(url).scheme}://{urlsplit(url).netloc} does not answer within {PROBE_SECONDS:g} s",
            hint="Check the endpoint (AWS_ENDPOINT_URL) and the network.",
            key=url,
        ) from error


@contextmanager
def _translate(what: str) -> Iterator[None]:
    """Raise the zoo's error for any error of obstore: the one point where that happens."""
    try:
        yield
    except (BlockzooError, exceptions.AlreadyExistsError, exceptions.PreconditionError):
        raise
    except FileNotFoundError as error:
        raise NotFoundError(f"{what} does not exist", key=what) from error
    except (exceptions.NotSupportedError, NotImplementedError) as error:
        raise UnsupportedStoreError(
            f"the store cannot create {what} conditionally", hint=_CONDITIONAL_HINT, key=what
        ) from error
    except (PermissionError, exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        raise StorageError(
            f"the store refuses access to {what}", hint="Check the credentials in the environment.", key=what
        ) from error
    except (exceptions.BaseError, OSError, ValueError) as error:
        raise _other_error(what, error) from error


def _other_error(what: str, error: Exception) -> StorageError:
    text = str(error)
    if any(word in text.lower() for word in _FULL_WORDS):
        return StorageFullError(
            f"the store has no room for {what}",
            hint="Raise its quota, then run the command again.",
            key=what,
        )
    # obstore appends its whole debug representation after the first line.
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return StorageError(
        f"{what}: {first[:300]}", hint="Check the URL, the endpoint and the network.", key=what
    )
