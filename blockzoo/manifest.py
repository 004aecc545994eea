"""What the zoo stores about tensors, blocks, chains and variants.

Everything here is a frozen value without I/O. A manifest's id is the BLAKE3 of
its canonical JSON (`blockzoo.canonical`), so equal content has one id wherever
it was registered. Numbers that are not integers are stored as strings, because
their JSON spelling differs between programs.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NewType

BlobId = NewType("BlobId", str)
"""64 lower-case hex digits: BLAKE3 of a tensor's header and bytes."""
BlockId = NewType("BlockId", str)
"""64 lower-case hex digits: BLAKE3 of a block's canonical manifest."""
ChainId = NewType("ChainId", str)
"""64 lower-case hex digits: BLAKE3 of a chain's canonical manifest."""
VariantName = NewType("VariantName", str)
"""A name that passed `blockzoo.names.check_name`."""

JsonValue = None | bool | int | str | list["JsonValue"] | dict[str, "JsonValue"]
"""JSON without floats: see the module docstring."""


class DType(enum.StrEnum):
    """Element types of stored tensors, spelled as safetensors does."""

    F64 = "F64"
    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    I64 = "I64"
    I32 = "I32"
    I8 = "I8"
    U8 = "U8"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _ITEMSIZE[self]


_ITEMSIZE = {
    DType.F64: 8,
    DType.F32: 4,
    DType.F16: 2,
    DType.BF16: 2,
    DType.I64: 8,
    DType.I32: 4,
    DType.I8: 1,
    DType.U8: 1,
}


INT8, INT8_SCALE = "int8", "int8_scale"
"""Last parts of the names of a quantised weight's values, I8 [out, in], and scales, F32 [out].

They stand in the place of `weight`; see `blockzoo.compute.stored`.
"""


QUANTISED_FROM = "quantised_from"
"""Key of a quantised variant's provenance: NAME@VERSION that it was made from."""


class BlockKind(enum.StrEnum):
    """Kinds of blocks. A reader lists kinds it does not know and never runs them."""

    EMBEDDING = "embedding"
    LAYER = "layer"
    HEAD = "head"
    ADAPTER = "adapter"
    DELTA = "delta"


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor as one or more blobs, cut along axis 0.

    Attributes:
        dtype: element type.
        shape: full shape.
        blobs: ids in row order; one unless the tensor is stored in row chunks.
        chunk_rows: rows of every blob but the last, or 0 when there is one blob.
    """

    dtype: DType
    shape: tuple[int, ...]
    blobs: tuple[BlobId, ...]
    chunk_rows: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the decoded tensor."""
        count = self.dtype.itemsize
        for dim in self.shape:
            count *= dim
        return count

    def chunk_shapes(self) -> list[tuple[int, ...]]:
        """Shape of each blob, in order."""
        if not self.chunk_rows:
            return [self.shape]
        rows, tail = self.shape[0], self.shape[1:]
        return [(min(self.chunk_rows, rows - start), *tail) for start in range(0, rows, self.chunk_rows)]


@dataclass(frozen=True, slots=True)
class BlockManifest:
    """One unit of compute.

    Attributes:
        kind: a `BlockKind` value, or the name of a kind this version does not know.
        family: name of the family whose code runs the block, for example "llama".
        config: what the computation depends on beside the tensors; see the family.
        tensors: tensor name inside the block -> where its bytes are.
    """

    kind: str
    family: str
    config: Mapping[str, JsonValue]
    tensors: Mapping[str, TensorRef]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, decoded."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def is_quantised(self) -> bool:
        """Whether any weight is quantised."""
        return any(name.endswith(f".{INT8}") for name in self.tensors)


@dataclass(frozen=True, slots=True)
class Link:
    """One step of a chain: a base block and the adapters or deltas applied on it, in order."""

    base: BlockId
    applied: tuple[BlockId, ...] = ()


@dataclass(frozen=True, slots=True)
class ChainManifest:
    """Links from embedding to head.

    Attributes:
        family: family of every base block in the chain.
        links: embedding, layers in order, head.
        context_length: most tokens of prompt and answer together.
        vocab_size: rows of the head.
    """

    family: str
    links: tuple[Link, ...]
    context_length: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class FileRef:
    """A small file kept beside a variant (tokenizer.json, config.json, ...), stored as a U8 blob."""

    blob: BlobId
    size: int


@dataclass(frozen=True, slots=True)
class VariantRecord:
    """What a tenant calls: one immutable version of a name.

    Attributes:
        name: variant name.
        version: 1, 2, ...; the highest is current.
        chain: the chain that runs it; "" for a tombstone left by `rm`.
        kind: "checkpoint" or "adapter": what was registered.
        files: file name -> contents, for serving and for `export`.
        provenance: source path, base variant, time, program version, and whatever else is known.
        deleted: true for a tombstone.
    """

    name: VariantName
    version: int
    chain: ChainId
    kind: str
    files: Mapping[str, FileRef] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    deleted: bool = False

    def has_content_of(self, other: VariantRecord) -> bool:
        """Tell whether both are the same but for number, name and provenance."""

        def content(record: VariantRecord) -> tuple[object, ...]:
            return record.chain, record.kind, dict(record.files), record.deleted

        return content(self) == content(other)
