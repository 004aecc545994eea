"""Manifests and records as JSON, and back with every field checked.

Readers check because the zoo may have been written by another program or a
broken disk. Members that this version does not know are left alone (a digest
covers the stored bytes, not this reading of them); kinds it does not know are
kept, so they can be listed and collected.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from blockzoo.canonical import canonical_json
from blockzoo.digest import is_digest, num_bytes
from blockzoo.errors import BlockzooError, CorruptManifestError
from blockzoo.manifest import (
    BlobId,
    BlockId,
    BlockManifest,
    ChainId,
    ChainManifest,
    DType,
    FileRef,
    JsonValue,
    Link,
    TensorRef,
    VariantRecord,
)
from blockzoo.names import check_name

MAX_MANIFEST_BYTES = 64 << 20
"""Largest manifest read; the largest known model needs 0.2 MB."""


def block_to_json(block: BlockManifest) -> dict[str, JsonValue]:
    """Return the JSON whose digest is the block's id."""
    return {
        "kind": str(block.kind),
        "family": block.family,
        "config": dict(block.config),
        "tensors": {name: _tensor_to_json(tensor) for name, tensor in block.tensors.items()},
    }


def block_bytes(block: BlockManifest) -> bytes:
    """Return the canonical bytes of `block_to_json`, in a third of the time where names are plain.

    Raises:
        InvalidInputError: as `canonical_json`.
    """
    names = sorted(block.tensors)
    blobs = (blob for tensor in block.tensors.values() for blob in tensor.blobs)
    if not (all(map(_PLAIN_NAME.fullmatch, names)) and all(map(_PLAIN_NAME.fullmatch, blobs))):
        return canonical_json(block_to_json(block))
    tensors = ",".join(f'"{name}":{_tensor_text(block.tensors[name])}' for name in names)
    head = canonical_json({"config": dict(block.config), "family": block.family, "kind": str(block.kind)})
    # "tensors" comes last of the four names.
    return b'%b,"tensors":{%b}}' % (head[:-1], tensors.encode("ascii"))


_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.]+")
"""Names that are their own spelling in JSON, and sort alike as text and in UTF-16."""


def _tensor_text(tensor: TensorRef) -> str:
    blobs = ",".join(f'"{blob}"' for blob in tensor.blobs)
    return f'{{"blobs":[{blobs}],{_shape_text(tensor.chunk_rows, tensor.dtype, tensor.shape)}}}'


@lru_cache(256)
def _shape_text(chunk_rows: int, dtype: DType, shape: tuple[int, ...]) -> str:
    """The members behind `blobs`, checked as canonical JSON; layers have few shapes between them."""
    text = canonical_json({"chunk_rows": chunk_rows, "dtype": dtype.value, "shape": list(shape)})
    return text[1:-1].decode("ascii")


def block_from_json(value: JsonValue) -> BlockManifest:
    """Read a block; raises CorruptManifestError."""
    fields = _object(value, "block")
    return BlockManifest(
        kind=_text(fields, "kind"),
        family=_text(fields, "family"),
        config=_object(fields.get("config"), "config"),
        tensors={
            name: _tensor_from_json(item) for name, item in _object(fields.get("tensors"), "tensors").items()
        },
    )


def chain_to_json(chain: ChainManifest) -> dict[str, JsonValue]:
    """Return the JSON whose digest is the chain's id."""
    return {
        "family": chain.family,
        "links": [
            {"base": str(link.base), "applied": [str(item) for item in link.applied]} for link in chain.links
        ],
        "context_length": chain.context_length,
        "vocab_size": chain.vocab_size,
    }


def chain_from_json(value: JsonValue) -> ChainManifest:
    """Read a chain; raises CorruptManifestError."""
    fields = _object(value, "chain")
    return ChainManifest(
        family=_text(fields, "family"),
        links=tuple(_link_from_json(item) for item in _list(fields, "links")),
        context_length=_count(fields, "context_length"),
        vocab_size=_count(fields, "vocab_size"),
    )


def variant_to_json(record: VariantRecord) -> dict[str, JsonValue]:
    """Return the record as JSON."""
    return {
        "name": str(record.name),
        "version": record.version,
        "chain": str(record.chain),
        "kind": record.kind,
        "files": {name: {"blob": str(ref.blob), "size": ref.size} for name, ref in record.files.items()},
        "provenance": dict(record.provenance),
        "deleted": record.deleted,
    }


def variant_from_json(value: JsonValue) -> VariantRecord:
    """Read a record; raises CorruptManifestError."""
    fields = _object(value, "variant")
    deleted = fields.get("deleted", False)
    _require(isinstance(deleted, bool), "deleted is not true or false")
    chain = "" if deleted else _digest(fields.get("chain"), "chain")
    provenance = _object(fields.get("provenance"), "provenance")
    for name, text in provenance.items():
        _require(isinstance(text, str), f"provenance {name!r} is not a string")
    version = _count(fields, "version")
    _require(version > 0, "version is not positive")
    try:
        name = check_name(_text(fields, "name"))
    except BlockzooError as error:
        raise CorruptManifestError(f"variant record: {error}") from error
    return VariantRecord(
        name=name,
        version=version,
        chain=ChainId(chain),
        kind=_text(fields, "kind"),
        files={
            key: _file_from_json(key, item) for key, item in _object(fields.get("files"), "files").items()
        },
        provenance={key: str(text) for key, text in provenance.items()},
        deleted=bool(deleted),
    )


def is_safe_filename(name: str) -> bool:
    """Tell whether `name` is a relative path that stays inside the folder it is exported to."""
    parts = name.split("/")
    return (
        0 < len(name) <= 255
        and "\\" not in name
        and name.isprintable()
        and all(part not in ("", ".", "..") for part in parts)
    )


def _tensor_to_json(tensor: TensorRef) -> JsonValue:
    return {
        "dtype": tensor.dtype.value,
        "shape": list(tensor.shape),
        "blobs": [str(blob) for blob in tensor.blobs],
        "chunk_rows": tensor.chunk_rows,
    }


def _tensor_from_json(value: JsonValue) -> TensorRef:
    fields = _object(value, "tensor")
    try:
        dtype = DType(_text(fields, "dtype"))
    except ValueError as error:
        raise CorruptManifestError(str(error)) from error
    shape = tuple(_as_count(dim, "dimension") for dim in _list(fields, "shape"))
    blobs = tuple(BlobId(_digest(item, "blob")) for item in _list(fields, "blobs"))
    tensor = TensorRef(dtype=dtype, shape=shape, blobs=blobs, chunk_rows=_count(fields, "chunk_rows"))
    try:
        num_bytes(dtype, shape)
    except BlockzooError as error:
        raise CorruptManifestError(str(error)) from error
    _require(not tensor.chunk_rows or bool(shape), "a tensor without dimensions cannot be cut into rows")
    # Counted rather than listed: a hostile shape may ask for billions of chunks.
    chunks = -(-shape[0] // tensor.chunk_rows) if tensor.chunk_rows else 1
    _require(
        len(blobs) == chunks, f"tensor of shape {list(shape)} lists {len(blobs)} blobs instead of {chunks}"
    )
    return tensor


def _link_from_json(value: JsonValue) -> Link:
    fields = _object(value, "link")
    return Link(
        base=BlockId(_digest(fields.get("base"), "base")),
        applied=tuple(BlockId(_digest(item, "applied block")) for item in _list(fields, "applied")),
    )


def _file_from_json(name: str, value: JsonValue) -> FileRef:
    _require(is_safe_filename(name), f"file name {name[:100]!r} leaves its folder")
    fields = _object(value, "file")
    return FileRef(blob=BlobId(_digest(fields.get("blob"), "blob")), size=_count(fields, "size"))


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise CorruptManifestError(f"manifest cannot be read: {problem}")


def _object(value: JsonValue, what: str) -> dict[str, JsonValue]:
    if not isinstance(value, dict):
        raise CorruptManifestError(f"manifest cannot be read: {what} is not an object")
    return value


def _list(fields: Mapping[str, JsonValue], name: str) -> list[JsonValue]:
    value = fields.get(name)
    if not isinstance(value, list):
        raise CorruptManifestError(f"manifest cannot be read: {name} is not a list")
    return value


def _text(fields: Mapping[str, JsonValue], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise CorruptManifestError(f"manifest cannot be read: {name} is not a string")
    return value


def _count(fields: Mapping[str, JsonValue], name: str) -> int:
    return _as_count(fields.get(name), name)


def _as_count(value: JsonValue, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CorruptManifestError(f"manifest cannot be read: {what} is not a count")
    return value


def _digest(value: JsonValue, what: str) -> str:
    if not isinstance(value, str) or not is_digest(value):
        raise CorruptManifestError(f"manifest cannot be read: {what} is not a digest")
    return value
