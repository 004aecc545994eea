"""The one point where operating system errors become the zoo's."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from blockzoo.errors import NotFoundError, StorageError, StorageFullError, UnsupportedStoreError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK}


@contextmanager
def translate_os_errors(what: str) -> Iterator[None]:
    """Raise the zoo's error for an OSError about the object or folder `what`."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFoundError(f"{what} does not exist", key=what) from error
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFullError(
                f"no room left to write {what}",
                hint="Free disk space or raise the quota, then run the command again.",
                key=what,
            ) from error
        hint = "Check the permissions of the zoo." if isinstance(error, PermissionError) else ""
        raise StorageError(f"{what}: {error.strerror or error}", hint=hint, key=what) from error


@contextmanager
def translate_link_errors(url: str) -> Iterator[None]:
    """Raise UnsupportedStoreError when a hard link is refused by the file system."""
    try:
        yield
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        raise UnsupportedStoreError(
            f"{url} is on a file system without hard links, which concurrent writers need",
            hint="Put the zoo on a local Linux file system or an object store.",
            url=url,
        ) from error
