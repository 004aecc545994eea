"""The verb `serve`: zoo, engine and router in one process."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockserve.cli.connection import set_signature
from blockserve.cli.output import note

if TYPE_CHECKING:
    from blockserve.cli.settings_options import SettingInfo
    from blockserve.embedded.server import EmbeddedServer

PANELS = {"": "Server", "router": "Limits on requests", "engine": "Engine"}


def command(*, with_options: bool) -> Callable[..., None]:
    """The verb as a function for typer.

    Args:
        with_options: give it the options that its settings make; a list of verbs needs none.
    """

    def serve(**given: Any) -> None:
        _serve(given)

    serve.__doc__ = _serve.__doc__
    parameters = _parameters() if with_options else []
    set_signature(serve, inspect.Signature(parameters))
    return serve


def _serve(given: Mapping[str, Any]) -> None:
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
    """
    from blockserve.embedded.config import ServeConfig
    from blockserve.embedded.run import run

    run(ServeConfig.load(given.get("config"), **_overrides(given)), on_ready=_announce)


def _announce(server: EmbeddedServer) -> None:
    note(f"Serving {server.config.zoo} on {server.address}. Try: blockzoo status; Ctrl-C stops.")


def _settings() -> list[SettingInfo]:
    from blockserve.cli.settings_options import iterate_settings
    from blockserve.embedded.config import ServeConfig

    return list(iterate_settings(ServeConfig))


def _overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was said on the command line, in the shape of the settings."""
    found: dict[str, Any] = {}
    for setting in _settings():
        value = given.get(setting.name)
        if value is None or value == []:
            continue
        value = tuple(value) if isinstance(value, list) else value
        if setting.section:
            found.setdefault(setting.section, {})[setting.name] = value
        else:
            found[setting.name] = value
    return found


def _parameters() -> list[inspect.Parameter]:
    from blockserve.cli.settings_options import option_type

    config = typer.Option(
        "--config", metavar="FILE", envvar="BLOCKZOO_CONFIG", help="A YAML file with settings."
    )
    parameters = [_parameter("config", Annotated[Path | None, config])]
    for setting in _settings():
        kind = option_type(setting.annotation)
        if kind is not None and not setting.is_secret:
            parameters.append(_parameter(setting.name, Annotated[kind, _option(setting)]))
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
        help=f"{setting.meaning}{unit} Default: {setting.describe_default()}.",
        rich_help_panel=PANELS.get(setting.section, setting.section),
    )
