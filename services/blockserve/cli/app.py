"""The typer app: one verb per function, grouped as the help text shows them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from blockserve.cli.options.helping import WholeNames
from blockserve.cli.options.service import Service, command
from blockserve.cli.options.shared import JsonOption
from blockserve.cli.verbs import care as care_verbs
from blockserve.cli.verbs import change as change_verbs
from blockserve.cli.verbs import chat, generate, quantize, serve
from blockserve.cli.verbs import cluster as cluster_verbs
from blockserve.cli.verbs import equivalence as equivalence_verbs
from blockserve.cli.verbs import inspect as inspect_verbs
from blockserve.cli.verbs import placement as placement_verbs
from blockserve.cli.verbs import server as server_verbs
from blockserve.cli.verbs import trace as trace_verbs
from blockserve.cli.views.tables import print_json, say

ZOO_PANEL = "The zoo"
CARE_PANEL = "Care of the zoo"
SERVER_PANEL = "A server"
CLUSTER_PANEL = "A cluster"
CLIENT_PANEL = "Talking to a server"


def build_app(arguments: Sequence[str]) -> typer.Typer:
    """The app for one command line.

    Args:
        arguments: the command line; the options of a process are made from its settings only when its verb is
            called, because importing the settings takes longer than a help text.
    """
    app = typer.Typer(
        name="blockzoo",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback(help=reflow(_root.__doc__ or ""))(_root)
    for panel, verbs in (
        (
            ZOO_PANEL,
            (
                change_verbs.register,
                change_verbs.pull,
                inspect_verbs.ls,
                inspect_verbs.show,
                inspect_verbs.du,
            ),
        ),
        (
            ZOO_PANEL,
            (
                inspect_verbs.diff,
                change_verbs.export,
                quantize.quantize,
                change_verbs.rm,
                change_verbs.rollback,
            ),
        ),
        (CARE_PANEL, (care_verbs.gc, care_verbs.verify, care_verbs.backup, care_verbs.restore)),
        (SERVER_PANEL, (_service(serve.SERVE, arguments),)),
        (
            SERVER_PANEL,
            (server_verbs.status, trace_verbs.trace, server_verbs.load, server_verbs.unload, version),
        ),
        (CLUSTER_PANEL, (cluster_verbs.up, cluster_verbs.down, server_verbs.drain)),
        (CLUSTER_PANEL, placement_verbs.VERBS),
        (CLUSTER_PANEL, tuple(_service(one, arguments) for one in serve.CLUSTER)),
        (CLIENT_PANEL, (generate.generate, chat.chat)),
    ):
        for verb in verbs:
            help_text = reflow(verb.__doc__ or "")
            app.command(verb.__name__, help=help_text, rich_help_panel=panel, cls=WholeNames)(verb)
    equivalence = _group("equivalence", equivalence_verbs.__doc__, equivalence_verbs.VERBS)
    app.add_typer(equivalence, rich_help_panel=ZOO_PANEL)
    return app


def _group(name: str, doc: str | None, verbs: Sequence[Callable[..., None]]) -> typer.Typer:
    """Verbs behind a word of their own: `blockzoo NAME VERB`."""
    group = typer.Typer(name=name, help=reflow(doc or ""), no_args_is_help=True, rich_markup_mode="rich")
    for verb in verbs:
        group.command(verb.__name__.strip("_"), help=reflow(verb.__doc__ or ""))(verb)
    return group


def _service(service: Service, arguments: Sequence[str]) -> Callable[..., None]:
    """The verb of a process, with its options where the command line is about it."""
    # While a shell completes a command line, its words come in the environment.
    words = [*arguments, *(os.environ.get(name, "") for name in ("COMP_WORDS", "_TYPER_COMPLETE_ARGS"))]
    return command(service, with_options=any(service.name in text.split() for text in words))


def reflow(doc: str) -> str:
    """A docstring as help text: paragraphs on one line each, to fill any terminal; examples as they are."""
    paragraphs = inspect.cleandoc(doc).split("\n\n")
    return "\n\n".join(text if text.startswith("\b") else " ".join(text.split()) for text in paragraphs)


def version(as_json: JsonOption = False) -> None:
    """Print the version of blockzoo.

    \b
    Examples:
      blockzoo version
      blockzoo version --json
    """
    import platform

    import blockserve

    if as_json:
        print_json({"version": blockserve.__version__, "python": platform.python_version()})
    else:
        say(f"blockzoo {blockserve.__version__} (Python {platform.python_version()})")


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print tracebacks; allowed after any verb.")] = False,
) -> None:
    """Serve many fine-tuned variants of a language model from shared blocks.

    A zoo stores checkpoints and adapters as content-addressed blocks; equal blocks are stored once. A server
    computes requests of all variants in one batch wherever their blocks are shared.

    \b
    Start here:
      blockzoo register ./checkpoint --name base
      blockzoo register ./my-lora --name support-bot --base base
      blockzoo serve
      blockzoo chat support-bot
    """
    del show_version, debug  # acted on before
