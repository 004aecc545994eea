"""Which zoo a verb is about: a local one (`--zoo`), or that of a server (`--server`)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from blockserve.cli.options.connection import (
    PANEL,
    CaFileOption,
    CertFileOption,
    Connection,
    KeyFileOption,
    TlsOption,
    TokenFileOption,
    set_signature,
)
from blockserve.cli.options.shared import DEFAULT_ZOO, ZooOption, open_zoo

if TYPE_CHECKING:
    from blockserve.client.zoo import RemoteZoo
    from blockzoo.zoo import Zoo

RemoteOption = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="ADDRESS",
        envvar="BLOCKZOO_SERVER",
        rich_help_panel=PANEL,
        help="Use the zoo of this server (host:port, or unix:/path/to/socket) instead of a local one. "
        "The environment variable counts only if no zoo is named.",
    ),
]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the zoo is.

    Attributes:
        zoo: folder or URL; what counts when `server` is None.
        server: address of the server whose zoo is meant.
    """

    zoo: ZooOption = DEFAULT_ZOO
    server: RemoteOption = None
    token_file: TokenFileOption = None
    tls: TlsOption = False
    ca_file: CaFileOption = None
    cert_file: CertFileOption = None
    key_file: KeyFileOption = None

    @contextmanager
    def open(self, *, create: bool = False, without_header: bool = False) -> Iterator[Zoo | RemoteZoo]:
        """Open the zoo for the verb's time.

        Args:
            create: begin one at hand where there is none.
            without_header: open one at hand also where its zoo.json is damaged.

        Raises:
            ZooNotFoundError: there is none at hand.
            UnavailableError: no server answers.
        """
        if self.server is None:
            yield open_zoo(self.zoo, create=create, without_header=without_header)
            return
        from blockserve.client.zoo import RemoteZoo

        connection = Connection(
            self.server, self.token_file, self.tls, self.ca_file, self.cert_file, self.key_file
        )
        with connection.explained(), RemoteZoo(self.server, credentials=connection.credentials()) as zoo:
            yield zoo


def at_a_place(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the options that say which zoo it is about; it takes them as `place`."""
    hints = inspect.get_annotations(Place, eval_str=True)
    own = inspect.signature(verb, eval_str=True)
    parameters = [parameter for name, parameter in own.parameters.items() if name != "place"]
    parameters += [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(Place)
    ]
    parameters.append(inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))

    @functools.wraps(verb)
    def with_place(*args: Any, context: typer.Context, **given: Any) -> None:
        options = {field.name: given.pop(field.name) for field in fields(Place)}
        verb(*args, place=_choose(context, options), **given)

    set_signature(with_place, own.replace(parameters=parameters))
    return with_place


def at_hand(verb: Callable[..., None]) -> Callable[..., None]:
    """Refuse a server for a verb that needs the zoo itself: it reads or writes all of it, or computes on it.

    The verb has the option `--zoo`. The options of a server are parsed and not shown, so that the error can
    say why they do not help. With BLOCKZOO_SERVER set and no zoo named, the default zoo is hardly meant.
    """
    hints = inspect.get_annotations(Place, eval_str=True)
    own = inspect.signature(verb, eval_str=True)
    refused = [field for field in fields(Place) if field.name != "zoo"]
    parameters = [
        *own.parameters.values(),
        *(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=_hidden(hints[field.name]),
            )
            for field in refused
        ),
        inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
    ]

    @functools.wraps(verb)
    def with_zoo(*args: Any, context: typer.Context, **given: Any) -> None:
        server = {field.name: given.pop(field.name) for field in refused}["server"]
        if server is not None:
            is_said = _source(context, "server") == "COMMANDLINE"
            if is_said or _source(context, "zoo") == "DEFAULT":
                name = context.command_path.partition(" ")[2]
                raise needs_zoo(name, f"{'--server' if is_said else 'BLOCKZOO_SERVER'} names {server}")
        verb(*args, **given)

    set_signature(with_zoo, own.replace(parameters=parameters))
    return with_zoo


def needs_zoo(verb: str, named: str) -> typer.BadParameter:
    """The error of a verb that no server can do.

    Args:
        verb: as the command line spells it.
        named: what names a server, and which.
    """
    return typer.BadParameter(
        f"{named}, but `{verb}` needs the zoo itself: run it where the zoo's folder or object store can be "
        "opened, and name that with --zoo."
    )


def _hidden(annotation: Any) -> Any:
    """The same option, not shown in help texts."""
    kind, option = get_args(annotation)
    option = copy(option)
    option.hidden = True
    return Annotated[kind, option]


def _choose(context: typer.Context, options: dict[str, Any]) -> Place:
    """What is said on the command line counts more than the environment; a zoo more than a server."""
    place = Place(**options)
    if place.server is None:
        return place
    zoo_said, server_said = (_source(context, name) for name in ("zoo", "server"))
    if server_said == "COMMANDLINE":
        if zoo_said == "COMMANDLINE":
            raise typer.BadParameter(
                "--zoo names a local zoo, --server the zoo of a server: give one of the two."
            )
        return place
    return place if zoo_said == "DEFAULT" else replace(place, server=None)


def _source(context: typer.Context, name: str) -> str:
    """Where an option's value comes from: COMMANDLINE, ENVIRONMENT or DEFAULT."""
    source = context.get_parameter_source(name)
    return "DEFAULT" if source is None else source.name
