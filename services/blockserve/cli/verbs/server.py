"""Verbs that operate a running server: status, load, unload."""

from __future__ import annotations

import dataclasses
import sys
import threading
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockserve.cli.options.connection import Connection, connects
from blockserve.cli.options.shared import JsonOption, RefArgument
from blockserve.cli.views.server import draw_status, headline
from blockserve.cli.views.tables import (
    format_seconds,
    print_json,
    print_lines,
    say,
    terminal_height,
    terminal_width,
)

if TYPE_CHECKING:
    from blockserve.client.blocking import Client
    from blockserve.common.api.status import ServerStatus

CALL_TIMEOUT_S = 10.0
"""A status answer takes milliseconds; a server that needs longer is in trouble, and that is worth knowing."""


@connects
def status(
    watch: Annotated[
        float | None,
        typer.Option("--watch", "-w", metavar="SECONDS", min=0.1, help="Refresh every SECONDS until Ctrl-C."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", "-a", help="List idle variants and workers one by one, however many.")
    ] = False,
    as_json: JsonOption = False,
    *,
    connection: Connection,
) -> None:
    """Show what a server or a cluster holds and does: chains, workers, segments, queues, KV pages.

    A segment is a run of base blocks that the same chains pass through. MIXED counts forward calls that
    served more than one variant at once. Chains are listed busiest first; of many, the idle ones are one
    line. A cluster's router shows its workers, how many of them hold each segment, and the paths of its
    running requests instead. With --json and --watch each line is one JSON value.

    \b
    Examples:
      blockzoo status
      blockzoo status --watch 1
      blockzoo status --json | jq '.segments[].mixed_calls'
    """
    with connection.open(timeout=CALL_TIMEOUT_S) as client:
        if watch is None:
            _print_once(client.status(), as_json, everything)
        elif as_json or not sys.stdout.isatty():
            _print_lines(client, watch, as_json)
        else:
            _watch(client, watch)


@connects
def load(
    model: RefArgument,
    pinned: Annotated[
        bool | None,
        typer.Option("--pin/--unpin", help="Keep the variant in memory when others need room, or end that."),
    ] = None,
    as_json: JsonOption = False,
    *,
    connection: Connection,
) -> None:
    """Load a variant's blocks into a server's memory before its first request.

    Blocks that other loaded variants use are in memory already and cost nothing. If the server's block_bytes
    is too small, the least recently used variants are unloaded; pinned variants stay.

    \b
    Examples:
      blockzoo load support-bot
      blockzoo load support-bot --pin
    """
    with connection.open() as client:
        seconds = client.load(model, pinned=pinned)
    if as_json:
        print_json({"model": model, "seconds": seconds})
    else:
        say(f"{model} is loaded ({format_seconds(seconds)}).")


@connects
def unload(model: RefArgument, as_json: JsonOption = False, *, connection: Connection) -> None:
    """Unload a variant's blocks from a server once its running requests have ended.

    Blocks that other loaded variants use stay. The next request to the variant loads it again. Unloading also
    ends a pin, and unloads the variants that have exactly the same blocks.

    \b
    Examples:
      blockzoo unload support-bot
    """
    with connection.open() as client:
        was_pinned, others = _held_with(client, model)
        client.unload(model)
    if as_json:
        print_json({"model": model, "was_pinned": was_pinned, "also": others})
        return
    say(f"{model} is unloaded{' and no longer pinned' if was_pinned else ''}.")
    if others:
        say(f"So {'is' if len(others) == 1 else 'are'} {', '.join(others)}: the same blocks.")


def _held_with(client: Client, model: str) -> tuple[bool, list[str]]:
    """Whether a variant is pinned, and which others have exactly its chain."""
    report = client.status()
    if report.cluster is not None:
        pinned = (wish.variant for wish in client.wishes() if wish.pinned)
        return model.partition("@")[0] in pinned, []
    info = client.model(model)
    ref = f"{info.name}@{info.version}"
    chain = next((chain for chain in report.chains if ref in chain.models), None)
    if chain is None:
        return False, []
    return chain.pinned, [name for name in chain.models if name != ref]


@connects
def drain(
    worker: Annotated[
        str, typer.Argument(metavar="WORKER", help="Name of the worker; `blockzoo status` lists the workers.")
    ],
    seconds: Annotated[
        float, typer.Option("--seconds", min=0, help="How long running requests may continue on the worker.")
    ] = 20.0,
    resume: Annotated[bool, typer.Option("--resume", help="Let the worker take requests again.")] = False,
    as_json: JsonOption = False,
    *,
    connection: Connection,
) -> None:
    """Move all requests off a worker, for example before maintenance; callers notice nothing.

    The worker takes no new requests, and running ones may finish within --seconds. The others continue on
    other workers; their keys and values move along when that is faster than computing them again.

    \b
    Examples:
      blockzoo drain worker-2
      blockzoo drain worker-2 --seconds 0
      blockzoo drain worker-2 --resume
    """
    with connection.open() as client:
        given_back = client.drain_worker(worker, seconds, resume=resume)
    if as_json:
        print_json({"worker": worker, "given_back": given_back})
    elif resume:
        say(f"{worker} takes requests again.")
    else:
        say(f"{worker} is empty; {given_back} requests continue on other workers.")


def status_to_json(report: ServerStatus) -> dict[str, Any]:
    """The status as documented in docs/compatibility.md."""
    return dataclasses.asdict(report)


def _print_once(report: ServerStatus, as_json: bool, everything: bool) -> None:
    if as_json:
        print_json(status_to_json(report))
    else:
        print_lines(draw_status(report, terminal_width(), everything=everything))


def _print_lines(client: Client, seconds: float, as_json: bool) -> None:
    import json

    while True:
        report = client.status()
        say(json.dumps(status_to_json(report)) if as_json else headline(report))
        sys.stdout.flush()
        threading.Event().wait(seconds)


def _watch(client: Client, seconds: float) -> None:
    from rich.live import Live
    from rich.text import Text

    from blockserve.cli.views.console import SafeConsole

    def draw() -> Text:
        lines = draw_status(client.status(), terminal_width(), terminal_height())
        return Text("\n".join(lines[: terminal_height()]), no_wrap=True)

    console = SafeConsole(file=sys.stdout, highlight=False)
    with Live(draw(), console=console, screen=True, auto_refresh=False) as live:
        while True:
            threading.Event().wait(seconds)
            live.update(draw(), refresh=True)
