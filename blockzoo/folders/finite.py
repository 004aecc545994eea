"""Finding NaN and infinity in raw tensor bytes, without converting them to numbers.

In IEEE 754 (and bfloat16, which is the upper half of a float32) a value is NaN or
infinite exactly when all exponent bits are set: the bits without the sign are then
at least the exponent mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from blockzoo.errors import NonFiniteWeightsError
from blockzoo.manifest import DType

_EXPONENT = {DType.F64: 0x7FF << 52, DType.F32: 0xFF << 23, DType.F16: 0x1F << 10, DType.BF16: 0xFF << 7}
_RUN_BYTES = 2 << 20
"""Bytes that a thread looks at before it asks for more: to hand over a small tensor costs more than it."""
_THREADED_FROM = 1 << 20
_SMALL_BYTES = 64 << 10
"""Tensors below this are copied together, because the steps of numpy for each take longer than that."""
_SLICE_BYTES = 256 << 10
"""Bytes looked at in one go; they stay in a core's cache for the second look."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A tensor to check.

    Attributes:
        name: for the message.
        dtype: element type; types without NaN pass.
        data: the bytes.
    """

    name: str
    dtype: DType
    data: memoryview


def is_finite(dtype: DType, data: memoryview) -> bool:
    """Tell whether no element is NaN or infinite; types that are not floating point are finite."""
    if dtype not in _EXPONENT:
        return True
    exponent, sign = _EXPONENT[dtype], 1 << (8 * dtype.itemsize - 1)
    # As signed integers all negative values are below the positive ones, as unsigned ones above.
    signed = np.frombuffer(data, f"<i{dtype.itemsize}")
    unsigned = signed.view(f"<u{dtype.itemsize}")
    step = _SLICE_BYTES // dtype.itemsize
    for start in range(0, signed.size, step):
        if np.maximum.reduce(signed[start : start + step]) >= exponent:
            return False
        if np.maximum.reduce(unsigned[start : start + step]) >= sign | exponent:
            return False
    return True


def _are_small_and_finite(weights: Sequence[Weights]) -> bool:
    """Tell whether tensors are finite, False where that is found out one by one."""
    first = weights[0].dtype
    if any(item.dtype != first or item.data.nbytes > _SMALL_BYTES for item in weights):
        return False
    return is_finite(first, memoryview(b"".join([item.data for item in weights])))


def _runs(sizes: Sequence[int]) -> Iterator[range]:
    """Cut a list into runs that are worth a thread's while."""
    start = num_bytes = 0
    for index, size in enumerate(sizes):
        num_bytes += size
        if num_bytes >= _RUN_BYTES:
            yield range(start, index + 1)
            start, num_bytes = index + 1, 0
    if start < len(sizes):
        yield range(start, len(sizes))


def check_finite(
    weights: Iterable[Weights],
    on_bytes: Callable[[int], None],
    *,
    workers: int,
    then: Callable[[int], None] = lambda _: None,
) -> None:
    """Refuse NaN and infinity in any of the tensors.

    Args:
        weights: what to check.
        on_bytes: called with the bytes of a few tensors after them, from the calling thread.
        workers: threads to use.
        then: called with a tensor's index once it was found finite, from the thread that looked, while
            its bytes are still in the processor's cache.

    Raises:
        NonFiniteWeightsError: names the first such tensor.
    """
    weights = list(weights)

    def look(run: range) -> int | None:
        together = _are_small_and_finite([weights[index] for index in run])
        for index in run:
            if not (together or is_finite(weights[index].dtype, weights[index].data)):
                return index
            then(index)
        return None

    sizes = [item.data.nbytes for item in weights]
    runs = list(_runs(sizes))
    with ThreadPoolExecutor(workers, thread_name_prefix="blockzoo-check") as pool:
        # Of small tensors alone two threads take longer than one, as each step of numpy lets the other go on.
        look_at = map if max(sizes, default=0) < _THREADED_FROM else pool.map
        try:
            for run, found in zip(runs, look_at(look, runs), strict=True):
                if found is not None:
                    name = weights[found].name
                    raise NonFiniteWeightsError(
                        f"tensor {name!r} holds NaN or infinity",
                        hint="The training probably diverged; register an earlier checkpoint.",
                        tensor=name,
                    )
                on_bytes(sum(sizes[run.start : run.stop]))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
