"""Why no call gets through to a server, found out by connecting once more and looking.

gRPC says of a certificate that expired, a name that nobody knows and a process that is not there the
same: UNAVAILABLE, and every address that it tried.
"""

from __future__ import annotations

import socket
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from blockserve.common.errors import UnavailableError
from blockserve.common.rpc.address import endpoint

if TYPE_CHECKING:
    import ssl

    from blockserve.common.rpc.channel import Credentials

CONNECT_SECONDS = 3.0
HELLO_SECONDS = 1.0
"""A gRPC server speaks as soon as somebody connects."""

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
SETTINGS = 4
"""The type of the frame that an HTTP/2 server sends first."""

PLAIN_ANSWERS = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"})
"""What OpenSSL makes of an answer that is not encrypted; which of them depends on its version."""

START = "Start one with `blockzoo serve`, or give its address with --server."


def why_unreachable(server: str, credentials: Credentials) -> UnavailableError:
    """The error that says in one sentence what is in the way.

    Args:
        server: `host:port`, `unix:/path`, or another target of gRPC.
        credentials: as the call had them.
    """
    message, hint = _look(server, credentials)
    return UnavailableError(message, hint=hint, code="UNAVAILABLE", server=server)


def _look(server: str, credentials: Credentials) -> tuple[str, str]:
    """What is wrong, and what to do."""
    try:
        connection = _connect(server)
    except (socket.gaierror, UnicodeError):
        return f"the name in {server} is not known", "Check the spelling of the host's name."
    except TimeoutError:
        return f"{server} does not answer within {CONNECT_SECONDS:g} s", "Is a firewall in the way?"
    except PermissionError:
        return f"{server} belongs to another user", "Ask as the user who runs the server."
    except OSError:
        return f"no server answers at {server}", START
    with connection:
        if credentials.is_encrypted:
            return _look_encrypted(connection, server, credentials)
        if _greets(connection):
            return f"the connection to {server} broke", "Run the command again."
    if not isinstance(endpoint(server), str) and _encrypts(server):
        return f"the server at {server} encrypts", "Add --tls, or --ca-file with its authority."
    return f"what answers at {server} is no blockzoo server", START


def _connect(server: str) -> socket.socket:
    """Connect as gRPC would.

    Raises:
        OSError: nobody takes the connection, or the target is one that only gRPC can resolve.
        UnicodeError: the host's name is none.
    """
    where = endpoint(server)
    if where is None:
        raise OSError(f"{server} is resolved by gRPC")
    if not isinstance(where, str):
        return socket.create_connection(where, timeout=CONNECT_SECONDS)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(CONNECT_SECONDS)
    try:
        connection.connect(where)
    except BaseException:
        connection.close()
        raise
    return connection


def _greets(connection: socket.socket) -> bool:
    """Whether the other side begins as HTTP/2 servers do."""
    connection.settimeout(HELLO_SECONDS)
    with suppress(OSError):
        connection.sendall(PREFACE)
        head = connection.recv(9)
        return len(head) == 9 and head[3] == SETTINGS
    return False


def _host(server: str) -> str:
    """The name that the server's certificate has to hold."""
    where = endpoint(server)
    return where[0] if isinstance(where, tuple) and where[0] else "localhost"


def _encrypts(server: str) -> bool:
    import ssl

    from blockserve.common.rpc.certificates import ANY_STRENGTH

    context = ssl.create_default_context()
    context.set_ciphers(ANY_STRENGTH)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with suppress(OSError), _connect(server) as plain, context.wrap_socket(plain):
        return True
    return False


def _look_encrypted(connection: socket.socket, server: str, credentials: Credentials) -> tuple[str, str]:
    import ssl

    from blockserve.common.rpc.certificates import ANY_STRENGTH

    context = ssl.create_default_context(cafile=credentials.ca_file)
    context.set_ciphers(ANY_STRENGTH)  # as gRPC, which encrypts the calls
    if credentials.cert_file is not None and credentials.key_file is not None:
        context.load_cert_chain(credentials.cert_file, credentials.key_file, password="")
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection, server_hostname=_host(server)) as encrypted:
            greets = _greets(encrypted)
    except ssl.SSLCertVerificationError as error:
        return _describe_refusal(error, server, credentials)
    except OSError as error:
        return _describe_failed_handshake(error, server, credentials)
    if greets:
        return f"the connection to {server} broke", "Run the command again."
    return _describe_rejection(server, credentials)


def _describe_refusal(
    error: ssl.SSLCertVerificationError, server: str, credentials: Credentials
) -> tuple[str, str]:
    """What this side holds against the server's certificate."""
    from blockserve.common.rpc.certificates import expired_on, facts

    own = credentials.ca_file
    if own is not None and (day := expired_on(own)) is not None:
        return f"the authority in {own} expired on {day}", "Give --ca-file an authority that is valid."
    certificate = _certificate_of(server)
    if certificate is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "server.pem"
            path.write_text(certificate)
            day, names = expired_on(path), [name for _, name in facts(path).get("subjectAltName", ())]
        if day is not None:
            return f"the certificate of {server} expired on {day}", "The server needs a new one."
        if "mismatch" in error.verify_message or "not valid for" in error.verify_message:
            valid = f"it is valid for {', '.join(names)}" if names else "it names no host"
            return (
                f"the certificate of {server} is another host's: {valid}",
                "Use one of these names as the address.",
            )
    trusted = f"the authority in {own} did not sign it" if own else "no authority of this system signed it"
    return (
        f"the certificate of {server} is not trusted: {trusted}",
        "Give the authority that signed it with --ca-file.",
    )


def _describe_failed_handshake(error: OSError, server: str, credentials: Credentials) -> tuple[str, str]:
    """Why the two sides did not agree on encryption, in OpenSSL's names of reasons."""
    reason = getattr(error, "reason", None) or ""
    if reason in PLAIN_ANSWERS:
        return f"the server at {server} does not encrypt", "Leave out --tls, --ca-file and --cert-file."
    if "PROTOCOL_VERSION" in reason or reason == "UNSUPPORTED_PROTOCOL":
        return f"the server at {server} speaks no version of TLS from 1.2 on", "A blockzoo server does."
    is_about_certificate = "CERTIFICATE" in reason or "UNKNOWN_CA" in reason or "ACCESS_DENIED" in reason
    # TLS 1.2 has no alert of its own for a certificate that is missing.
    if is_about_certificate or ("HANDSHAKE_FAILURE" in reason and credentials.cert_file is None):
        return _describe_rejection(server, credentials)
    if isinstance(error, TimeoutError):
        words = "it is silent"
    else:
        words = reason.replace("_", " ").lower() or "it ended the connection"
    return f"the server at {server} did not agree on encryption: {words}", "Its log may say more."


def _describe_rejection(server: str, credentials: Credentials) -> tuple[str, str]:
    """What the server holds against this side; it hangs up without a word."""
    from blockserve.common.rpc.certificates import expired_on

    if credentials.cert_file is None:
        return (
            f"the server at {server} hung up: it probably asks for a client certificate",
            "Give yours with --cert-file and --key-file.",
        )
    if (day := expired_on(credentials.cert_file)) is not None:
        return f"the client certificate {credentials.cert_file} expired on {day}", "Get a new one."
    return (
        f"the server at {server} does not accept the client certificate {credentials.cert_file}",
        "It must be signed by the authority in the server's tls_client_ca.",
    )


def _certificate_of(server: str) -> str | None:
    """The server's certificate in PEM form, whatever is wrong with it."""
    import ssl

    from blockserve.common.rpc.certificates import ANY_STRENGTH

    context = ssl.create_default_context()
    context.set_ciphers(ANY_STRENGTH)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with suppress(OSError), _connect(server) as plain:
        with context.wrap_socket(plain, server_hostname=_host(server)) as encrypted:
            der = encrypted.getpeercert(binary_form=True)
        return None if der is None else ssl.DER_cert_to_PEM_cert(der)
    return None
