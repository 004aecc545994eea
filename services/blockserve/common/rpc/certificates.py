"""Certificates and keys in PEM files: whether they fit, and until when they are valid.

gRPC notices what is wrong with them only while it connects, and says so in its own log at best.
"""

from __future__ import annotations

import logging
import ssl
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from blockserve.common.errors import ConfigurationError
from blockserve.common.rpc.files import read_file

log = logging.getLogger(__name__)

TOO_WEAK = frozenset({"EE_KEY_TOO_SMALL", "CA_KEY_TOO_SMALL", "CA_MD_TOO_WEAK"})
"""OpenSSL's reasons for certificates that it reads but finds weak; gRPC, which encrypts, takes them."""
OTHER_KEY = frozenset({"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"})
"""OpenSSL's reasons for a key of another certificate; the last one if the key is of another type too."""
ANY_STRENGTH = "DEFAULT@SECLEVEL=0"


def check_pair(cert: Path, key: Path) -> None:
    """Hold a certificate and its private key together.

    Raises:
        ConfigurationError: a file cannot be read, is no PEM file, or the key is another certificate's. A weak
            certificate is a warning in the log: gRPC uses it.
    """
    for path in (cert, key):
        read_file(path)
    try:
        _load_pair(cert, key)
    except ssl.SSLError as error:
        if error.reason not in TOO_WEAK:
            raise _unfit_pair(cert, key, error) from error
        try:
            _load_pair(cert, key, any_strength=True)
        except ssl.SSLError as deeper:
            raise _unfit_pair(cert, key, deeper) from deeper
        _warn_of_weakness(cert, error.reason)


def _load_pair(cert: Path, key: Path, *, any_strength: bool = False) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if any_strength:
        context.set_ciphers(ANY_STRENGTH)
    # An empty password, or OpenSSL would ask for one on the terminal.
    context.load_cert_chain(cert, key, password="")


def _unfit_pair(cert: Path, key: Path, error: ssl.SSLError) -> ConfigurationError:
    if error.reason in OTHER_KEY:
        return ConfigurationError(
            f"the private key {key} does not fit the certificate {cert}",
            hint="Name the key that the certificate was made with.",
            cert=cert,
            key=key,
        )
    reason = f" ({_words(error.reason)})" if error.reason else ""
    return ConfigurationError(
        f"{cert} and {key} are not a certificate and a private key without passphrase, in PEM form{reason}",
        cert=cert,
        key=key,
    )


@cache
def _warn_of_weakness(cert: Path, reason: str) -> None:
    """Say it once; connections are opened often."""
    log.warning("the certificate %s is weak (%s); it is used all the same", cert, _words(reason))


def _words(reason: str) -> str:
    return reason.replace("_", " ").lower()


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
