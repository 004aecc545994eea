"""Tensors as objects of the storage.

An object describes itself, so that a store of blobs can be checked without any
manifest::

    8 bytes    magic "bzblob" 0x00 0x01; the last byte is the version of this layout
    4 bytes    length of the header, little-endian
    4 bytes    offset of the payload, little-endian, a multiple of 64
    16 bytes   first half of the header's BLAKE3
    header     canonical JSON: dtype, shape, codec, base (null for raw), frames (lengths; empty for raw)
    zeros      up to the payload
    payload    codec "raw": the tensor's bytes; otherwise compressed frames, see `blockzoo.store.codec`

The id always names the decoded tensor. The base of an encoded blob is raw itself
(depth one), so one tensor never needs more than two objects.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from blake3 import blake3

from blockzoo.canonical import canonical_json, parse_json
from blockzoo.digest import Buffer, as_bytes, blob_id, is_digest, num_bytes
from blockzoo.errors import (
    BlobNotFoundError,
    BlockzooError,
    CorruptBlobError,
    InvalidInputError,
    NotFoundError,
)
from blockzoo.layout import blob_key
from blockzoo.manifest import BlobId, DType, JsonValue
from blockzoo.storage.base import Chunks, Storage
from blockzoo.store.codec import CODECS, RAW, ULP

MAGIC = b"bzblob\x00\x01"
ALIGNMENT = 64
"""Bytes; a mapped payload starts on a cache line and suits every vector load."""

DELTA_CODEC = ULP
"""Codec for new differences; readers accept every codec in `blockzoo.store.codec.CODECS`."""

_PREFIX = 32
_PROBE = 1024
"""Bytes fetched to see a header; every header of a raw blob fits."""
MAX_HEADER = 1 << 16
_CACHED_HEADERS = 1024
"""Headers of raw blobs kept, two hundred bytes each: the layers of a model have few shapes between them."""


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """What an object says about itself.

    Attributes:
        dtype: element type of the decoded tensor.
        shape: its shape.
        codec: "raw" or a key of `blockzoo.store.codec.CODECS`.
        base: the raw blob that the difference is to, or None.
        frames: bytes of each compressed frame; empty for raw.
        offset: where the payload starts.
    """

    dtype: DType
    shape: tuple[int, ...]
    codec: str
    base: BlobId | None
    frames: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the decoded tensor."""
        return num_bytes(self.dtype, self.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the whole object."""
        return self.offset + (self.num_bytes if self.codec == RAW else sum(self.frames))


@dataclass(frozen=True, slots=True)
class TensorData:
    """A tensor to store.

    Attributes:
        dtype: element type.
        shape: dimensions.
        data: bytes, row-major, little-endian; must not change until it is stored.
        base: a stored blob of the same dtype and shape to store the difference to, if that is smaller.
        blob: its id, when the caller has computed it already.
    """

    dtype: DType
    shape: tuple[int, ...]
    data: Buffer
    base: BlobId | None = None
    blob: BlobId | None = None


def file_data(data: bytes) -> TensorData:
    """Return a small file as the tensor it is stored as."""
    return TensorData(DType.U8, (len(data),), data)


class BlobStore:
    """Reads blobs and lays new ones out. Writing goes through `Registration`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def exists(self, blob: BlobId) -> bool:
        """Tell whether the blob is stored; its bytes are not checked."""
        return self._storage.size(blob_key(blob)) is not None

    def stored_bytes(self, blob: BlobId) -> int:
        """Return the bytes of the blob's object, 0 where there is none."""
        return self._storage.size(blob_key(blob)) or 0

    def info(self, blob: BlobId) -> BlobInfo:
        """Return what the blob's header says.

        Raises:
            BlobNotFoundError: it is not stored.
            CorruptBlobError: the header is damaged.
        """
        try:
            head = self._storage.get_range(blob_key(blob), 0, _PROBE)
            needed = _payload_offset(blob, head)
            if needed > len(head):
                head = self._storage.get_range(blob_key(blob), 0, needed)
        except NotFoundError as error:
            raise _missing(blob) from error
        return _parse(blob, head)

    def parse(self, blob: BlobId, head: memoryview) -> BlobInfo:
        """Return what the first `MAX_HEADER` bytes of an object say about it (CorruptBlobError)."""
        return _parse(blob, head)

    def read(self, blob: BlobId) -> memoryview:
        """Return the decoded tensor's bytes, verified against the id, read-only.

        Raw blobs of a local zoo are mapped, not copied.

        Raises:
            BlobNotFoundError: the blob or the base of its difference is not stored.
            CorruptBlobError: the bytes do not hash to the id.
        """
        return self.decode(blob, self.read_object(blob))

    def read_object(self, blob: BlobId) -> memoryview:
        """Return the object as stored, unverified; raises BlobNotFoundError."""
        try:
            return self._storage.get(blob_key(blob))
        except NotFoundError as error:
            raise _missing(blob) from error

    def decode(self, blob: BlobId, stored: memoryview) -> memoryview:
        """Return the verified tensor bytes of an object; raises as `read` does."""
        info = _parse(blob, stored)
        if len(stored) != info.stored_bytes:
            raise _corrupt(blob, f"it has {len(stored)} bytes instead of {info.stored_bytes}")
        payload = stored[info.offset :]
        data = payload if info.base is None else self._decode_delta(blob, info, payload)
        if blob_id(info.dtype, info.shape, data) != blob:
            raise _corrupt(blob, "its bytes hash to something else")
        return data

    def encode(self, tensor: TensorData, base: BlobId | None) -> Chunks:
        """Return the object for a tensor: the difference to the raw blob `base` where that is smaller.

        Raises:
            BlobNotFoundError: the base is not stored.
            CorruptBlobError: the base is damaged.
        """
        view = as_bytes(tensor.data)
        raw: list[Buffer] = [_raw_header(tensor.dtype, tuple(tensor.shape)), view]
        if base is None or not view.nbytes:
            return raw
        frames = CODECS[DELTA_CODEC].encode(tensor.dtype, view, self.read(base))
        header = _header(tensor.dtype, tensor.shape, DELTA_CODEC, base, [len(frame) for frame in frames])
        if len(header) + sum(map(len, frames)) < len(raw[0]) + view.nbytes:
            return [header, *frames]
        return raw

    def delta_base(self, wanted: BlobId | None, dtype: DType, shape: Sequence[int]) -> BlobId | None:
        """Return the raw blob to take differences to when the caller wants `wanted`, or None.

        That is `wanted` itself, or its own base when it is stored as a difference, provided
        type and shape agree.
        """
        if wanted is None:
            return None
        info = self.info(wanted)
        if info.base is not None:
            wanted, info = info.base, self.info(info.base)
        same = info.base is None and info.dtype == dtype and info.shape == tuple(shape)
        return wanted if same else None

    def _decode_delta(self, blob: BlobId, info: BlobInfo, payload: memoryview) -> memoryview:
        assert info.base is not None
        stored_base = self.read_object(info.base)
        if _parse(info.base, stored_base).base is not None:
            raise _corrupt(blob, f"its base {info.base} is a difference itself")
        base = self.decode(info.base, stored_base)
        # The base is really there, so its length bounds what the frames may expand to.
        if info.num_bytes != base.nbytes:
            raise _corrupt(blob, f"its base {info.base} has another size")
        frames, start = [], 0
        for length in info.frames:
            frames.append(payload[start : start + length])
            start += length
        try:
            return CODECS[info.codec].decode(info.dtype, frames, base)
        except InvalidInputError as error:
            raise _corrupt(blob, str(error)) from error


@functools.lru_cache(_CACHED_HEADERS)
def _raw_header(dtype: DType, shape: tuple[int, ...]) -> bytes:
    return _header(dtype, shape, RAW, None, ())


def _header(
    dtype: DType, shape: Sequence[int], codec: str, base: BlobId | None, frames: Sequence[int]
) -> bytes:
    header = canonical_json(
        {
            "dtype": dtype.value,
            "shape": list(shape),
            "codec": codec,
            "base": base,
            "frames": list(frames),
        }
    )
    offset = -(-(_PREFIX + len(header)) // ALIGNMENT) * ALIGNMENT
    prefix = (
        MAGIC + len(header).to_bytes(4, "little") + offset.to_bytes(4, "little") + blake3(header).digest(16)
    )
    return (prefix + header).ljust(offset, b"\0")


def _payload_offset(blob: BlobId, head: Buffer) -> int:
    if len(head) < _PREFIX or bytes(head[:8]) != MAGIC:
        raise _corrupt(blob, "it does not begin as a blob does")
    length = int.from_bytes(head[8:12], "little")
    offset = int.from_bytes(head[12:16], "little")
    if not _PREFIX + length <= offset <= MAX_HEADER or offset % ALIGNMENT:
        raise _corrupt(blob, "its header has an impossible length")
    return offset


def _parse(blob: BlobId, head: Buffer) -> BlobInfo:
    offset = _payload_offset(blob, head)
    length = int.from_bytes(head[8:12], "little")
    header = bytes(head[_PREFIX : _PREFIX + length])
    if len(head) < offset or blake3(header).digest(16) != head[16:32] or any(head[_PREFIX + length : offset]):
        raise _corrupt(blob, "its header is damaged")
    try:
        return _info(parse_json(header), offset)
    except (BlockzooError, ValueError, KeyError, TypeError) as error:
        raise _corrupt(blob, f"its header cannot be read ({error})") from error


def _info(fields: JsonValue, offset: int) -> BlobInfo:
    if not isinstance(fields, dict):
        raise TypeError("not an object")
    base, codec = fields["base"], fields["codec"]
    dtype, shape, frames = DType(str(fields["dtype"])), _counts(fields["shape"]), _counts(fields["frames"])
    num_bytes(dtype, shape)
    if codec == RAW and base is None and not frames:
        return BlobInfo(dtype, shape, RAW, None, (), offset)
    if codec not in CODECS or not isinstance(base, str) or not is_digest(base):
        raise InvalidInputError(f"codec {codec!r} is unknown or has no base")
    return BlobInfo(dtype, shape, str(codec), BlobId(base), frames, offset)


def _counts(value: JsonValue) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise TypeError("not a list")
    counts = tuple(
        item for item in value if isinstance(item, int) and not isinstance(item, bool) and item >= 0
    )
    if len(counts) != len(value):
        raise InvalidInputError("a length or dimension is not a count")
    return counts


def _missing(blob: BlobId) -> BlobNotFoundError:
    return BlobNotFoundError(
        f"blob {blob} is not in the zoo", hint="Run `blockzoo verify --repair FROM` with a backup.", blob=blob
    )


def _corrupt(blob: BlobId, problem: str) -> CorruptBlobError:
    return CorruptBlobError(
        f"blob {blob} is damaged: {problem}",
        hint="Run `blockzoo verify --repair FROM` with a backup or another zoo that holds it.",
        blob=blob,
    )
