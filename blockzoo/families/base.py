"""What a model family says: how a checkpoint of its architecture is cut into blocks.

A family reads `config.json` and answers with a `ChainPlan`: the blocks in order,
and for every tensor inside a block the name and shape it must have in the
checkpoint. Nothing here reads weights or needs torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from blockzoo.errors import InvalidConfigError
from blockzoo.manifest import BlockKind, JsonValue

CHUNK_ROWS = 4096
"""Rows per blob of embedding and head matrices, so that added vocabulary rows share the rest."""


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of a block and where a checkpoint keeps it.

    Attributes:
        source: name in the checkpoint.
        shape: the shape that the config asks for.
        chunk_rows: rows per blob, 0 to keep the tensor in one.
    """

    source: str
    shape: tuple[int, ...]
    chunk_rows: int = 0


@dataclass(frozen=True, slots=True)
class PlannedBlock:
    """A block before its weights are known.

    Attributes:
        kind: of the block.
        config: what the computation depends on beside the tensors.
        tensors: name inside the block -> where it comes from.
    """

    kind: BlockKind
    config: Mapping[str, JsonValue]
    tensors: Mapping[str, PlannedTensor]


@dataclass(frozen=True, slots=True)
class ChainPlan:
    """A checkpoint cut into blocks, from its config alone.

    Attributes:
        family: name of the family.
        blocks: embedding, layers in order, head.
        context_length: most tokens of prompt and answer together.
        vocab_size: rows of embedding and head.
        tied: whether the head may use the embedding's matrix.
        unread: fields of the config that the blocks do not depend on.
        notes: surprises in the config for the person who registers the checkpoint, a sentence each.
    """

    family: str
    blocks: tuple[PlannedBlock, ...]
    context_length: int
    vocab_size: int
    tied: bool
    unread: tuple[str, ...] = field(default=(), compare=False)
    notes: tuple[str, ...] = ()


class Family(ABC):
    """A model family; implementations have no state."""

    name: ClassVar[str]
    """Stored in block and chain manifests."""
    architectures: ClassVar[tuple[str, ...]]
    """Values of `architectures` in config.json that this family reads."""
    model_type: ClassVar[str] = ""
    """What config.json calls it, where that is not the family's name."""

    @abstractmethod
    def plan(self, config: Mapping[str, object]) -> ChainPlan:
        """Cut a model with this config.json into blocks.

        Raises:
            InvalidConfigError: a value is missing or no model can have it.
            UnsupportedFeatureError: the model needs something that blocks do not compute.
        """

    @abstractmethod
    def is_ignorable(self, tensor: str) -> bool:
        """Tell whether a checkpoint may hold this tensor although no block uses it."""

    @abstractmethod
    def source_name(self, position: int, num_layers: int, tensor: str) -> str:
        """Return the checkpoint's name of a block's tensor; position 0 is the embedding."""

    @abstractmethod
    def locate(self, source: str, num_layers: int) -> tuple[int, str] | None:
        """Return position and name inside the block of a checkpoint's tensor, None when no block has it."""


class ConfigReader:
    """Typed, bounded access to config.json.

    Every method raises InvalidConfigError that names the field.
    """

    def __init__(self, values: Mapping[str, object], *, where: str = "config.json") -> None:
        self._values = values
        self._where = where
        self._read: set[str] = set()

    def unread(self) -> tuple[str, ...]:
        """Fields that nobody has asked for, by name."""
        return tuple(sorted(self._values.keys() - self._read))

    def _get(self, key: str) -> object:
        self._read.add(key)
        return self._values.get(key)

    def has(self, key: str) -> bool:
        """Whether the field is there and not null."""
        return self._get(key) is not None

    def raw(self, key: str) -> object:
        """The value as parsed, None when missing."""
        return self._get(key)

    def integer(self, key: str, *, least: int = 1, most: int = 2**31 - 1, default: int | None = None) -> int:
        """Return an integer within [least, most]."""
        value = self._get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(key, "is missing" if value is None else f"is {_show(value)}, not an integer")
        if not least <= value <= most:
            raise self.error(key, f"is {_show(value)}, outside {least} to {most}")
        return value

    def positive(self, key: str, *, default: float | None = None) -> float:
        """Return a finite number above zero."""
        value = self._get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(key, "is missing" if value is None else f"is {_show(value)}, not a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and number > 0):
            raise self.error(key, f"is {_show(value)}, not a finite number above zero")
        return number

    def boolean(self, key: str, *, default: bool) -> bool:
        """Return a truth value."""
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"is {_show(value)}, not true or false")
        return value

    def text(self, key: str, *, default: str) -> str:
        """Return a string."""
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(key, f"is {_show(value)}, not a string")
        return value

    def error(self, key: str, problem: str) -> InvalidConfigError:
        """Return the error for a field; the caller raises it."""
        return InvalidConfigError(f"{self._where}: {key} {problem}", field=key)


def _show(value: object) -> str:
    # A hostile value may be megabytes long.
    text = "a long number" if isinstance(value, int) and value.bit_length() > 200 else repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
