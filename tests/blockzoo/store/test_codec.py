from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from blockzoo.errors import InvalidInputError
from blockzoo.manifest import DType
from blockzoo.store.codec import CODECS, ULP, XOR

EVERY_DTYPE = st.sampled_from(list(DType))
EVERY_CODEC = st.sampled_from(list(CODECS))


def round_trip(codec: str, dtype: DType, data: bytes, base: bytes) -> bytes:
    frames = CODECS[codec].encode(dtype, memoryview(data), memoryview(base))
    return bytes(CODECS[codec].decode(dtype, [memoryview(frame) for frame in frames], memoryview(base)))


@settings(max_examples=120, deadline=None)
@given(EVERY_CODEC, EVERY_DTYPE, st.integers(1, 33), st.data())
def test_any_bit_pattern_comes_back(codec, dtype, count, data):
    size = count * dtype.itemsize
    new = data.draw(st.binary(min_size=size, max_size=size))
    base = data.draw(st.binary(min_size=size, max_size=size))
    assert round_trip(codec, dtype, new, base) == new


@pytest.mark.parametrize("codec", CODECS)
def test_every_pair_of_extremes_in_bf16(codec):
    # Both zeros, smallest and largest subnormal and normal, infinities, NaNs with payload, of both signs.
    patterns = [0x0000, 0x0001, 0x007F, 0x0080, 0x7F7F, 0x7F80, 0x7F81, 0x7FFF]
    patterns += [pattern | 0x8000 for pattern in patterns]
    new = np.array(patterns * len(patterns), np.uint16)
    base = np.repeat(np.array(patterns, np.uint16), len(patterns))
    assert round_trip(codec, DType.BF16, new.tobytes(), base.tobytes()) == new.tobytes()


def test_a_step_of_one_value_is_one_small_number():
    # 0x3fff -> 0x4000 is the next float up: XOR sees 15 changed bits, ULP sees 1 step.
    base, new = np.full(1 << 12, 0x3FFF, np.uint16), np.full(1 << 12, 0x4000, np.uint16)
    high = CODECS[ULP].encode(DType.BF16, memoryview(new.tobytes()), memoryview(base.tobytes()))[1]
    assert zstandard.decompress(high) == bytes(1 << 12)
    high = CODECS[XOR].encode(DType.BF16, memoryview(new.tobytes()), memoryview(base.tobytes()))[1]
    assert zstandard.decompress(high) == b"\x7f" * (1 << 12)


def test_ulp_steps_cross_zero_and_keep_their_sign():
    # -0.0 is one step below +0.0, the smallest negative one below that: zigzag 1 and 3.
    base, new = np.zeros(2, np.uint16), np.array([0x8000, 0x8001], np.uint16)
    low = CODECS[ULP].encode(DType.F16, memoryview(new.tobytes()), memoryview(base.tobytes()))[0]
    assert zstandard.decompress(low) == bytes([1, 3])


@pytest.mark.parametrize("codec", CODECS)
def test_small_updates_become_small(codec):
    generator = np.random.default_rng(0)
    base = generator.normal(0, 0.02, 1 << 16).astype(np.float32)
    new = base + generator.normal(0, 2e-5, base.size).astype(np.float32)
    bf16 = [(array.view(np.uint32) >> 16).astype(np.uint16).tobytes() for array in (new, base)]
    frames = CODECS[codec].encode(DType.BF16, memoryview(bf16[0]), memoryview(bf16[1]))
    assert sum(map(len, frames)) < 0.45 * len(bf16[0])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "frames",
    [
        [],
        [zstandard.compress(bytes(8))],
        [zstandard.compress(bytes(8))] * 3,
        [zstandard.compress(bytes(8)), zstandard.compress(bytes(9))],
        [zstandard.compress(bytes(8)), zstandard.compress(bytes(1 << 30))],
        [zstandard.compress(bytes(8)), b"no zstd frame"],
        [zstandard.compress(bytes(8)), b""],
        [zstandard.compress(bytes(8)), zstandard.compress(bytes(8))[:-1]],
        [zstandard.compress(bytes(8)), zstandard.compress(bytes(8)) * 2],
        [zstandard.compress(bytes(8)), zstandard.ZstdCompressor(write_content_size=False).compress(bytes(8))],
    ],
    ids=["none", "one", "three", "long", "bomb", "noise", "empty", "cut", "twice", "unsized"],
)
def test_frames_that_do_not_fit_are_refused_before_they_expand(codec, frames, monkeypatch):
    with pytest.raises(InvalidInputError):
        CODECS[codec].decode(DType.BF16, [memoryview(frame) for frame in frames], memoryview(bytes(16)))
