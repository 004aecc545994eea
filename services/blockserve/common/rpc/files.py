"""The files that settings and credentials name: certificates, keys, tokens."""

from __future__ import annotations

from pathlib import Path

from blockserve.common.errors import ConfigurationError


def read_file(path: Path) -> bytes:
    """The content of a certificate, key or token file.

    Raises:
        ConfigurationError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}", path=path) from error
