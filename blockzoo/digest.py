"""Names of tensors: BLAKE3 over a length-prefixed header and the bytes.

::

    u32 little-endian   length of the header
    header              canonical JSON {"dtype": "BF16", "shape": [576, 1536]}
    bytes               the tensor, row-major, little-endian

The header is in the digest so that equal bytes of another shape or type are
another tensor. A manifest starts with "{" and holds no zero byte, so no manifest
and no tensor can share a preimage.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from blake3 import blake3

from blockzoo.canonical import canonical_json
from blockzoo.errors import InvalidInputError
from blockzoo.manifest import BlobId, DType

Buffer = bytes | bytearray | memoryview
"""What the zoo accepts as bytes; any object with the buffer protocol fits after `memoryview(x)`."""

DIGEST_PATTERN = re.compile(r"[0-9a-f]{64}")
"""Spelling of every digest in the zoo; use `fullmatch`."""

_THREADED_FROM = 1 << 20
"""Bytes from which BLAKE3's own threads pay for their start."""

_CACHED_HEADERS = 1024
"""Headers kept, a hundred bytes each."""

_MAX_DIMS = 16
"""More dimensions than any weight has; bounds what a hostile header can ask for."""


def blob_id(dtype: DType, shape: Sequence[int], data: Buffer, *, threads: int | None = None) -> BlobId:
    """Return the id of a tensor.

    Args:
        dtype: element type.
        shape: dimensions; `()` is one element.
        data: the tensor's bytes, row-major and little-endian.
        threads: most threads to hash with; all cores for large tensors when None.

    Raises:
        InvalidInputError: `data` has not the length that dtype and shape ask for.
    """
    view = as_bytes(data)
    header, expected = _header(dtype, tuple(shape))
    if view.nbytes != expected:
        raise InvalidInputError(
            f"tensor of {dtype} {list(shape)} needs {expected} bytes, got {view.nbytes}",
            shape=list(shape),
            dtype=dtype,
        )
    if threads is None:
        threads = blake3.AUTO if expected >= _THREADED_FROM else 1
    hasher = blake3(header, max_threads=threads)
    return BlobId(hasher.update(view).hexdigest())


@functools.lru_cache(_CACHED_HEADERS)
def _header(dtype: DType, shape: tuple[int, ...]) -> tuple[bytes, int]:
    """Return the header with its length, and the tensor's bytes; a model's layers have few shapes."""
    expected = num_bytes(dtype, shape)
    header = canonical_json({"dtype": dtype.value, "shape": list(shape)})
    return len(header).to_bytes(4, "little") + header, expected


def num_bytes(dtype: DType, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor.

    Raises:
        InvalidInputError: a dimension is negative or there are more than 16.
    """
    if len(shape) > _MAX_DIMS or any(dim < 0 for dim in shape):
        raise InvalidInputError(f"shape {list(shape)[:20]} is not a tensor's shape")
    count = dtype.itemsize
    for dim in shape:
        count *= dim
    return count


def as_bytes(data: Buffer) -> memoryview:
    """Return a one-dimensional byte view of a contiguous buffer, without copying."""
    view = memoryview(data)
    if isinstance(data, bytes):
        return view
    if view.format == "B" and view.ndim == 1 and view.c_contiguous:
        return view
    # memoryview.cast refuses shapes with a zero in them.
    return view.cast("B") if view.nbytes else memoryview(b"")


def is_digest(text: object) -> bool:
    """Tell whether `text` is spelled as a digest."""
    return isinstance(text, str) and DIGEST_PATTERN.fullmatch(text) is not None
