"""The files beside the weights: which of them are kept with a variant, and how they are read.

Every read is bounded, and a name or link that leaves the folder is refused.
"""

from __future__ import annotations

import json
from pathlib import Path

from blockzoo.errors import InvalidConfigError, PathEscapeError, TruncatedFileError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"

KEPT_FILES = (
    CONFIG,
    INDEX,
    ADAPTER_CONFIG,
    "generation_config.json",
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    TEMPLATE,
    "chat_template.json",
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)
"""Files kept beside the weights: what serving needs and what says whose the model is."""

TEMPLATE_FOLDER = "additional_chat_templates"
"""The subfolder of named chat templates; every *.jinja in it is kept too."""

MAX_TEMPLATES = 64
"""Most named chat templates of a folder."""

MAX_JSON_BYTES = 64 << 20
"""Largest config or shard index read."""

MAX_FILE_BYTES = 512 << 20
"""Largest kept file; tokenizers have up to some tens of megabytes."""

_PARSED_BYTES = 1 << 20
"""JSON files up to this size are parsed as a check; larger ones are vocabularies."""

_JSON_FILES = frozenset(name for name in KEPT_FILES if name.endswith(".json"))


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object from a file beside the weights.

    Raises:
        InvalidConfigError: it is missing, too large, or not a JSON object.
        TruncatedFileError: it is empty.
    """
    return parse_json_object(path.name, _read_limited(path, MAX_JSON_BYTES))


def parse_json_object(name: str, data: bytes) -> dict[str, object]:
    """Return the JSON object in a file's contents; raises as `read_json` does."""
    if not data.strip():
        raise TruncatedFileError(f"{name} is empty", file=name)
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidConfigError(f"{name} is not JSON: {str(error)[:200]}", file=name) from error
    if not isinstance(value, dict):
        raise InvalidConfigError(f"{name} is not a JSON object", file=name)
    return value


def _check_ends(name: str, data: bytes) -> None:
    """Tell a file that was cut off without parsing megabytes of vocabulary; the tokenizer does that later."""
    if data[:64].lstrip()[:1] != b"{" or data[-64:].rstrip()[-1:] != b"}":
        raise TruncatedFileError(
            f"{name} is not a whole JSON object",
            hint="Fetch the file again; it is probably incomplete.",
            file=name,
        )


def read_kept_file(path: Path) -> bytes:
    """Return the contents of a kept file, checked as far as serving depends on it.

    Raises:
        InvalidConfigError: a JSON file is damaged, or the file is too large.
        TruncatedFileError: a JSON file is empty.
    """
    data = _read_limited(path, MAX_FILE_BYTES)
    check_kept_file(path.name, data)
    return data


def check_kept_file(name: str, data: bytes) -> None:
    """Check the contents of a kept file; raises as `read_kept_file` does."""
    if name in _JSON_FILES:
        if len(data) > _PARSED_BYTES:
            _check_ends(name, data)
        else:
            parse_json_object(name, data)


def is_kept(name: str) -> bool:
    """Tell whether a file of this name, relative to the folder, is kept with a variant."""
    return name in KEPT_FILES or template_name(name) is not None


def template_name(filename: str) -> str | None:
    """Return the name of the chat template that a file of `TEMPLATE_FOLDER` holds, None for another file."""
    folder, _, file = filename.partition("/")
    name = file.removesuffix(".jinja")
    return name if folder == TEMPLATE_FOLDER and name != file and _is_simple(file) and name else None


def _is_simple(name: str) -> bool:
    return name not in ("", ".", "..") and not set("/\\\0") & set(name) and name.isprintable()


def inside(folder: Path, name: str) -> Path:
    """Return the path of `name` in `folder`: a file directly in it, or a named chat template.

    Raises:
        PathEscapeError: the name, or a link that it names, leaves the folder.
    """
    if not (_is_simple(name) or template_name(name)) or not _stays_inside(folder, name):
        raise PathEscapeError(
            f"file name {name[:200]!r} points outside the folder {folder.name}",
            hint="Weight files must lie directly in the checkpoint folder; copy them there.",
            file=name[:200],
        )
    return folder / name


def _stays_inside(folder: Path, name: str) -> bool:
    """Follow links, allowing those of the hub's cache: snapshots/<revision>/x -> ../../blobs/<digest>."""
    real = folder.resolve()
    target = (real / name).resolve()
    if target.parent == (real / name).parent:
        return True
    is_cache = real.parent.name == "snapshots" and target.parent == real.parent.parent / "blobs"
    return is_cache and real.parent.parent.name.startswith("models--")


def kept_files(path: Path) -> dict[str, Path]:
    """Return the kept files of a folder by name.

    Raises:
        PathEscapeError: a link leaves the folder.
        InvalidConfigError: too many named chat templates.
    """
    names = [*KEPT_FILES, *_template_files(path)]
    return {name: inside(path, name) for name in names if (path / name).is_file()}


def _template_files(path: Path) -> list[str]:
    names = sorted(f"{TEMPLATE_FOLDER}/{file.name}" for file in (path / TEMPLATE_FOLDER).glob("*.jinja"))
    if len(names) > MAX_TEMPLATES:
        raise InvalidConfigError(
            f"{TEMPLATE_FOLDER} holds {len(names)} chat templates, more than {MAX_TEMPLATES}",
            hint="Remove the ones that are not needed.",
        )
    return names


def _read_limited(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InvalidConfigError(f"{path.name} cannot be read: {error.strerror}", file=path.name) from error
    if len(data) > limit:
        raise InvalidConfigError(f"{path.name} is larger than {limit} bytes", file=path.name)
    return data


def _refuse_constant(text: str) -> object:
    raise ValueError(f"{text} is not a JSON number")
