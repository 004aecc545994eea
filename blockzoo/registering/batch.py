"""Lists of folders to register one after another: the subfolders of a folder, or a YAML file.

Each is a registration of its own: what fails leaves the others as they are, and what was registered already
is found unchanged, so an interrupted list is simply gone through again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from blockzoo.errors import CheckpointError, InvalidInputError
from blockzoo.extras import named_extras
from blockzoo.folders.checkpoint import FolderKind, folder_kind
from blockzoo.folders.files import ADAPTER_CONFIG, CONFIG
from blockzoo.folders.hub import is_hub_id
from blockzoo.manifest import VariantRecord
from blockzoo.registering.adapter import not_adaptable

MAX_ENTRIES = 100_000
MAX_LIST_BYTES = 64 << 20

_KEYS = ("folder", "name", "base", "revision")
_EXAMPLE = "Write it as: - {folder: ./my-lora, name: support-bot, base: smollm2}"
_MAX_FAULTS = 5


@dataclass(frozen=True, slots=True)
class BatchEntry:
    """One folder of a list.

    Attributes:
        source: the folder, or ORG/NAME of a model of the hub.
        name: variant name.
        base: as in `register_folder`.
        revision: of a model of the hub.
    """

    source: str
    name: str
    base: str | None = None
    revision: str | None = None

    @property
    def folder(self) -> Path:
        """The folder; there is none of that name where `source` is a model of the hub."""
        return Path(self.source)


def read_batch(path: Path, base: str | None = None) -> list[BatchEntry]:
    """Read what is to be registered, in the order in which it is to be done.

    Args:
        path: a folder with a subfolder for each variant, which gives it its name, checkpoints first; or a
            YAML file: a list of objects with `folder` (or a hub id), `name`, and maybe `base` and `revision`.
        base: for entries that name none.

    Raises:
        InvalidInputError: there is nothing to register, or an entry makes no sense.
    """
    entries = _subfolders(path, base) if path.is_dir() else _listed(path, base)
    if not entries:
        raise InvalidInputError(
            f"{path} names nothing to register",
            hint="Give a folder whose subfolders are checkpoints or adapters, or a YAML list of them.",
        )
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            raise InvalidInputError(
                f"{path} names {entry.name} twice",
                hint="Each variant can be in a list once.",
                name=entry.name,
            )
        seen.add(entry.name)
    return entries


def check_base(entries: Iterable[BatchEntry], base: str, record: VariantRecord) -> None:
    """Find out once whether adapters of a list can be registered on `base`, the variant of this record.

    Raises:
        UnsupportedAdapterError: it is an adapter itself.
    """
    if record.kind == FolderKind.ADAPTER and any(
        entry.base == base and not _is_checkpoint(Path(entry.source)) for entry in entries
    ):
        raise not_adaptable(f"{record.name}@{record.version}")


def _subfolders(path: Path, base: str | None) -> list[BatchEntry]:
    folders = [
        item
        for item in sorted(path.iterdir())
        if item.is_dir() and ((item / CONFIG).is_file() or (item / ADAPTER_CONFIG).is_file())
    ]
    checkpoints = [folder for folder in folders if _is_checkpoint(folder)]
    adapters = [folder for folder in folders if folder not in checkpoints]
    # A base may be one of the checkpoints, to which it does not apply itself.
    return [
        *(BatchEntry(str(item), item.name, None if item.name == base else base) for item in checkpoints),
        *(BatchEntry(str(item), item.name, base) for item in adapters),
    ]


def _is_checkpoint(folder: Path) -> bool:
    try:
        return folder_kind(folder) is FolderKind.CHECKPOINT
    except CheckpointError:
        # Refused in its turn, with its reason.
        return not (folder / ADAPTER_CONFIG).is_file()


def _listed(path: Path, base: str | None) -> list[BatchEntry]:
    with named_extras():
        import yaml
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise InvalidInputError(f"{path} is larger than {MAX_LIST_BYTES} bytes")
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInputError(f"{path} is not YAML: {str(error)[:300]}") from error
    if not isinstance(values, list) or len(values) > MAX_ENTRIES:
        raise InvalidInputError(
            f"{path} is not a list of at most {MAX_ENTRIES} entries",
            hint="Write one entry as: - {folder: ./my-lora, name: support-bot, base: smollm2}",
        )
    return [_entry(path, number, value, base) for number, value in enumerate(values, 1)]


def _entry(path: Path, number: int, value: object, base: str | None) -> BatchEntry:
    if not isinstance(value, Mapping):
        raise InvalidInputError(
            f"{path}: entry {number} is no object with a folder and a name", hint=_EXAMPLE
        )
    faults = [f"has the unknown key {str(key)[:80]!r}" for key in value if key not in _KEYS][:_MAX_FAULTS]
    faults += [f"has no {key}" for key in ("folder", "name") if not value.get(key)]
    faults += [f"has a {key} that is no text" for key in _KEYS if not isinstance(value.get(key), str | None)]
    if faults:
        raise InvalidInputError(
            f"{path}: entry {number} {' and '.join(faults)}",
            hint=f"Known keys: {', '.join(_KEYS)}. {_EXAMPLE}",
        )
    source = str(value["folder"])
    # Paths are meant from where the list is, so that list and folders can move together.
    local = path.parent / source
    if local.exists() or not is_hub_id(source):
        source = str(local)
    return BatchEntry(source, str(value["name"]), value.get("base") or base, value.get("revision"))
