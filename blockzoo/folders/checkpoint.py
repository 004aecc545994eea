"""Folders as Hugging Face and PEFT write them: which files belong to the model, and nothing else.

Opening a folder reads configs and safetensors headers, follows the shard index
and refuses what could harm: pickles, names that leave the folder, damaged files.
Weights are mapped, not read.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from blockzoo.errors import (
    CheckpointError,
    InvalidConfigError,
    MissingShardError,
    PathEscapeError,
    PickleRefusedError,
    TensorMismatchError,
    TruncatedFileError,
)
from blockzoo.folders.safetensors_io import SafetensorsFile, TensorEntry

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"

KEPT_FILES = (
    CONFIG,
    INDEX,
    ADAPTER_CONFIG,
    "generation_config.json",
    "tokenizer.json",
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

MAX_JSON_BYTES = 64 << 20
"""Largest config or shard index read."""

MAX_FILE_BYTES = 512 << 20
"""Largest kept file; tokenizers have up to some tens of megabytes."""

MAX_SHARDS = 10_000
"""Most shards an index may name."""

_PARSED_BYTES = 1 << 20
"""JSON files up to this size are parsed as a check; larger ones are vocabularies."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_JSON_FILES = frozenset(name for name in KEPT_FILES if name.endswith(".json"))


class FolderKind(enum.StrEnum):
    """What a folder holds; the value is the `kind` of the variant made from it."""

    CHECKPOINT = "checkpoint"
    ADAPTER = "adapter"


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """An opened folder. Valid inside `open_folder`'s context.

    Attributes:
        path: the folder.
        kind: checkpoint or adapter.
        config: config.json or adapter_config.json, parsed.
        shards: the weight files, in the order of their names.
        files: kept files by name.
    """

    path: Path
    kind: FolderKind
    config: Mapping[str, object]
    shards: tuple[SafetensorsFile, ...]
    files: Mapping[str, Path]

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """All tensors by name."""
        return {name: entry for shard in self.shards for name, entry in shard.tensors.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for shard in self.shards for entry in shard.tensors.values())

    def read(self, name: str) -> memoryview:
        """Return a tensor's bytes as a view into its mapped file."""
        return next(shard.read(name) for shard in self.shards if name in shard.tensors)


@contextmanager
def open_folder(path: Path) -> Iterator[ModelFolder]:
    """Open a checkpoint or adapter folder; its files are unmapped at the end of the context.

    Raises:
        CheckpointError: one of its subclasses says what is wrong with the folder.
    """
    kind = folder_kind(path)
    config = read_json(path / (CONFIG if kind is FolderKind.CHECKPOINT else ADAPTER_CONFIG))
    names = _shard_names(path) if kind is FolderKind.CHECKPOINT else [inside(path, ADAPTER_WEIGHTS).name]
    files = _kept_files(path)
    shards: list[SafetensorsFile] = []
    try:
        shards.extend(SafetensorsFile.open(path / name) for name in names)
        check_shards({shard.path.name: shard.tensors for shard in shards}, lambda: read_json(path / INDEX))
        yield ModelFolder(path, kind, config, tuple(shards), files)
    finally:
        for shard in shards:
            shard.close()


def folder_kind(path: Path) -> FolderKind:
    """Tell from its files what a folder holds.

    Raises:
        PickleRefusedError: the only weights in it are pickles.
        CheckpointError: it is no folder, or no model is in it.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a folder" if path.exists() else f"there is no folder {path}",
            hint="Give a Hugging Face checkpoint folder (config.json, safetensors) or a PEFT adapter folder.",
        )
    if (path / ADAPTER_CONFIG).is_file() and not (path / WEIGHTS).is_file():
        weights = (path / ADAPTER_WEIGHTS).is_file()
        return FolderKind.ADAPTER if weights else _refuse_without_weights(path, ADAPTER_WEIGHTS)
    if (path / WEIGHTS).is_file() or (path / INDEX).is_file():
        if not (path / CONFIG).is_file():
            raise InvalidConfigError(
                f"{path.name} has weights but no {CONFIG}",
                hint="Copy config.json from the source of the model.",
            )
        return FolderKind.CHECKPOINT
    return _refuse_without_weights(path, WEIGHTS)


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


def inside(folder: Path, name: str) -> Path:
    """Return the path of `name` in `folder`.

    Raises:
        PathEscapeError: the name, or a link that it names, leaves the folder.
    """
    simple = name not in ("", ".", "..") and not set("/\\\0") & set(name) and name.isprintable()
    if not simple or not _stays_inside(folder, name):
        raise PathEscapeError(
            f"file name {name[:200]!r} points outside the folder {folder.name}",
            hint="Weight files must lie directly in the checkpoint folder; copy them there.",
            file=name[:200],
        )
    return folder / name


def _stays_inside(folder: Path, name: str) -> bool:
    """Follow links, allowing those of the hub's cache: snapshots/<revision>/x -> ../../blobs/<digest>."""
    target = (folder / name).resolve()
    real = folder.resolve()
    if target.parent == real:
        return True
    is_cache = real.parent.name == "snapshots" and target.parent == real.parent.parent / "blobs"
    return is_cache and real.parent.parent.name.startswith("models--")


def _shard_names(path: Path) -> list[str]:
    if (path / WEIGHTS).is_file():
        return [inside(path, WEIGHTS).name]
    weight_map = read_json(inside(path, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidConfigError(f"{INDEX} has no weight_map", file=INDEX)
    names = []
    for name in weight_map.values():
        if not isinstance(name, str):
            raise InvalidConfigError(
                f"{INDEX}: the weight_map holds {str(name)[:80]!r} instead of a file name"
            )
        names.append(name)
    shards = sorted(set(names))
    if len(shards) > MAX_SHARDS:
        raise InvalidConfigError(f"{INDEX} names {len(shards)} shards, more than {MAX_SHARDS}", file=INDEX)
    for name in shards:
        if name.endswith(_PICKLES):
            raise _pickle_error(name)
        if not inside(path, name).is_file():
            raise MissingShardError(
                f"{INDEX} names {name}, which is not in the folder",
                hint="Fetch the missing file; all shards are needed.",
                file=name,
            )
    return shards


def check_shards(shards: Mapping[str, Iterable[str]], read_index: Callable[[], Mapping[str, object]]) -> None:
    """Refuse a tensor that two files hold, and an index that does not tell the truth about its shards.

    Args:
        shards: weight file -> names of its tensors.
        read_index: the shard index; called when there is one.

    Raises:
        TensorMismatchError: they contradict each other.
        InvalidConfigError: the index has no weight_map.
    """
    owner: dict[str, str] = {}
    for file, names in shards.items():
        for name in names:
            if name in owner:
                raise TensorMismatchError(f"tensor {name!r} is in both {owner[name]} and {file}", tensor=name)
            owner[name] = file
    if len(shards) == 1 and set(shards) <= {WEIGHTS, ADAPTER_WEIGHTS}:
        return
    weight_map = read_index().get("weight_map")
    if not isinstance(weight_map, dict):
        raise InvalidConfigError(f"{INDEX} has no weight_map", file=INDEX)
    for name, file in weight_map.items():
        if owner.get(name) != file:
            raise TensorMismatchError(
                f"{INDEX} says that {name!r} is in {file}, but it is not there",
                hint="Fetch the checkpoint again; index and shards do not belong together.",
                tensor=name,
                file=file,
            )
    extra = sorted(owner.keys() - weight_map.keys())
    if extra:
        raise TensorMismatchError(
            f"{INDEX} does not list tensor {extra[0]!r} of {owner[extra[0]]}", tensor=extra[0]
        )


def _kept_files(path: Path) -> dict[str, Path]:
    return {name: inside(path, name) for name in KEPT_FILES if (path / name).is_file()}


def _refuse_without_weights(path: Path, wanted: str) -> FolderKind:
    names = sorted(item.name for item in path.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise _pickle_error(pickles[0])
    hint = f"The weights must be in {wanted}" + (
        f" or in shards named by {INDEX}." if wanted == WEIGHTS else "."
    )
    if any(name.endswith(".gguf") for name in names):
        hint += (
            " Convert a GGUF file first: load it with transformers and save it with save_pretrained(FOLDER)."
        )
    raise CheckpointError(f"{path} holds no weights in safetensors format", hint=hint)


def _pickle_error(name: str) -> PickleRefusedError:
    return PickleRefusedError(
        f"{name} is a pickle, which can run code when it is opened",
        hint="If you trust it, load it and save it again with model.save_pretrained(FOLDER), "
        "which writes safetensors.",
        file=name,
    )


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
