import numpy as np
import pytest

from blockzoo.errors import NonFiniteWeightsError
from blockzoo.folders.finite import Weights, check_finite, is_finite
from blockzoo.manifest import DType
from support.folders import BITS, encode

FLOATS = ("BF16", "F16", "F32", "F64")
SIZE = 300_001
LARGEST = {"BF16": 0x7F7F, "F16": 0x7BFF, "F32": 0x7F7FFFFF, "F64": 0x7FEFFFFFFFFFFFFF}


def bits(dtype: str, value: int) -> bytes:
    return value.to_bytes(BITS[dtype] // 8, "little")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("index", [0, 131_072, SIZE - 1])
def test_one_bad_value_is_found_wherever_it_is(dtype, value, index):
    values = np.linspace(-3, 3, SIZE)
    assert is_finite(DType(dtype), memoryview(encode(values, dtype).data))
    values[index] = value
    assert not is_finite(DType(dtype), memoryview(encode(values, dtype).data))


@pytest.mark.parametrize("dtype", FLOATS)
def test_extremes_that_are_finite(dtype):
    sign = 1 << (BITS[dtype] - 1)
    for value in (0, 1, LARGEST[dtype], sign, sign | 1, sign | LARGEST[dtype]):
        assert is_finite(DType(dtype), memoryview(bits(dtype, value)))
    for value in (LARGEST[dtype] + 1, LARGEST[dtype] + 2, sign | (LARGEST[dtype] + 1), sign * 2 - 1):
        assert not is_finite(DType(dtype), memoryview(bits(dtype, value)))


def test_other_types_and_empty_tensors_are_finite():
    assert is_finite(DType.I64, memoryview(b"\xff" * 8))
    assert is_finite(DType.BF16, memoryview(b""))


def test_check_names_the_first_bad_tensor_and_reports_bytes():
    good = memoryview(encode(np.ones(10)).data)
    bad = memoryview(encode(np.array([np.nan])).data)
    seen = []
    with pytest.raises(NonFiniteWeightsError, match="'second'") as caught:
        check_finite(
            [
                Weights("first", DType.BF16, good),
                Weights("second", DType.BF16, bad),
                Weights("third", DType.BF16, bad),
            ],
            seen.append,
            workers=2,
        )
    assert caught.value.metadata == {"tensor": "second"}
    check_finite([Weights(str(index), DType.BF16, good) for index in range(3)], seen.append, workers=2)
    assert sum(seen) == 60


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [0, 57, 399])
def test_the_bad_one_of_many_small_tensors_is_named(dtype, bad):
    # All of one type are looked at together; every other one of another type forbids that.
    for other in (dtype, "I64"):
        weights = [Weights(str(i), DType(other if i % 2 else dtype), _ones(dtype)) for i in range(400)]
        identified = []
        check_finite(weights, lambda _: None, workers=2, then=identified.append)
        assert identified == list(range(400))
        weights[bad] = Weights("bad", DType(dtype), _ones(dtype, np.inf))
        with pytest.raises(NonFiniteWeightsError, match="'bad'"):
            check_finite(weights, lambda _: None, workers=2)


def _ones(dtype: str, last: float = 1) -> memoryview:
    values = np.ones(8 * 300)
    values[-1] = last
    return memoryview(encode(values, dtype).data)
