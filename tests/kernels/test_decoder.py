"""Decoder layers: the reference, a block that computes part by part, and the C kernel, against each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from blockkernels.backends import Backend, CpuBackend, ReferenceBackend
from blockkernels.decoder import (
    DecoderLayer,
    DecoderLayers,
)
from blockkernels.native import library
from blockzoo.compute.decoder import PRE_NORMS
from support.decoder_layers import CASES, POST_NORMS, Case, Layers

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
"""Of the largest value. In bfloat16 each of a dozen roundings of a layer may fall the other way."""


cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def assert_near(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    difference = (got.double() - want.double()).abs().max()
    assert difference <= TOLERANCE[got.dtype] * want.double().abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", [CpuBackend(), ReferenceBackend(CPU)], ids=["cpu", "reference"])
@cases
def test_a_block_by_its_parts_is_the_reference(case: Case, backend: Backend, dtype: torch.dtype) -> None:
    layers = Layers(replace(case, dtype=dtype))
    assert_near(layers.by_parts(backend), layers.reference())


@cases
def test_the_kernel_is_the_reference_with_the_bits_of_the_parts(case: Case) -> None:
    layers, backend = Layers(case), CpuBackend()
    if not all(DecoderLayer.can_compute(one, layers.sizes, case.dtype) for one in layers.packed(backend)):
        pytest.skip("there is no kernel for this layer on this machine")
    got = layers.in_one_call(backend)
    assert torch.equal(got, layers.by_parts(backend))
    assert_near(got, layers.reference())


@cases
def test_which_layers_have_a_kernel(case: Case) -> None:
    """Not with GELU by the error function; with bfloat16 weights, the processor must multiply pairs of it."""
    native = library()
    has_kernel = native is not None and (case.int8 == "" or native.linear_panel > 0)
    for dtype in TOLERANCE:
        layers = Layers(replace(case, dtype=dtype))
        expected = has_kernel and dtype == torch.bfloat16 and case.activation != "gelu"
        for number in range(2):
            assert (layers.block(number, CpuBackend()).kernel is not None) == expected
            assert layers.block(number, ReferenceBackend(CPU)).kernel is None


def test_odd_weights_have_no_kernel() -> None:
    layers, backend = Layers(Case(wide=71)), CpuBackend()
    assert not any(
        DecoderLayer.can_compute(one, layers.sizes, torch.bfloat16) for one in layers.packed(backend)
    )


def test_scratch_is_enough_for_each_of_several_layers() -> None:
    """Layers that are computed in one call may differ in how wide they are and what their weights are in."""
    backend = CpuBackend()
    layers = [Layers(Case(hidden=64, heads=4, head_dim=16, wide=wide, int8="")) for wide in (64, 640, 128)]
    made = [DecoderLayer(one.packed(backend)[0], one.sizes) for one in layers]
    joined = DecoderLayers(made)
    assert joined.scratch_bytes(50) == made[1].scratch_bytes(50) > made[0].scratch_bytes(50)


def test_the_reference_leaves_its_input_and_stores_keys_and_values() -> None:
    layers = Layers(Case(requests=((9, 4), (3, 3))))
    before, keys = layers.hidden.clone(), layers.pool[0].clone()
    layers.pool = torch.full_like(layers.pool, float("nan"))
    layers.pool[0], layers.pool[1] = keys, keys  # what came before is known
    result = layers.reference()
    assert torch.equal(layers.hidden, before)
    assert result.isfinite().all()


def test_adapters_and_sizes_change_the_result() -> None:
    """No two cases are alike by mistake: each setting is seen in the reference."""
    plain = Layers(Case(requests=((30, 30),))).reference()
    changes: list[dict[str, Any]] = [
        {"adapters": True}, {"window": 5}, {"head_norms": True}, {"biases": True}, {"rope": None},
        {"rope": {"pairs": "neighbours"}}, {"rope": {"rotary_dim": 6}}, {"norms": POST_NORMS},
        {"norms": POST_NORMS | PRE_NORMS}, {"activation": "gelu_pytorch_tanh"},
        {"details": {"attention_scale": "0.2"}}, {"details": {"residual_scale": "0.9"}},
        {"details": {"attention_softcap": "1.5"}},
    ]  # fmt: skip
    for change in changes:
        assert not torch.equal(Layers(Case(requests=((30, 30),), **change)).reference(), plain), change
