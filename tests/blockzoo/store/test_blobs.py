from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockzoo.digest import blob_id
from blockzoo.errors import BlobNotFoundError, CorruptBlobError
from blockzoo.layout import blob_key
from blockzoo.manifest import BlobId, DType
from blockzoo.storage import LocalStorage, MemoryStorage
from blockzoo.store import codec
from blockzoo.store.blobs import ALIGNMENT, MAGIC, BlobStore, TensorData, file_data
from blockzoo.store.codec import RAW, ULP, XOR
from support.zoo_faults import open_memory, tensor


def put(storage, data: TensorData, base: BlobId | None = None) -> BlobId:
    blob = blob_id(data.dtype, data.shape, data.data)
    assert storage.put_if_absent(blob_key(blob), BlobStore(storage).encode(data, base))
    return blob


@pytest.fixture(params=["memory", "local"])
def storage(request, tmp_path):
    return MemoryStorage() if request.param == "memory" else LocalStorage(tmp_path / "zoo")


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (0, 4), (300, 301), (2, 0)])
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32, DType.U8, DType.I64])
def test_raw_round_trip(storage, shape, dtype):
    count = int(np.prod(shape, dtype=int)) * dtype.itemsize
    data = TensorData(
        dtype, shape, np.random.default_rng(1).integers(0, 256, count, dtype=np.uint8).tobytes()
    )
    blob = put(storage, data)
    blobs = BlobStore(storage)
    view = blobs.read(blob)
    assert view == data.data
    assert view.readonly
    info = blobs.info(blob)
    assert (info.dtype, info.shape, info.codec, info.base) == (dtype, shape, RAW, None)
    assert info.stored_bytes == storage.size(blob_key(blob))
    assert info.offset % ALIGNMENT == 0


def test_a_large_local_blob_is_mapped_and_aligned(tmp_path):
    storage = LocalStorage(tmp_path)
    data = TensorData(DType.F32, (1 << 16,), np.arange(1 << 16, dtype="<f4").data)
    array = np.frombuffer(BlobStore(storage).read(put(storage, data)), "<f4")
    assert array.ctypes.data % ALIGNMENT == 0
    assert not array.flags.owndata
    np.testing.assert_array_equal(array, np.arange(1 << 16, dtype="<f4"))


@pytest.mark.parametrize("name", [XOR, ULP])
def test_difference_round_trip(storage, name, monkeypatch):
    monkeypatch.setattr("blockzoo.store.blobs.DELTA_CODEC", name)
    base = put(storage, tensor(1))
    near = tensor(1, nudge=5)
    blob = put(storage, near, base)
    blobs = BlobStore(storage)
    assert blobs.info(blob).codec == name
    assert blobs.info(blob).base == base
    assert blobs.info(blob).stored_bytes == storage.size(blob_key(blob)) < blobs.info(base).stored_bytes
    assert blobs.read(blob) == near.data


def test_the_id_does_not_depend_on_how_it_is_stored():
    with_base, alone = open_memory(), open_memory()
    with with_base.registration("a") as registration:
        base = registration.put_tensors([tensor(1)])[0].blob
        near = registration.put_tensors([tensor(1, nudge=3, base=base)])[0]
    with alone.registration("b") as registration:
        plain = registration.put_tensors([tensor(1, nudge=3)])[0]
    assert near.blob == plain.blob
    assert near.stored_bytes < plain.stored_bytes


def test_a_difference_that_saves_nothing_is_not_taken(storage):
    base = put(storage, tensor(1))
    noise = np.random.default_rng(2).integers(0, 256, len(tensor(1).data), dtype=np.uint8).tobytes()
    blob = put(storage, TensorData(DType.BF16, tensor(1).shape, noise), base)
    assert BlobStore(storage).info(blob).base is None


def test_base_choice_keeps_depth_one(storage):
    blobs = BlobStore(storage)
    base = put(storage, tensor(1))
    near = put(storage, tensor(1, nudge=3), base)
    dtype, shape = DType.BF16, tensor(1).shape
    assert blobs.delta_base(base, dtype, shape) == base
    assert blobs.delta_base(near, dtype, shape) == base
    assert blobs.delta_base(None, dtype, shape) is None
    assert blobs.delta_base(base, DType.F16, shape) is None
    assert blobs.delta_base(base, dtype, (2, shape[0] // 2)) is None
    with pytest.raises(BlobNotFoundError):
        blobs.delta_base(BlobId("0" * 64), dtype, shape)


def test_missing(storage):
    blobs, blob = BlobStore(storage), BlobId("0" * 64)
    assert not blobs.exists(blob)
    for read in (blobs.read, blobs.info, blobs.read_object):
        with pytest.raises(BlobNotFoundError) as caught:
            read(blob)
        assert caught.value.metadata["blob"] == blob


def test_a_difference_without_its_base():
    storage = MemoryStorage()
    base = put(storage, tensor(1))
    blob = put(storage, tensor(1, nudge=3), base)
    storage.delete(blob_key(base))
    with pytest.raises(BlobNotFoundError) as caught:
        BlobStore(storage).read(blob)
    assert caught.value.metadata["blob"] == base


def test_depth_two_is_refused_at_reading():
    storage = MemoryStorage()
    base = put(storage, tensor(1))
    near = put(storage, tensor(1, nudge=3), base)
    # What no writer here does: a difference to a difference.
    blob = put(storage, tensor(1, nudge=6), near)
    assert BlobStore(storage).info(blob).base == near
    with pytest.raises(CorruptBlobError, match="difference itself"):
        BlobStore(storage).read(blob)


@settings(max_examples=150, deadline=None)
@given(st.booleans(), st.data())
def test_any_flipped_bit_is_found(difference, data):
    storage = MemoryStorage()
    base = put(storage, tensor(1))
    blob = put(storage, tensor(1, nudge=5), base) if difference else base
    stored = bytearray(storage.get(blob_key(blob)))
    bit = data.draw(st.integers(0, len(stored) * 8 - 1))
    stored[bit // 8] ^= 1 << bit % 8
    storage.replace(blob_key(blob), [bytes(stored)])
    try:
        read = BlobStore(storage).read(blob)
    except CorruptBlobError as error:
        found = str(error)
    else:
        # A bit of the compression's frames may mean nothing; then the bytes are right.
        assert difference
        assert read == tensor(1, nudge=5).data
        return
    assert blob in found


@settings(max_examples=60, deadline=None)
@given(st.booleans(), st.data())
def test_any_truncation_and_any_tail_is_found(difference, data):
    storage = MemoryStorage()
    base = put(storage, tensor(1))
    blob = put(storage, tensor(1, nudge=5), base) if difference else base
    stored = bytes(storage.get(blob_key(blob)))
    changed = data.draw(
        st.integers(0, len(stored) - 1).map(lambda end: stored[:end])
        | st.binary(min_size=1, max_size=99).map(lambda tail: stored + tail)
    )
    storage.replace(blob_key(blob), [changed])
    with pytest.raises(CorruptBlobError):
        BlobStore(storage).read(blob)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_no_blob(noise):
    storage, blob = MemoryStorage(), BlobId("0" * 64)
    for stored in (noise, MAGIC + noise):
        storage.replace(blob_key(blob), [stored])
        for read in (BlobStore(storage).read, BlobStore(storage).info):
            with pytest.raises(CorruptBlobError):
                read(blob)


def test_a_blob_under_another_name_is_found():
    storage = MemoryStorage()
    blob = put(storage, tensor(1))
    other = BlobId("0" * 64)
    storage.put_if_absent(blob_key(other), [storage.get(blob_key(blob))])
    with pytest.raises(CorruptBlobError):
        BlobStore(storage).read(other)


def test_an_unknown_codec_is_named(monkeypatch):
    storage = MemoryStorage()
    base = put(storage, tensor(1))
    monkeypatch.setitem(codec.CODECS, "future", codec.CODECS[XOR])
    monkeypatch.setattr("blockzoo.store.blobs.DELTA_CODEC", "future")
    blob = put(storage, tensor(1, nudge=3), base)
    monkeypatch.delitem(codec.CODECS, "future")
    with pytest.raises(CorruptBlobError, match="future"):
        BlobStore(storage).read(blob)


def test_files_are_bytes():
    data = file_data(b"{}")
    assert (data.dtype, data.shape, data.data) == (DType.U8, (2,), b"{}")


def test_many_mapped_blobs_hold_no_file_descriptors(tmp_path):
    import os

    storage = LocalStorage(tmp_path)
    blob = put(storage, TensorData(DType.U8, (200_000,), bytes(200_000)))
    before = len(os.listdir("/proc/self/fd"))
    views = [BlobStore(storage).read(blob) for _ in range(50)]
    assert len(os.listdir("/proc/self/fd")) == before
    storage.delete(blob_key(blob))
    assert all(view == bytes(200_000) for view in views)


def test_a_mapping_goes_with_its_last_view(tmp_path):
    def mapped() -> int:
        with open("/proc/self/maps") as maps:
            return sum(str(tmp_path) in line for line in maps)

    storage = LocalStorage(tmp_path)
    blob = put(storage, TensorData(DType.U8, (200_000,), bytes(200_000)))
    view = BlobStore(storage).read(blob)
    part = view[5:10]
    del view
    assert mapped() == 1
    assert part == bytes(5)
    del part
    assert mapped() == 0
