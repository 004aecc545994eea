"""A verb that runs one process: its options are made from the settings of that process."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from blockserve.cli.options.connection import set_signature

if TYPE_CHECKING:
    from blockserve.cli.options.settings import SettingInfo
    from blockserve.common.rpc.settings import ServerSettings

PANELS = {
    "router": "Limits on requests",
    "controller": "The zoo over the network",
    "engine": "Engine",
    "state": "Shared state",
    "failover": "Requests that lose a worker",
    "adaptive": "Approved equivalents",
    "kv": "Keys and values that follow a request",
}
OWN_PANEL = "Process"


@dataclass(frozen=True, slots=True)
class Service:
    """A kind of process.

    Attributes:
        name: of the verb.
        help: the verb's docstring.
        settings: imports and gives the settings class; called when the options or the process are wanted.
        run: runs the process until it is told to stop.
    """

    name: str
    help: str
    settings: Callable[[], type[ServerSettings]]
    run: Callable[[Any], None]


def command(service: Service, *, with_options: bool) -> Callable[..., None]:
    """The verb as a function for typer.

    Args:
        service: what it runs.
        with_options: give it the options that its settings make; a list of verbs needs none.
    """

    def verb(**given: Any) -> None:
        settings = service.settings()
        service.run(settings.load(given.get("config"), **_overrides(settings, given)))

    verb.__name__, verb.__doc__ = service.name, service.help
    set_signature(verb, inspect.Signature(_parameters(service.settings()) if with_options else []))
    return verb


def _overrides(settings: type[ServerSettings], given: Mapping[str, Any]) -> dict[str, Any]:
    """What was said on the command line, in the shape of the settings."""
    from blockserve.cli.options.settings import iterate_settings

    found: dict[str, Any] = {}
    for setting in iterate_settings(settings):
        value = given.get(setting.parameter)
        if value is None or value == []:
            continue
        value = tuple(value) if isinstance(value, list) else value
        if setting.section:
            found.setdefault(setting.section, {})[setting.name] = value
        else:
            found[setting.name] = value
    return found


def _parameters(settings: type[ServerSettings]) -> list[inspect.Parameter]:
    from blockserve.cli.options.settings import iterate_settings, option_type

    config = typer.Option(
        "--config", metavar="FILE", envvar="BLOCKZOO_CONFIG", help="A YAML file with settings."
    )
    parameters = [_parameter("config", Annotated[Path | None, config])]
    for setting in iterate_settings(settings):
        kind = option_type(setting.annotation)
        if kind is not None and not setting.is_secret:
            parameters.append(_parameter(setting.parameter, Annotated[kind, _option(setting)]))
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
        rich_help_panel=PANELS.get(setting.section, OWN_PANEL),
    )
