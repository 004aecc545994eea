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
    from blockzoo.errors import BlockzooError

DEFAULT_SERVER = "127.0.0.1:7450"
PANEL = "Connection"
NO_METHOD = "Method not found!"
"""What gRPC says of a service that a process does not offer."""

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
TlsOption = Annotated[
    bool,
    typer.Option(
        "--tls",
        envvar="BLOCKZOO_TLS",
        rich_help_panel=PANEL,
        help="Encrypt, trusting the authorities of this system.",
    ),
]
CaFileOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        envvar="BLOCKZOO_CA_FILE",
        rich_help_panel=PANEL,
        help="Encrypt, trusting this authority (PEM) instead.",
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
    tls: TlsOption = False
    ca_file: CaFileOption = None
    cert_file: CertFileOption = None
    key_file: KeyFileOption = None

    @contextmanager
    def open(
        self,
        *,
        timeout: float | None = None,
        resume_attempts: int = 2,
        on_break: Callable[[BlockzooError, int], None] | None = None,
    ) -> Iterator[Client]:
        """A client for the verb's time; the arguments are those of `Client`.

        Raises:
            UnavailableError: nobody answers there.
        """
        from blockserve.client.blocking import Client

        options: dict[str, Any] = {"credentials": self.credentials(), "timeout": timeout}
        options |= {"resume_attempts": resume_attempts, "on_break": on_break}
        with self.explained(), Client(self.server, **options) as client:
            yield client

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Say in one sentence why calls do not get through, or are refused."""
        from blockserve.common.errors import RemoteError, UnauthenticatedError

        try:
            yield
        except (RemoteError, UnauthenticatedError) as error:
            raise self.explain(error) from error

    def explain(self, error: BlockzooError) -> BlockzooError:
        """The same error in the words of the command, where gRPC's own words or a program's hint came."""
        from blockserve.common.errors import RemoteError, UnauthenticatedError, UnavailableError

        if isinstance(error, UnavailableError):
            from blockserve.cli.options.reach import why_unreachable

            return why_unreachable(self.server, self.credentials())
        if isinstance(error, UnauthenticatedError):
            given = self.token_file
            return UnauthenticatedError(
                f"{self.server} "
                + ("asks for a token" if given is None else f"refuses the token in {given}"),
                hint="Give the file that holds it with --token-file, or in BLOCKZOO_TOKEN_FILE.",
            )
        if isinstance(error, RemoteError) and str(error) == NO_METHOD:
            return RemoteError(
                f"the process at {self.server} does not take this command",
                hint="It is of an older version, or no `blockzoo serve` and no router.",
                code=error.code,
                server=self.server,
            )
        return error

    def credentials(self) -> Credentials:
        """How the client proves itself, and checks the server.

        Raises:
            ConfigurationError: one of two files is missing, or a file cannot be read.
        """
        from blockserve.common.rpc.channel import Credentials

        return Credentials(
            token=self._token(),
            tls=self.tls,
            ca_file=self.ca_file,
            cert_file=self.cert_file,
            key_file=self.key_file,
        )

    def _token(self) -> str | None:
        if self.token_file is None:
            return None
        from blockserve.common.rpc.files import read_file

        return read_file(self.token_file.expanduser()).decode().strip()


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
