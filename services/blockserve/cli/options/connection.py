"""Reaching a server: the options of every verb that talks to one, and friendlier failures."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from blockserve.client.blocking import Client
    from blockserve.common.rpc.channel import Credentials

DEFAULT_SERVER = "127.0.0.1:7450"
PANEL = "Connection"

ServerOption = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS",
        envvar="BLOCKZOO_SERVER",
        rich_help_panel=PANEL,
        help="host:port, or unix:/path/to/socket.",
    ),
]


TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        envvar="BLOCKZOO_TOKEN_FILE",
        rich_help_panel=PANEL,
        help="A file with the bearer token.",
    ),
]
CaFileOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        envvar="BLOCKZOO_CA_FILE",
        rich_help_panel=PANEL,
        help="Encrypt, trusting this authority (PEM).",
    ),
]
CertFileOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        envvar="BLOCKZOO_CERT_FILE",
        rich_help_panel=PANEL,
        help="The client's own certificate (PEM).",
    ),
]
KeyFileOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        envvar="BLOCKZOO_KEY_FILE",
        rich_help_panel=PANEL,
        help="The private key of --cert-file (PEM).",
    ),
]


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the server is, and how the client proves itself."""

    server: ServerOption = DEFAULT_SERVER
    token_file: TokenFileOption = None
    ca_file: CaFileOption = None
    cert_file: CertFileOption = None
    key_file: KeyFileOption = None

    @contextmanager
    def open(self, *, timeout: float | None = None) -> Iterator[Client]:
        """A client for the verb's time.

        Raises:
            UnavailableError: nobody answers there.
        """
        from blockserve.client.blocking import Client

        options: dict[str, Any] = {"credentials": self.credentials(), "timeout": timeout}
        with unreachable(self.server), Client(self.server, resume_attempts=2, **options) as client:
            yield client

    def credentials(self) -> Credentials:
        """How the client proves itself, and checks the server."""
        from blockserve.common.rpc.channel import Credentials

        return Credentials(
            token=self._token(), ca_file=self.ca_file, cert_file=self.cert_file, key_file=self.key_file
        )

    def _token(self) -> str | None:
        if self.token_file is None:
            return None
        return self.token_file.expanduser().read_text(encoding="utf-8").strip()


@contextmanager
def unreachable(server: str) -> Iterator[None]:
    """Say in one sentence that nobody answers: gRPC's own sentence lists every address it tried."""
    from blockserve.common.errors import UnavailableError

    try:
        yield
    except UnavailableError as error:
        raise UnavailableError(
            f"no server answers at {server}",
            hint="Start one with `blockzoo serve`, or give its address with --server.",
            code=error.code,
            server=server,
        ) from error


def connects(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the connection options; it takes them as the keyword argument `connection`."""
    hints = inspect.get_annotations(Connection, eval_str=True)
    own = inspect.signature(verb, eval_str=True)
    parameters = [parameter for name, parameter in own.parameters.items() if name != "connection"]
    parameters += [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(Connection)
    ]

    @functools.wraps(verb)
    def with_connection(*args: Any, **given: Any) -> None:
        connection = Connection(**{field.name: given.pop(field.name) for field in fields(Connection)})
        verb(*args, connection=connection, **given)

    set_signature(with_connection, own.replace(parameters=parameters))
    return with_connection


def set_signature(function: Callable[..., None], signature: inspect.Signature) -> None:
    """Make typer see these parameters."""
    function.__signature__ = signature  # type: ignore[attr-defined]
    function.__annotations__ = {name: item.annotation for name, item in signature.parameters.items()}
    # typer would resolve annotations in the namespace of the wrapped function.
    function.__dict__.pop("__wrapped__", None)
