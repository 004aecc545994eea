"""Verbs for an operator's wishes about placement in a cluster: pin, place, replicas, evict."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from blockserve.cli.options.connection import Connection, connects
from blockserve.cli.options.shared import JsonOption, NameArgument
from blockserve.cli.verbs.server import CALL_TIMEOUT_S
from blockserve.cli.views.placement import describe_wish, print_wishes
from blockserve.cli.views.tables import print_json, say

if TYPE_CHECKING:
    from blockserve.common.api.placement import WishStatus

NO_CLUSTER = "UNIMPLEMENTED"
"""The status with which a process that serves alone answers."""


@connects
def pin(
    name: NameArgument,
    off: Annotated[bool, typer.Option("--off", help="Remove the pin.")] = False,
    as_json: JsonOption = False,
    *,
    connection: Connection,
) -> None:
    """Keep a variant in memory even if nobody calls it.

    In a cluster the variant stays on the workers that hold it, and unpinned variants make room if necessary.
    The pin is stored in the zoo, survives restarts, and follows the name to its newest version. On a server
    that is one process (`blockzoo serve`), this is `blockzoo load --pin` and lasts as long as the process.

    \b
    Examples:
      blockzoo pin support-bot
      blockzoo pin support-bot --off
    """
    from blockserve.common.errors import RemoteError

    with connection.open() as client:
        try:
            status = client.wish(name, pinned=not off)
        except RemoteError as error:
            if error.code != NO_CLUSTER:
                raise
            client.load(name, pinned=not off)
            _tell_alone(name, "is no longer pinned" if off else "is pinned", as_json)
            return
    _tell(status, as_json)


@connects
def place(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The variant's name.")] = None,
    workers: Annotated[
        list[str] | None,
        typer.Argument(metavar="WORKER", help="Workers to hold the variant; each holds all of it."),
    ] = None,
    anywhere: Annotated[
        bool, typer.Option("--anywhere", help="Withdraw the choice: the controller chooses workers again.")
    ] = False,
    as_json: JsonOption = False,
    *,
    connection: Connection,
) -> None:
    """Choose the workers that hold a variant; without arguments, list all placement wishes.

    The variant moves to these workers and stays there even if nobody calls it. While none of them is alive,
    another worker holds it. `blockzoo status` lists the workers.

    \b
    Examples:
      blockzoo place support-bot worker-1
      blockzoo place support-bot worker-1 worker-2
      blockzoo place support-bot --anywhere
      blockzoo place
    """
    if anywhere if name is None else anywhere == bool(workers):
        raise typer.BadParameter("give a variant and the workers to hold it, or --anywhere.")
    with connection.open(timeout=CALL_TIMEOUT_S) as client, _needs_cluster():
        if name is None:
            wishes = client.wishes()
            if as_json:
                print_json({"wishes": [dataclasses.asdict(status) for status in wishes]})
            else:
                print_wishes(wishes)
            return
        status = client.wish(name, workers=workers or [])
    _tell(status, as_json)


@connects
def replicas(
    name: NameArgument,
    count: Annotated[
        int,
        typer.Argument(metavar="N", min=0, help="Number of workers; 0 lets the number follow the traffic."),
    ],
    as_json: JsonOption = False,
    *,
    connection: Connection,
) -> None:
    """Set how many workers hold a variant, regardless of its traffic.

    \b
    Examples:
      blockzoo replicas support-bot 2
      blockzoo replicas support-bot 0
    """
    with connection.open(timeout=CALL_TIMEOUT_S) as client, _needs_cluster():
        status = client.wish(name, replicas=count)
    _tell(status, as_json)


@connects
def evict(
    name: NameArgument,
    worker: Annotated[
        str,
        typer.Option(
            "--worker",
            metavar="WORKER",
            help="Unload from this worker only, and keep the variant off it until `place` names the worker.",
        ),
    ] = "",
    as_json: JsonOption = False,
    *,
    connection: Connection,
) -> None:
    """Remove all placement wishes for a variant and unload it from every worker.

    Running requests finish first, and blocks that other variants use stay. The next request to the variant
    loads it again. On a server that is one process (`blockzoo serve`), this is `blockzoo unload`.

    \b
    Examples:
      blockzoo evict support-bot
      blockzoo evict support-bot --worker worker-2
    """
    from blockserve.common.errors import RemoteError

    with connection.open() as client, _needs_cluster():
        try:
            status = client.evict(name, worker)
        except RemoteError as error:
            if error.code != NO_CLUSTER or worker:
                raise
            client.unload(name)
            _tell_alone(name, "is unloaded", as_json)
            return
    _tell(status, as_json)


VERBS = (pin, place, replicas, evict)


@contextmanager
def _needs_cluster() -> Iterator[None]:
    """Say in a sentence that a process that serves alone has no workers to choose among."""
    from blockserve.common.errors import RemoteError

    try:
        yield
    except RemoteError as error:
        if error.code != NO_CLUSTER:
            raise
        raise RemoteError(
            "this server is one process, which has no workers to choose among",
            hint="`blockzoo pin` and `blockzoo evict` choose the variants that it keeps loaded.",
            code=error.code,
        ) from error


def _tell(status: WishStatus, as_json: bool) -> None:
    if as_json:
        print_json(dataclasses.asdict(status))
    else:
        say(f"{status.variant}: {describe_wish(status)}.")


def _tell_alone(name: str, what: str, as_json: bool) -> None:
    if as_json:
        print_json({"model": name})
    else:
        say(f"{name} {what}.")
