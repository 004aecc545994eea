"""Folders as Hugging Face and PEFT write them: which files belong to the model, and nothing else.

Opening a folder reads configs and safetensors headers, follows the shard index
and refuses what could harm: pickles, names that leave the folder, damaged files.
Weights are mapped, not read.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from blockzoo.errors import (
    CheckpointError,
    InvalidConfigError,
    MissingShardError,
    PickleRefusedError,
    TensorMismatchError,
)
from blockzoo.folders.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    INDEX,
    WEIGHTS,
    inside,
    kept_files,
    read_json,
)
from blockzoo.folders.lead_on import hint_with_models_below
from blockzoo.folders.safetensors_io import SafetensorsFile, TensorEntry

MAX_SHARDS = 10_000
"""Most shards an index may name."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class FolderKind(enum.StrEnum):
    """What a folder holds; the value is the `kind` of the variant made from it."""

    CHECKPOINT = "checkpoint"
    ADAPTER = "adapter"


@dataclass(frozen=True)
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

    @cached_property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """All tensors by name."""
        if len(self.shards) == 1:
            return self.shards[0].tensors
        return {name: entry for shard in self.shards for name, entry in shard.tensors.items()}

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.tensors.values())

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
    files = kept_files(path)
    shards: list[SafetensorsFile] = []
    try:
        shards.extend(SafetensorsFile.open(path / name) for name in names)
        check_shards(
            {shard.path.name: shard.tensors for shard in shards},
            lambda: read_json(path / INDEX),
            lambda name: _is_equal_everywhere(name, shards),
        )
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
            hint="Give a Hugging Face checkpoint folder (config.json, safetensors), a PEFT adapter folder, "
            "or ORG/NAME of a model of the hub.",
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


def _is_equal_everywhere(name: str, shards: Iterable[SafetensorsFile]) -> bool:
    """Tell whether all files that hold a tensor hold the same."""
    first, *others = [shard for shard in shards if name in shard.tensors]
    entry = first.tensors[name]
    return all(
        (entry.dtype, entry.shape) == (other.tensors[name].dtype, other.tensors[name].shape)
        and first.read(name) == other.read(name)
        for other in others
    )


def check_shards(
    shards: Mapping[str, Iterable[str]],
    read_index: Callable[[], Mapping[str, object]],
    is_equal: Callable[[str], bool],
) -> None:
    """Refuse a tensor that files hold with different bytes, and an index that is untrue about its shards.

    Args:
        shards: weight file -> names of its tensors.
        read_index: the shard index; called when there is one.
        is_equal: tells whether all files that hold a tensor hold the same.

    Raises:
        TensorMismatchError: they contradict each other.
        InvalidConfigError: the index has no weight_map.
    """
    owners: dict[str, list[str]] = {}
    for file, names in shards.items():
        for name in names:
            if name in owners and not is_equal(name):
                raise TensorMismatchError(
                    f"tensor {name!r} is in both {owners[name][0]} and {file}, with different bytes",
                    hint="Fetch the checkpoint again; its shards do not belong together.",
                    tensor=name,
                )
            owners.setdefault(name, []).append(file)
    if len(shards) == 1 and set(shards) <= {WEIGHTS, ADAPTER_WEIGHTS}:
        return
    weight_map = read_index().get("weight_map")
    if not isinstance(weight_map, dict):
        raise InvalidConfigError(f"{INDEX} has no weight_map", file=INDEX)
    for name, file in weight_map.items():
        if file not in owners.get(name, ()):
            raise TensorMismatchError(
                f"{INDEX} says that {name!r} is in {file}, but it is not there",
                hint="Fetch the checkpoint again; index and shards do not belong together.",
                tensor=name,
                file=file,
            )
    extra = sorted(owners.keys() - weight_map.keys())
    if extra:
        raise TensorMismatchError(
            f"{INDEX} does not list tensor {extra[0]!r} of {owners[extra[0]][0]}", tensor=extra[0]
        )


def _refuse_without_weights(path: Path, wanted: str) -> FolderKind:
    names = sorted(item.name for item in path.iterdir())
    if below := hint_with_models_below(path):
        raise CheckpointError(f"{path} holds no model itself", hint=below)
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
