"""Options that several verbs share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from blockzoo.zoo import Zoo

DEFAULT_ZOO = "~/.blockzoo"
ZOO_VARIABLE = "BLOCKZOO_ZOO"

ZooOption = Annotated[
    str,
    typer.Option(
        "--zoo",
        metavar="PATH|URL",
        envvar=ZOO_VARIABLE,
        help="The zoo: a folder, or a URL such as s3://bucket/zoo.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
RefArgument = Annotated[
    str, typer.Argument(metavar="VARIANT", help="NAME for the current version, NAME@N for version N.")
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The variant's name.")]


def open_zoo(place: str, *, create: bool = False, without_header: bool = False) -> Zoo:
    """Open the zoo that `--zoo` names; `without_header` also where zoo.json is damaged.

    Raises:
        ZooNotFoundError: there is none and `create` is false.
    """
    from blockzoo.zoo import Zoo

    return Zoo.open(place, create=create, without_header=without_header, facts_folder=cache_folder())


def cache_folder() -> Path:
    """Where the command keeps what it can find out again; it may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockzoo"
