"""Reading safetensors files without copying and without trust.

::

    u64 little-endian   length of the header
    header              JSON {"name": {"dtype": "BF16", "shape": [..], "data_offsets": [begin, end]}, ..}
    bytes               tensors, without gaps, offsets counted from here

The format is specified in the safetensors repository. The file is mapped, never
read whole: a tensor is a view into the mapping. A file that passes `open` is
whole: every byte after the header belongs to exactly one tensor.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import cast

from blockzoo.errors import CheckpointError, TensorMismatchError, TruncatedFileError
from blockzoo.manifest import DType

MAX_HEADER_BYTES = 100_000_000
"""Longest header accepted, the limit that the safetensors library uses too."""

MAX_DIMS = 8
"""Most dimensions of a tensor; weights of language models have 1 or 2."""

_KEPT_HEADERS = 4
_MAX_KEPT_HEADER = 1 << 20
"""Bytes of a header whose entries are kept; an adapter of a large model has some 0.3 MB."""

_PREFIX_BYTES = 8
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor in a file.

    Attributes:
        name: as in the header.
        dtype: element type.
        shape: dimensions.
        begin: offset of the first byte, counted from the end of the header.
        end: offset after the last byte.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.begin


class SafetensorsFile:
    """One file, mapped read-only; close it when its views are no longer used.

    Attributes:
        path: the file.
        header: the header exactly as stored, padding included.
        tensors: entries by name, in the order of their bytes.
    """

    def __init__(
        self, path: Path, mapping: mmap.mmap, header: bytes, tensors: Mapping[str, TensorEntry]
    ) -> None:
        self.path = path
        self.header = header
        self.tensors = tensors
        self._mapping = mapping
        self._data = memoryview(mapping)[_PREFIX_BYTES + len(header) :]

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Map a file and check its header.

        Raises:
            TruncatedFileError: the file is empty or ends before its header says.
            TensorMismatchError: a tensor has an element type that the zoo does not store.
            CheckpointError: the header is not what the format asks for, or the file cannot be read.
        """
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                if size == 0:
                    raise TruncatedFileError(f"{path.name} is empty", hint=_DOWNLOAD_HINT, file=path.name)
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path.name} cannot be read: {error.strerror}", file=path.name) from error
        try:
            header = _read_header(path.name, mapping)
            parse = _parse_again if len(header) <= _MAX_KEPT_HEADER else parse_header
            tensors = parse(path.name, header, len(mapping) - _PREFIX_BYTES - len(header))
        except BaseException:
            mapping.close()
            raise
        return cls(path, mapping, header, tensors)

    def read(self, name: str) -> memoryview:
        """Return the bytes of a tensor as a view into the mapped file."""
        entry = self.tensors[name]
        return self._data[entry.begin : entry.end]

    def close(self) -> None:
        """Unmap the file unless views of it are still in use, which then keep it until they go."""
        self._data.release()
        try:
            self._mapping.close()
        except BufferError:
            # Arrays made from a view hold the mapping; it is unmapped with the last of them.
            return


def parse_header(file: str, header: bytes, data_bytes: int | None) -> dict[str, TensorEntry]:
    """Read and check a header.

    Args:
        file: name for messages.
        header: the JSON bytes.
        data_bytes: bytes that follow the header in the file, None when they are still to be written.

    Returns:
        Entries by name, in the order of their bytes.

    Raises:
        TruncatedFileError: offsets reach beyond the file.
        TensorMismatchError: an element type that the zoo does not store.
        CheckpointError: anything else that is wrong.
    """
    members = _json_object(file, header)
    members.pop(_METADATA, None)
    entries = [_entry(file, name, value) for name, value in members.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_cover(file, entries, data_bytes)
    return {entry.name: entry for entry in entries}


@lru_cache(_KEPT_HEADERS)
def _parse_again(file: str, header: bytes, data_bytes: int) -> Mapping[str, TensorEntry]:
    """Return what `parse_header` does; adapters of one recipe have equal headers, and so one mapping."""
    return MappingProxyType(parse_header(file, header, data_bytes))


def _read_header(file: str, mapping: mmap.mmap) -> bytes:
    if len(mapping) < _PREFIX_BYTES:
        raise TruncatedFileError(
            f"{file} has {len(mapping)} bytes and no header", hint=_DOWNLOAD_HINT, file=file
        )
    length = int.from_bytes(mapping[:_PREFIX_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file} says that its header has {length} bytes, more than {MAX_HEADER_BYTES}",
            hint="The file is probably not in safetensors format.",
            file=file,
        )
    if _PREFIX_BYTES + length > len(mapping):
        raise TruncatedFileError(
            f"{file} ends at byte {len(mapping)}, inside its header of {length} bytes",
            hint=_DOWNLOAD_HINT,
            file=file,
        )
    return mapping[_PREFIX_BYTES : _PREFIX_BYTES + length]


def _json_object(file: str, header: bytes) -> dict[str, object]:
    try:
        value = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the header of {file} is not JSON: {str(error)[:200]}",
            hint="The file is damaged or not in safetensors format.",
            file=file,
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"the header of {file} is not a JSON object", file=file)
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a tensor is listed twice")
    return members


def _entry(file: str, name: str, value: object) -> TensorEntry:
    fields = value if isinstance(value, dict) else {}
    shape, offsets = fields.get("shape"), fields.get("data_offsets")
    if not (_counts(shape) and _counts(offsets) and len(cast(list[int], offsets)) == 2):
        raise CheckpointError(
            f"{file}: the header entry of tensor {name[:200]!r} is malformed", file=file, tensor=name
        )
    dims, (begin, end) = tuple(cast(list[int], shape)), cast(list[int], offsets)
    if len(dims) > MAX_DIMS:
        raise CheckpointError(f"{file}: tensor {name!r} has {len(dims)} dimensions", file=file, tensor=name)
    dtype = _dtype(file, name, fields.get("dtype"))
    expected = dtype.itemsize
    for dim in dims:
        expected *= dim
    if end - begin != expected:
        raise CheckpointError(
            f"{file}: tensor {name!r} of {dtype} {list(dims)} needs {expected} bytes, "
            f"its offsets span {end - begin}",
            hint="The file is damaged or was written by a faulty program.",
            file=file,
            tensor=name,
        )
    return TensorEntry(name, dtype, dims, begin, end)


def _dtype(file: str, name: str, value: object) -> DType:
    try:
        return DType(str(value))
    except ValueError as error:
        raise TensorMismatchError(
            f"{file}: tensor {name!r} has element type {str(value)[:40]!r}, which the zoo does not store",
            hint="Save the model in bfloat16, float16 or float32; quantised checkpoints are not supported.",
            file=file,
            tensor=name,
        ) from error


def _check_cover(file: str, entries: Sequence[TensorEntry], data_bytes: int | None) -> None:
    last = max(entries, key=lambda entry: entry.end, default=None)
    if last is not None and data_bytes is not None and last.end > data_bytes:
        raise TruncatedFileError(
            f"{file} holds {data_bytes} bytes of tensors, but {last.name!r} ends at byte {last.end}",
            hint=_DOWNLOAD_HINT,
            file=file,
            tensor=last.name,
        )
    position = 0
    for entry in entries:
        if entry.begin != position:
            problem = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise CheckpointError(f"{file}: tensor {entry.name!r} {problem}", file=file, tensor=entry.name)
        position = entry.end
    if data_bytes is not None and position != data_bytes:
        raise CheckpointError(
            f"{file} holds {data_bytes - position} bytes that belong to no tensor", file=file
        )


def _counts(value: object) -> bool:
    if not isinstance(value, list):
        return False
    for item in value:  # noqa: SIM110 - hundreds of tensors, and a generator takes longer than its items
        if type(item) is not int or not 0 <= item < _TOO_MUCH:
            return False
    return True


_TOO_MUCH = 1 << 62


_DOWNLOAD_HINT = "The download or copy is probably incomplete; fetch the file again."
