"""The settings of a process as command line options: one source of names, defaults and meanings.

Fields of a process's own parts become options without the section's name (`engine.kv_cache_bytes` is
`--kv-cache-bytes`), those of other sections with it (`state.url` is `--state-url`). A test holds
them distinct.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, SecretStr

from blockserve.common.settings import ENV_PREFIX

OWN_PARTS = ("", "router", "controller", "engine")
"""Sections whose fields say enough without the section's name."""


@dataclass(frozen=True, slots=True)
class SettingInfo:
    """One setting, wherever it is shown.

    Attributes:
        section: "" at the top, else the name of the section.
        name: field name.
        annotation: its type.
        default: its default.
        meaning: what it does.
        unit: "seconds", "bytes", ... or "".
        reason: why the default is what it is, or "".
    """

    section: str
    name: str
    annotation: Any
    default: Any
    meaning: str
    unit: str = ""
    reason: str = ""

    @property
    def flag(self) -> str:
        """The option on the command line."""
        return f"--{self.parameter.replace('_', '-')}"

    @property
    def parameter(self) -> str:
        """What the option's value is called in Python."""
        return self.name if self.section in OWN_PARTS else f"{self.section}_{self.name}"

    @property
    def path(self) -> str:
        """The place in the YAML file."""
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def variable(self) -> str:
        """The environment variable."""
        return ENV_PREFIX + self.path.replace(".", "_").upper()

    @property
    def is_secret(self) -> bool:
        """Whether it must not stand on a command line, which every process list shows."""
        return SecretStr in (self.annotation, *get_args(self.annotation))

    def describe_default(self) -> str:
        """The default as people write it."""
        if self.default is None:
            return "unset"
        if isinstance(self.default, bool):
            return "yes" if self.default else "no"
        if self.default in ((), ""):
            return "none"
        return str(self.default)


def iterate_settings(model: type[BaseModel], section: str = "") -> Iterator[SettingInfo]:
    """All settings of a model, sections after the model's own fields."""
    sections: list[tuple[str, Any]] = []
    for name, item in model.model_fields.items():
        kind = item.annotation
        if isinstance(kind, type) and (issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind)):
            sections.append((name, kind))
            continue
        extra = item.json_schema_extra if isinstance(item.json_schema_extra, dict) else {}
        yield SettingInfo(
            section,
            name,
            kind,
            item.default,
            item.description or "",
            str(extra.get("unit", "")),
            str(extra.get("reason", "")),
        )
    for name, kind in sections:
        if issubclass(kind, BaseModel):
            yield from iterate_settings(kind, name)
        else:
            yield from _iterate_dataclass(kind, name)


def _iterate_dataclass(kind: Any, section: str) -> Iterator[SettingInfo]:
    """Fields of a settings dataclass, explained by the Attributes section of its docstring."""
    meanings = _attribute_docs(inspect.getdoc(kind) or "")
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        meaning = meanings.get(item.name, "")
        yield SettingInfo(
            section, item.name, hints[item.name], item.default, meaning[:1].upper() + meaning[1:]
        )


def _attribute_docs(doc: str) -> dict[str, str]:
    _, _, attributes = doc.partition("Attributes:\n")
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \w)", "\n" + attributes.rstrip()):
        name, colon, text = entry.strip().partition(":")
        if colon:
            found[name] = " ".join(text.split())
    return found


def option_type(annotation: Any) -> Any:
    """The type of the option: like the setting's, but None when it is not given.

    Returns:
        None when the setting cannot be an option.
    """
    plain = [item for item in get_args(annotation) if item is not type(None)]
    if isinstance(annotation, types.UnionType) and len(plain) == 1:
        annotation = plain[0]
    if annotation in (str, int, float, bool, Path) or get_origin(annotation) is Literal:
        return annotation | None
    if get_origin(annotation) is tuple:
        return list[get_args(annotation)[0]] | None  # type: ignore[misc]
    return None
