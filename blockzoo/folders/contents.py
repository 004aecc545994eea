"""How a variant's original folder is put together again: files of its own inside the zoo.

The layout file keeps each weight file's header byte for byte and says where the
bytes of each tensor are, so `export` gives back identical files. Names that begin
with ``.blockzoo/`` are the zoo's own and are not exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from blockzoo.canonical import canonical_json, parse_json
from blockzoo.errors import BlockzooError, CorruptManifestError
from blockzoo.manifest import JsonValue
from blockzoo.manifest_json import is_safe_filename

OWN_PREFIX = ".blockzoo/"
LAYOUT_FILE = f"{OWN_PREFIX}layout.json"

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class InBlock:
    """A tensor that is part of a block.

    Attributes:
        position: link in the chain.
        applied: index in `Link.applied`, or None for the base block.
        name: tensor name inside the block.
    """

    position: int
    applied: int | None
    name: str


@dataclass(frozen=True, slots=True)
class InFile:
    """A tensor that no block uses, kept as a file of the variant."""

    filename: str


@dataclass(frozen=True, slots=True)
class FolderLayout:
    """A folder that was registered.

    Attributes:
        filenames: files beside the weights.
        shards: weight file -> its header, byte for byte.
        tensors: tensor name -> where its bytes are.
    """

    filenames: tuple[str, ...]
    shards: Mapping[str, str]
    tensors: Mapping[str, InBlock | InFile]

    def to_bytes(self) -> bytes:
        """Return the layout file's contents."""
        return canonical_json(
            {
                "format": _FORMAT,
                "files": [*self.filenames],
                "shards": dict(self.shards),
                "tensors": {name: _place_to_json(place) for name, place in self.tensors.items()},
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> FolderLayout:
        """Read a layout file.

        Raises:
            CorruptManifestError: it cannot be read, or a file name in it would leave the folder.
        """
        try:
            fields = cast(dict[str, dict[str, JsonValue]], parse_json(data))
            layout = cls(
                filenames=tuple(map(str, fields["files"])),
                shards={name: str(header) for name, header in fields["shards"].items()},
                tensors={name: _place_from_json(place) for name, place in fields["tensors"].items()},
            )
        except (BlockzooError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptManifestError(f"{LAYOUT_FILE} cannot be read: {error}") from error
        for name in (*layout.filenames, *layout.shards):
            if not is_safe_filename(name) or name.startswith(OWN_PREFIX):
                raise CorruptManifestError(
                    f"{LAYOUT_FILE} names {name[:100]!r}, which cannot be the name of a file in a folder"
                )
        return layout


def _place_to_json(place: InBlock | InFile) -> JsonValue:
    if isinstance(place, InFile):
        return place.filename
    return [place.position, place.applied, place.name]


def _place_from_json(value: JsonValue) -> InBlock | InFile:
    if isinstance(value, str):
        return InFile(value)
    position, applied, name = cast(list[JsonValue], value)
    if not isinstance(position, int) or not (applied is None or isinstance(applied, int)):
        raise TypeError(f"{value} is not a place in a chain")
    return InBlock(position, applied, str(name))
