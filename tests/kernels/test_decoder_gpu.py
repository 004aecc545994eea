"""Decoder layers by Triton, interpreted, against the reference; and what a layer launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import pytest
import torch

import support.triton_interpreter  # noqa: F401  (before the kernels)
from blockkernels.backends.gpu import TritonBackend
from blockkernels.launching import Launch, watched
from support.decoder_layers import CASES, Case, Layers

BACKEND = TritonBackend(torch.device("cpu"))
FEW = ((1, 1), (13, 5), (40, 1))
"""Requests of a batch: each token takes tens of milliseconds here."""
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
"""Of the largest value; as for the C kernel."""
BFLOAT16 = ("adapters", "everything new")
BRIEF = ("one token", "odd sizes", "adapters", "post norms", "no positions, no norms", "int8, all else")
"""Outside test-long, where the others take a minute."""


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *(
            pytest.param(case, torch.float32, id=name, marks=[] if name in BRIEF else [pytest.mark.long])
            for name, case in CASES.items()
        ),
        *(pytest.param(CASES[name], torch.bfloat16, id=f"{name}, bfloat16") for name in BFLOAT16),
    ],
)
def test_layers_are_the_reference(case: Case, dtype: torch.dtype) -> None:
    layers = Layers(replace(case, dtype=dtype, requests=FEW))
    want = layers.reference()
    got = layers.by_backend(BACKEND)
    assert got.dtype == want.dtype
    difference = (got.double() - want.double()).abs().max()
    assert difference <= TOLERANCE[dtype] * want.double().abs().max()


@pytest.mark.parametrize("name", ["adapters", "sandwich", "int8"])
def test_a_block_by_its_parts_is_the_reference(name: str) -> None:
    """As layers are computed that have DoRA adapters in the batch."""
    layers = Layers(replace(CASES[name], dtype=torch.float32, requests=FEW))
    want = layers.reference()
    assert (layers.by_parts(BACKEND) - want).abs().max() <= 2e-5 * want.abs().max()


def test_an_activation_without_a_kernel_is_not_computed_as_another() -> None:
    layers = Layers(Case(requests=FEW))
    weights, sizes = layers.packed(BACKEND)[0], replace(layers.sizes, activation="relu2")
    assert BACKEND.layer(weights, sizes, torch.float32) is None


def launches(case: Case) -> Counter[str]:
    """Launches of two layers, by kernel, without what they compute."""
    seen: list[Launch] = []
    with watched(lambda launch: bool(seen.append(launch))):
        Layers(case).by_backend(BACKEND)
    return Counter(launch.kernel.__name__.removesuffix("_kernel") for launch in seen)


DECODE = ((40, 1), (9, 1), (700, 1))
TEN = {"linear": 4, "place": 1, "attend": 1, "combine": 1, "gated": 1, "add_norm": 2}


def test_a_layer_of_a_decode_step_is_ten_launches() -> None:
    assert sum(TEN.values()) == 10
    two = Counter({name: 2 * count for name, count in TEN.items()}) + Counter(add_norm=1)
    for requests in (DECODE, DECODE[:1], DECODE * 4):
        assert launches(Case(requests=requests)) == two
    assert launches(Case(requests=(*DECODE, (20, 7)))) == two + Counter(attend=2)  # a prompt beside them
    wide = launches(Case(wide=640, hidden=512, requests=DECODE))  # 32 queries are too few inputs to split
    assert wide == two + Counter(sum_parts=6)  # inputs are split


def test_adapters_are_two_launches_an_input_however_many_they_are() -> None:
    base, some = (launches(Case(requests=DECODE, adapters=adapters)) for adapters in (False, True))
    # One token has two adapters on each module, which cannot be added at once.
    assert some - base == Counter(shrink=16, expand=16)
    assert base - some == Counter()
    alone = Case(requests=((40, 1),), adapters=True)
    layers = Layers(alone)
    layers.runs = layers.runs[:1]
    seen: list[Launch] = []
    with watched(lambda launch: bool(seen.append(launch))):
        layers.by_backend(BACKEND)
    assert Counter(launch.kernel.__name__ for launch in seen)["shrink_kernel"] == 8


UNUSED = {
    "linear_kernel": {"y", "part"},  # parts only where inputs are split
    "add_norm_kernel": {"hidden", "normed_out"},  # no norm, no output
    "place_kernel": {"cosine", "sine", "query"},  # no rotation, no angles
}
"""Arguments for which another one may stand in, because the kernel does not touch them."""


@pytest.mark.parametrize("name", ["adapters", "sandwich", "no positions, no norms", "int8", "everything new"])
def test_the_tensors_of_a_launch_have_no_memory_in_common(name: str) -> None:
    seen: list[Launch] = []
    with watched(lambda launch: bool(seen.append(launch))):
        Layers(replace(CASES[name], requests=DECODE)).by_backend(BACKEND)
    for launch in seen:
        names = launch.kernel.arg_names[: len(launch.arguments)]
        tensors = {
            argument: one
            for argument, one in zip(names, launch.arguments, strict=True)
            if isinstance(one, torch.Tensor) and one.numel()
        }
        for (first, a), (second, b) in combinations(tensors.items(), 2):
            apart = end(a) <= b.data_ptr() or end(b) <= a.data_ptr()
            assert apart or {first, second} <= UNUSED[launch.kernel.__name__], (launch.kernel, first, second)


def end(tensor: torch.Tensor) -> int:
    """One past the last byte."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()
