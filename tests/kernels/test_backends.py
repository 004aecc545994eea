"""What a backend promises, and what it chooses for a device and a dtype."""

import os

import pytest
import torch

from blockkernels import backends
from blockkernels.attention import GatheredAttention, PagedAttention
from blockkernels.backends import (
    Backend,
    CpuBackend,
    DeviceUnavailableError,
    ReferenceBackend,
    backend_for,
    cpu,
)
from blockkernels.backends.gpu import TritonBackend
from blockkernels.decoder import LayerSizes, LayerWeights
from blockkernels.linear import PackedLinear, PlainLinear, can_pack, linear_reference
from blockkernels.native import library, loader

CPU = torch.device("cpu")
BOTH: list[Backend] = [CpuBackend(), ReferenceBackend(CPU)]
both = pytest.mark.parametrize("backend", BOTH, ids=["cpu", "reference"])


def test_each_device_has_its_backend() -> None:
    assert isinstance(backend_for("cpu"), CpuBackend)
    other = backend_for(torch.device("cuda:1"))
    assert type(other) is TritonBackend
    assert other.device == torch.device("cuda:1")


def test_the_environment_chooses_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("BLOCKZOO_KERNELS", "reference")
    assert type(backend_for("cpu")) is type(backend_for("cuda")) is ReferenceBackend
    assert backend_for("xpu").device.type == "xpu"
    monkeypatch.setenv("BLOCKZOO_KERNELS", "CPU")
    assert type(backend_for("cpu")) is CpuBackend
    with pytest.raises(DeviceUnavailableError, match="no cpu kernels for the device 'cuda:1'"):
        backend_for("cuda:1")
    monkeypatch.setenv("BLOCKZOO_KERNELS", "triton")
    assert type(backend_for("cuda")) is TritonBackend
    with pytest.raises(DeviceUnavailableError, match="no triton kernels for the device 'cpu'"):
        backend_for("cpu")
    monkeypatch.setenv("BLOCKZOO_KERNELS", "fast")
    with pytest.raises(DeviceUnavailableError, match="is 'fast': leave it out, or use reference"):
        backend_for("cpu")


def test_nothing_else_computes_where_kernels_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceUnavailableError, match="no kernels for the device 'xpu'; BLOCKZOO_KERNELS=ref"):
        backend_for("xpu")
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceUnavailableError, match="'cuda' need triton, which is not installed here"):
        backend_for("cuda")


@pytest.mark.parametrize(("kernels", "has"), [("cpu", True), ("reference", False), ("triton", False)])
def test_c_kernels_stay_out_where_others_are_chosen(
    monkeypatch: pytest.MonkeyPatch, kernels: str, has: bool
) -> None:
    monkeypatch.setenv("BLOCKZOO_KERNELS", kernels)
    assert (loader._find() is not None) == (has and library() is not None)


@both
def test_scratch_is_on_the_device(backend: Backend) -> None:
    memory = backend.scratch(100)
    assert (memory.dtype, memory.shape, memory.device) == (torch.uint8, (100,), backend.device)
    assert ReferenceBackend(torch.device("meta")).scratch(8).device.type == "meta"


def test_types_to_compute_in() -> None:
    wide, half, brain = torch.float32, torch.float16, torch.bfloat16
    stored = (torch.float64, wide, half, brain)
    assert [CpuBackend().compute_dtype(one) for one in stored] == [wide, wide, wide, brain]
    assert [backend_for("cuda").compute_dtype(one) for one in stored] == [wide, wide, half, brain]


@both
def test_a_thread_is_prepared(backend: Backend) -> None:
    before = torch.get_num_threads()
    try:
        backend.prepare_thread(2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@both
@pytest.mark.parametrize("exact", [False, True])
def test_linear_layers_are_the_reference(backend: Backend, exact: bool) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(50, 63), torch.randn(50), torch.randn(5, 63)
    linear = backend.linear(weight, bias, exact=exact)
    assert (linear.in_features, linear.out_features, linear.num_bytes) == (63, 50, (63 + 1) * 50 * 4)
    torch.testing.assert_close(linear(x), linear_reference(x, weight, bias), rtol=1e-4, atol=1e-4)


def test_who_copies_weights() -> None:
    assert not ReferenceBackend(CPU).copies_weights(torch.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert CpuBackend().copies_weights(dtype) == can_pack(dtype, CPU)


def test_pages_of_a_type_that_the_c_kernel_lacks_are_gathered() -> None:
    def made(backend: Backend, dtype: torch.dtype) -> type:
        pool = torch.zeros(8, 1, 2, dtype=dtype)
        table = torch.zeros(1, 1, dtype=torch.int64).numpy()
        return type(backend.attention(pool, pool.clone(), 8, [table], [1], [1]))

    fast = GatheredAttention if library() is None else PagedAttention
    assert made(CpuBackend(), torch.float32) is fast
    assert made(CpuBackend(), torch.float16) is GatheredAttention
    assert made(ReferenceBackend(CPU), torch.float32) is GatheredAttention


def test_only_the_cpu_with_its_kernels_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ReferenceBackend(torch.device("cuda")).why_inexact(torch.float32)
    assert other is not None
    assert "cuda" in other.need
    if library() is not None:
        assert CpuBackend().why_inexact() is None
        packed = CpuBackend().why_inexact(torch.float16)
        assert packed is not None
        assert "packed matrix products" in packed.need
    monkeypatch.setattr(cpu, "library", lambda: None)
    lacking = CpuBackend().why_inexact()
    assert lacking is not None
    assert "C kernels" in lacking.need
    assert "compiler" in lacking.hint


def layer_weights(linear: type[PlainLinear] | type[PackedLinear]) -> LayerWeights:
    norm = torch.ones(4)
    return LayerWeights(
        norm, norm, None, None, *(linear(torch.ones(shape)) for shape in ((12, 4), (4, 4), (16, 4), (4, 8)))
    )


def test_layers_in_one_call_are_for_weights_laid_out_for_it() -> None:
    sizes = LayerSizes(4, 1, 1, 4, None, 1e-5, 0.5, "silu")
    assert ReferenceBackend(CPU).layer(layer_weights(PlainLinear), sizes, torch.float32) is None
    assert CpuBackend().layer(layer_weights(PlainLinear), sizes, torch.float32) is None
    assert CpuBackend().layer(layer_weights(PackedLinear), sizes, torch.float32) is None


@pytest.mark.parametrize(("given", "expected"), [({}, "64"), ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"}, "7")])
def test_code_for_shapes_is_bounded_unless_the_environment_says_otherwise(monkeypatch, given, expected):
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    backend_for("cpu")
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == expected
    assert os.environ["LRU_CACHE_CAPACITY"] == "64"
