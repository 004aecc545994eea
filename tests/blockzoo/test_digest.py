from __future__ import annotations

import blake3
import numpy as np
import pytest

from blockzoo.canonical import digest_json
from blockzoo.digest import as_bytes, blob_id, is_digest, num_bytes
from blockzoo.errors import InvalidInputError
from blockzoo.manifest import BlobId, BlockId, BlockManifest, ChainManifest, DType, Link, TensorRef
from blockzoo.manifest_json import block_to_json, chain_to_json

# Golden digests: if one of these changes, no zoo that was ever written can be read any more.
GOLDEN_BLOB = "44e3c7a9541a00c3934c2c6b7a5da9de82c6317f27e1fe03eff61e8900d40ee6"
GOLDEN_BLOCK = "9ca3e5740e558afa306f3beadc1d2395f16a635ec73b60dbf89362c258916097"
GOLDEN_CHAIN = "a3b6523dd14d55e6e0c388779ab414437633286cb88566c6d551728551d0e7be"


def golden_block() -> BlockManifest:
    ref = TensorRef(DType.BF16, (2, 3), (BlobId(GOLDEN_BLOB),))
    config = {"hidden_size": 3, "norm_eps": "1e-05", "sliding_window": None, "qk_norm": False}
    return BlockManifest("layer", "llama", config, {"self_attn.q_proj.weight": ref})


def test_golden_blob():
    assert blob_id(DType.BF16, (2, 3), bytes(range(12))) == GOLDEN_BLOB


def test_golden_block():
    assert digest_json(block_to_json(golden_block())) == GOLDEN_BLOCK


def test_golden_chain():
    links = (Link(BlockId(GOLDEN_BLOCK)), Link(BlockId(GOLDEN_BLOCK), (BlockId(GOLDEN_BLOB),)))
    assert digest_json(chain_to_json(ChainManifest("llama", links, 2048, 49152))) == GOLDEN_CHAIN


def test_definition():
    header = b'{"dtype":"I32","shape":[2]}'
    preimage = len(header).to_bytes(4, "little") + header + b"\1\0\0\0\2\0\0\0"
    expected = blake3.blake3(preimage).hexdigest()
    assert blob_id(DType.I32, [2], np.array([1, 2], "<i4").data) == expected


def test_type_and_shape_are_part_of_the_name():
    data = bytes(16)
    ids = {
        blob_id(dtype, shape, data)
        for dtype, shape in [
            (DType.F32, (4,)),
            (DType.I32, (4,)),
            (DType.F32, (2, 2)),
            (DType.F32, (4, 1)),
            (DType.F16, (8,)),
            (DType.U8, (16,)),
        ]
    }
    assert len(ids) == 6


def test_threads_do_not_change_the_digest():
    data = np.random.default_rng(0).integers(0, 256, 3 << 20, dtype=np.uint8)
    one = blob_id(DType.U8, data.shape, data.data, threads=1)
    assert (
        one == blob_id(DType.U8, data.shape, data.data, threads=2) == blob_id(DType.U8, data.shape, data.data)
    )


def test_scalars_and_empty_tensors():
    assert blob_id(DType.F32, (), bytes(4)) != blob_id(DType.F32, (1,), bytes(4))
    assert is_digest(blob_id(DType.F32, (0, 7), b""))
    assert blob_id(DType.F32, (0, 7), np.zeros((0, 7), "f4").data) == blob_id(DType.F32, (0, 7), b"")


@pytest.mark.parametrize(
    ("shape", "size"), [((2, 3), 11), ((2, 3), 13), ((), 0), ((-1, 2), 4), ((1,) * 17, 2)]
)
def test_length_must_fit(shape, size):
    with pytest.raises(InvalidInputError):
        blob_id(DType.BF16, shape, bytes(size))


def test_num_bytes():
    assert [num_bytes(dtype, (3, 5)) for dtype in DType] == [15 * dtype.itemsize for dtype in DType]


def test_as_bytes_does_not_copy():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    view = as_bytes(array.data)
    array[0, 0] = 7
    assert view.nbytes == 24
    assert np.frombuffer(view, np.float32)[0] == 7


@pytest.mark.parametrize("text", ["", "a" * 63, "A" * 64, "g" * 64, "a" * 65, "a" * 64 + "\n", None, 5])
def test_not_a_digest(text):
    assert not is_digest(text)
