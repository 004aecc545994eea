"""The base of every service's settings: frozen, explained field by field, read from one place.

A value comes from the first of: an argument, the environment (`BLOCKZOO_LISTEN`, and for a nested
section `BLOCKZOO_ROUTER_MAX_REQUESTS`), the YAML file, the default beside the field.
"""

from __future__ import annotations

import os
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)
from yaml import YAMLError

from blockserve.common.errors import ConfigurationError

ENV_PREFIX = "BLOCKZOO_"
CONFIG_FILE_VARIABLE = "BLOCKZOO_CONFIG"
"""Names the YAML file when no argument does."""

_yaml_file: ContextVar[Path | None] = ContextVar("yaml_file", default=None)


def setting(default: Any, meaning: str, *, reason: str, unit: str = "", **constraints: Any) -> Any:
    """A field of a settings model that says what it means, in which unit, and why it has its default.

    Args:
        default: the value when nobody sets it.
        meaning: what the field does, one sentence.
        reason: why the default is what it is.
        unit: "seconds", "bytes", ... or "".
        **constraints: whatever `pydantic.Field` takes (ge, le, max_length, ...).
    """
    extra: dict[str, JsonValue] = {"unit": unit, "reason": reason}
    return Field(default, description=meaning, json_schema_extra=extra, **constraints)


class Section(BaseModel):
    """A group of settings inside a service's settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Settings(BaseSettings):
    """The settings of one process."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="_",
        env_nested_max_split=1,
        frozen=True,
        extra="forbid",
        validate_default=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, environment, YAML; `.env` files are not read behind the operator's back."""
        del dotenv_settings, file_secret_settings
        sources: tuple[PydanticBaseSettingsSource, ...] = (init_settings, env_settings)
        path = _yaml_file.get()
        return (*sources, YamlConfigSettingsSource(settings_cls, path)) if path else sources

    @classmethod
    def load(cls, config_file: Path | None = None, **overrides: Any) -> Self:
        """Read the settings.

        Args:
            config_file: YAML file; None takes the one that BLOCKZOO_CONFIG names, if any.
            **overrides: values that win over everything else; None means "not given".

        Raises:
            ConfigurationError: the file cannot be read, or a value is not allowed.
        """
        if config_file is None and (named := os.environ.get(CONFIG_FILE_VARIABLE)):
            config_file = Path(named)
        if config_file is not None and not config_file.is_file():
            raise ConfigurationError(
                f"the configuration file {config_file} does not exist",
                hint=f"Create it, or correct --config or {CONFIG_FILE_VARIABLE}.",
                path=config_file,
            )
        token = _yaml_file.set(config_file)
        try:
            return cls(**{name: value for name, value in overrides.items() if value is not None})
        except ValidationError as error:
            raise ConfigurationError(
                _describe(error), hint="docs/configuration.md explains every setting."
            ) from error
        except (YAMLError, ValueError, OSError) as error:
            raise ConfigurationError(
                f"the settings cannot be read: {error}", hint="docs/configuration.md explains every setting."
            ) from error
        finally:
            _yaml_file.reset(token)


def _describe(error: ValidationError) -> str:
    """Every problem of a settings model in one line, field path first, without echoing secrets."""
    problems = []
    for problem in error.errors(include_url=False, include_input=False):
        path = ".".join(str(part) for part in problem["loc"]) or "settings"
        problems.append(f"{path}: {problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(problems)
