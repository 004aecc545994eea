import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from blockzoo.errors import CheckpointError, TensorMismatchError, TruncatedFileError
from blockzoo.folders.safetensors_io import MAX_HEADER_BYTES, SafetensorsFile, parse_header
from blockzoo.manifest import DType
from support.folders import encode, header, safetensors_bytes, tensor

ITEMS = {"a": tensor((3, 5), seed=1), "b": tensor((7,), seed=2, dtype="F32"), "c": tensor((), dtype="F16")}


def opened(path: Path, data: bytes) -> SafetensorsFile:
    (path / "x.safetensors").write_bytes(data)
    return SafetensorsFile.open(path / "x.safetensors")


def test_reads_what_the_safetensors_library_writes(tmp_path):
    arrays = {
        "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
        "half": np.array([1.5, -2.25], np.float16),
        "ids": np.arange(3, dtype=np.int64),
        "scalar": np.array(7, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile.open(tmp_path / "x.safetensors")
    assert set(file.tensors) == set(arrays)
    for name, array in arrays.items():
        entry = file.tensors[name]
        assert entry.shape == array.shape
        assert entry.num_bytes == array.nbytes
        assert bytes(file.read(name)) == array.tobytes()
    assert file.tensors["half"].dtype is DType.F16
    assert file.tensors["ids"].dtype is DType.I64


def test_header_is_kept_byte_for_byte_with_its_padding(tmp_path):
    data = safetensors_bytes(ITEMS)
    file = opened(tmp_path, data)
    assert data.startswith(len(file.header).to_bytes(8, "little") + file.header)
    assert len(file.header) % 8 == 0


def test_tensors_are_views_of_the_file_not_copies(tmp_path):
    file = opened(tmp_path, safetensors_bytes(ITEMS))
    a, again = np.frombuffer(file.read("a"), np.uint8), np.frombuffer(file.read("a"), np.uint8)
    assert np.shares_memory(a, again)
    assert file.read("a").readonly


def test_close_keeps_the_bytes_of_views_in_use(tmp_path):
    file = opened(tmp_path, safetensors_bytes(ITEMS))
    array = np.frombuffer(file.read("b"), np.uint8)
    file.close()
    assert array.tobytes() == ITEMS["b"].data


def test_entries_come_in_the_order_of_their_bytes(tmp_path):
    entries = header(ITEMS)
    file = opened(tmp_path, safetensors_bytes(ITEMS, dict(reversed(entries.items()))))
    assert list(file.tensors) == ["a", "b", "c"]


def with_entry(**changes):
    entries = header(ITEMS)
    entries["b"] = {**entries["b"], **changes}
    return safetensors_bytes(ITEMS, entries)


GOOD = safetensors_bytes(ITEMS)
BAD = {
    "empty": (b"", TruncatedFileError),
    "shorter than the length": (GOOD[:5], TruncatedFileError),
    "inside the header": (GOOD[:40], TruncatedFileError),
    "inside the tensors": (GOOD[:-3], TruncatedFileError),
    "header longer than allowed": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + GOOD[8:], CheckpointError),
    "header longer than the file": ((10_000).to_bytes(8, "little") + GOOD[8:], TruncatedFileError),
    "header length 2**63": ((1 << 63).to_bytes(8, "little") + GOOD[8:], CheckpointError),
    "not JSON": ((8).to_bytes(8, "little") + b"no json!", CheckpointError),
    "not UTF-8": ((8).to_bytes(8, "little") + b'{"\xff":1} ', CheckpointError),
    "not an object": ((8).to_bytes(8, "little") + b"[1,2,3] ", CheckpointError),
    "deep nesting": ((200_000).to_bytes(8, "little") + b"[" * 200_000, CheckpointError),
    "pickle": (b"\x80\x04\x95" + b"x" * 100, CheckpointError),
    "tensor listed twice": (
        (67).to_bytes(8, "little")
        + b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{}}        '
        + b"x",
        CheckpointError,
    ),
    "trailing bytes": (GOOD + b"xx", CheckpointError),
    "unknown type": (with_entry(dtype="F8_E4M3"), TensorMismatchError),
    "type no string": (with_entry(dtype=7), TensorMismatchError),
    "shape disagrees with span": (with_entry(shape=[8]), CheckpointError),
    "negative dimension": (with_entry(shape=[-7]), CheckpointError),
    "fractional dimension": (with_entry(shape=[7.0]), CheckpointError),
    "truth value as dimension": (with_entry(shape=[True]), CheckpointError),
    "huge dimension": (with_entry(shape=[1 << 70]), CheckpointError),
    "overflowing product": (with_entry(shape=[1 << 40, 1 << 40]), CheckpointError),
    "many dimensions": (with_entry(shape=[1] * 9), CheckpointError),
    "no offsets": (with_entry(data_offsets=None), CheckpointError),
    "three offsets": (with_entry(data_offsets=[30, 58, 60]), CheckpointError),
    "offsets reversed": (with_entry(data_offsets=[58, 30]), CheckpointError),
    "overlap": (with_entry(data_offsets=[28, 56]), CheckpointError),
    "gap": (with_entry(data_offsets=[32, 60]), CheckpointError),
    "beyond the file": (with_entry(data_offsets=[1 << 50, (1 << 50) + 28]), TruncatedFileError),
    "entry is a list": (safetensors_bytes(ITEMS, {**header(ITEMS), "b": [1]}), CheckpointError),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(tmp_path, name):
    data, expected = BAD[name]
    with pytest.raises(expected) as caught:
        opened(tmp_path, data)
    assert type(caught.value) is expected
    assert "x.safetensors" in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        SafetensorsFile.open(tmp_path / "nothing.safetensors")


@given(cut=st.integers(0, len(GOOD) - 1))
@settings(max_examples=60, deadline=None)
def test_every_truncation_is_noticed(tmp_path_factory, cut):
    with pytest.raises(CheckpointError):
        opened(tmp_path_factory.mktemp("cut"), GOOD[:cut])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=10,
    ),
    st.integers(0, 1 << 40),
)
@settings(max_examples=200, deadline=None)
def test_no_header_raises_anything_but_checkpoint_errors(value, data_bytes):
    text = json.dumps({"t": value, "dtype": "F32"} if not isinstance(value, dict) else value).encode()
    try:
        parse_header("x", text, data_bytes)
    except CheckpointError:
        return
    # What is accepted covers all bytes, so an accepted file without tensors has no bytes.
    assert data_bytes == 0


def test_encode_truncates_floats_to_bfloat16():
    assert encode(np.array([1.0, -2.0])).data == bytes([0x80, 0x3F, 0x00, 0xC0])
