"""Certificates and keys in PEM files: whether they fit, and until when they are valid.

gRPC notices what is wrong with them only while it connects, and says so in its own log at best.
"""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from blockserve.common.errors import ConfigurationError
from blockserve.common.rpc.files import read_file


def check_pair(cert: Path, key: Path) -> None:
    """Hold a certificate and its private key together.

    Raises:
        ConfigurationError: a file cannot be read, is no PEM file, or the key is another certificate's.
    """
    for path in (cert, key):
        read_file(path)
    try:
        # An empty password, or OpenSSL would ask for one on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigurationError(
                f"the private key {key} does not fit the certificate {cert}",
                hint="Name the key that the certificate was made with.",
                cert=cert,
                key=key,
            ) from error
        raise ConfigurationError(
            f"{cert} and {key} are not a certificate and a private key without passphrase, in PEM form",
            cert=cert,
            key=key,
        ) from error


def check_authorities(path: Path) -> None:
    """Read a file of certificate authorities.

    Raises:
        ConfigurationError: it cannot be read, or holds no certificate in PEM form.
    """
    read_file(path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise ConfigurationError(f"{path} holds no certificate in PEM form", path=path) from error


def facts(path: Path) -> dict[str, Any]:
    """The first certificate of a PEM file, as `ssl.SSLSocket.getpeercert` spells it; {} if unknown."""
    decode = getattr(getattr(ssl, "_ssl", None), "_test_decode_cert", None)
    try:
        return {} if decode is None else dict(decode(str(path)))
    except (ssl.SSLError, OSError):
        return {}


def expired_on(path: Path) -> str | None:
    """The day on which the first certificate of a file expired; None if it is valid still, or unknown."""
    until = facts(path).get("notAfter")
    if until is None:
        return None
    moment = datetime.fromtimestamp(ssl.cert_time_to_seconds(until), UTC)
    return moment.date().isoformat() if moment < datetime.now(UTC) else None
