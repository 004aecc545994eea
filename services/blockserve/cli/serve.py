"""The verbs that run a process until it is told to stop: `serve`, `worker`, `router`, `controller`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from blockserve.cli.connection import set_signature
from blockserve.cli.output import note

if TYPE_CHECKING:
    from blockserve.cli.settings_options import SettingInfo
    from blockserve.common.server_settings import ServerSettings

PANELS = {
    "": "Server",
    "router": "Limits on requests",
    "engine": "Engine",
    "controller": "Registering over the network",
    "state": "The shared state",
    "failover": "Requests that lose a worker",
    "adaptive": "Approved equivalents",
    "kv": "Keys and values that follow a request",
}


@dataclass(frozen=True, slots=True)
class ProcessVerb:
    """A verb that runs a process.

    Attributes:
        name: of the verb.
        doc: its help.
        settings: gives the settings model; called only when the verb is, because importing takes a while.
        run: runs with settings and blocks.
    """

    name: str
    doc: str
    settings: Callable[[], type[ServerSettings]]
    run: Callable[[Any], None]


def command(verb: ProcessVerb, *, with_options: bool) -> Callable[..., None]:
    """The verb as a function for typer.

    Args:
        verb: which.
        with_options: give it the options that its settings make; a list of verbs needs none.
    """

    def process(**given: Any) -> None:
        model = verb.settings()
        verb.run(model.load(given.get("config"), **_overrides(model, given)))

    process.__name__ = verb.name
    process.__doc__ = verb.doc
    set_signature(process, inspect.Signature(_parameters(verb.settings()) if with_options else []))
    return process


def _serve_settings() -> type[ServerSettings]:
    from blockserve.embedded.config import ServeConfig

    return ServeConfig


def _run_serve(config: Any) -> None:
    from blockserve.embedded.run import run

    run(
        config,
        on_ready=lambda server: note(
            f"Serving {config.zoo} on {server.address}. Try: blockzoo status; Ctrl-C stops."
        ),
    )


def _worker_settings() -> type[ServerSettings]:
    from blockserve.worker.settings import WorkerSettings

    return WorkerSettings


def _run_worker(settings: Any) -> None:
    from blockserve.common.run import run
    from blockserve.worker.server import WorkerServer

    run(settings, WorkerServer(settings), lambda one: note(f"Worker of {settings.zoo} on {one.address}."))


def _router_settings() -> type[ServerSettings]:
    from blockserve.router.settings import RouterSettings

    return RouterSettings


def _run_router(settings: Any) -> None:
    from blockserve.common.run import run
    from blockserve.router.server import RouterServer

    run(settings, RouterServer(settings), lambda one: note(f"Router of {settings.zoo} on {one.address}."))


def _controller_settings() -> type[ServerSettings]:
    from blockserve.controller.settings import ControllerSettings

    return ControllerSettings


def _run_controller(settings: Any) -> None:
    from blockserve.common.run import run
    from blockserve.controller.server import ControllerServer

    server = ControllerServer(settings)
    run(settings, server, lambda one: note(f"Controller of {settings.zoo} on {one.address}."))


SERVE = ProcessVerb(
    "serve",
    """Serve the variants of a zoo.

    Variants registered while it runs are served at once; blocks are read by a variant's first request, or at
    the start with --preload. Ctrl-C lets running answers end, a second Ctrl-C does not. Every option can also
    be set in the environment (BLOCKZOO_LISTEN) or in a YAML file; docs/configuration.md explains each.

    \b
    Examples:
      blockzoo serve
      blockzoo serve --zoo ./zoo --preload all
      blockzoo serve --listen unix:/run/blockzoo.sock --kv-cache-bytes 4000000000
      blockzoo serve --config serve.yaml
    """,
    _serve_settings,
    _run_serve,
)
WORKER = ProcessVerb(
    "worker",
    """Run a worker of a cluster: it holds blocks and executes runs of chains.

    It finds the others through the shared state, loads what the controller places on it, and gives its
    requests back when it is told to stop. `blockzoo up` starts a whole cluster on one machine.

    \b
    Examples:
      blockzoo worker --zoo s3://models/zoo --state-url redis://10.0.0.5:6379 --block-bytes 60000000000
      blockzoo worker --name gpu-3 --device cuda --config cluster.yaml
    """,
    _worker_settings,
    _run_worker,
)
ROUTER = ProcessVerb(
    "router",
    """Run a router of a cluster: callers talk to it, and it finds workers for each request.

    Any number of routers may run beside each other. A request that loses a worker goes on elsewhere; a caller
    that loses its router resumes at another.

    \b
    Examples:
      blockzoo router --zoo s3://models/zoo --state-url redis://10.0.0.5:6379
      blockzoo router --listen 0.0.0.0:7450 --tls-cert cert.pem --tls-key key.pem --token-file token
    """,
    _router_settings,
    _run_router,
)
CONTROLLER = ProcessVerb(
    "controller",
    """Run a controller of a cluster: the zoo's front, and the placement of blocks on workers.

    Several may run; one of them leads, and another takes over when it is lost.

    \b
    Examples:
      blockzoo controller --zoo s3://models/zoo --state-url redis://10.0.0.5:6379
      blockzoo controller --replicas 2
    """,
    _controller_settings,
    _run_controller,
)
VERBS = (SERVE, WORKER, ROUTER, CONTROLLER)


def _settings(model: type[ServerSettings]) -> list[SettingInfo]:
    from blockserve.cli.settings_options import iterate_settings

    return list(iterate_settings(model))


def _overrides(model: type[ServerSettings], given: Mapping[str, Any]) -> dict[str, Any]:
    """What was said on the command line, in the shape of the settings."""
    found: dict[str, Any] = {}
    for setting in _settings(model):
        value = given.get(setting.option)
        if value is None or value == []:
            continue
        value = tuple(value) if isinstance(value, list) else value
        if setting.section:
            found.setdefault(setting.section, {})[setting.name] = value
        else:
            found[setting.name] = value
    return found


def _parameters(model: type[ServerSettings]) -> list[inspect.Parameter]:
    from blockserve.cli.settings_options import option_type

    config = typer.Option(
        "--config", metavar="FILE", envvar="BLOCKZOO_CONFIG", help="A YAML file with settings."
    )
    parameters = [_parameter("config", Annotated[Path | None, config])]
    for setting in _settings(model):
        kind = option_type(setting.annotation)
        if kind is not None and not setting.is_secret:
            parameters.append(_parameter(setting.option, Annotated[kind, _option(setting)]))
    return parameters


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _option(setting: SettingInfo) -> Any:
    unit = f" ({setting.unit})" if setting.unit else ""
    return typer.Option(
        setting.flag
        if setting.annotation not in (bool, bool | None)
        else f"{setting.flag}/--no-{setting.flag[2:]}",
        # The settings read the environment themselves; BLOCKZOO_ZOO is the one that other verbs know too.
        help=escape(f"{setting.meaning}{unit} Default: {setting.describe_default()}."),
        rich_help_panel=PANELS.get(setting.section, setting.section),
    )
