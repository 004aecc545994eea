"""Triton's interpreter, mended where it computes something else than a GPU, sharpened where a GPU is silent.

Import this before any `device` module: TRITON_INTERPRET counts when a kernel is defined.

Mended (triton 3.6.0): bfloat16 is kept as 16-bit integers, which are then added, multiplied and compared as
integers, and casts to it cut digits off. Here it is a number type that rounds to nearest even.

Errors here that a GPU does not report: a load or store outside the tensors of the launch; two programs of one
launch that store to one address, or one that loads what another stores; sums of 16-bit floats; a `tl.dot`
with a side below 16; `if` on many values. Lanes that a mask leaves out and no `other` fills hold NaN, or a
large number.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import ml_dtypes
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from blockkernels import launching
from blockkernels.launching import Launch

BF16 = np.dtype(ml_dtypes.bfloat16)
POISON = 0x5A
"""Every byte of an integer that was not loaded."""
_Builder, _Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


class KernelError(AssertionError):
    """A kernel does what is undefined, wrong or impossible on a GPU."""


def _is_bf16(handle: Any) -> bool:
    return handle.data.dtype == BF16


def _wide(handle: Any) -> Any:
    return _Handle(handle.data.astype(np.float32), tl.float32) if _is_bf16(handle) else handle


# ---- bfloat16

_np_dtype = interpreter._get_np_dtype


def _numpy_type(dtype: Any) -> np.dtype[Any]:
    if not isinstance(dtype, tl.pointer_type) and dtype.scalar == tl.bfloat16:
        return BF16
    return _np_dtype(dtype)


def _cast(self: Any, source: Any, to: Any, *_: Any) -> Any:
    return _Handle(_wide(source).data.astype(_numpy_type(to)), to.scalar)


def _rounding(name: str) -> None:
    """Operations on bfloat16 are computed in float32 and rounded once."""
    shipped = getattr(_Builder, name)

    def operation(self: Any, *arguments: Any) -> Any:
        handles = [one for one in arguments if isinstance(one, _Handle)]
        if not any(_is_bf16(one) for one in handles):
            return shipped(self, *arguments)
        found = shipped(self, *(_wide(one) if isinstance(one, _Handle) else one for one in arguments))
        return found if found.data.dtype == bool else _Handle(found.data.astype(BF16), tl.bfloat16)

    setattr(_Builder, name, operation)


def _absolute(self: Any, value: Any) -> Any:
    return _Handle(np.abs(value.data), value.dtype.scalar)


# ---- memory


class _Memory:
    """What one launch may touch, and what its programs have touched."""

    def __init__(self, name: str, tensors: Sequence[torch.Tensor]) -> None:
        self.name = name
        self.ranges = sorted(_extent(tensor) for tensor in (*tensors, *_allowed) if tensor.numel())
        self.stores: list[tuple[Any, int]] = []
        self.loads: list[tuple[Any, int]] = []

    def touch(self, addresses: Any, on: Any, width: int, program: Any, what: str) -> Any:
        """Addresses of the lanes that are on, all of them inside a tensor."""
        places = addresses[np.broadcast_to(on, addresses.shape)]
        inside = np.zeros(places.shape, bool)
        for first, end in self.ranges:
            inside |= (places >= first) & (places + width <= end)
        if not inside.all():
            raise KernelError(
                f"{self.name}, program {program}: {what} outside every tensor in {(~inside).sum()} lanes"
            )
        return places

    def check(self) -> None:
        """Raise where programs depend on each other's order."""
        if not self.stores:
            return
        where, who = _joined(self.stores)
        order = np.argsort(where, kind="stable")
        where, who = where[order], who[order]
        if ((where[1:] == where[:-1]) & (who[1:] != who[:-1])).any():
            raise KernelError(f"{self.name}: two programs store to one address")
        read, reader = _joined(self.loads)
        at = np.minimum(np.searchsorted(where, read), len(where) - 1)
        if ((where[at] == read) & (who[at] != reader)).any():
            raise KernelError(f"{self.name}: a program loads what another one stores")


_memory: list[_Memory] = []
_allowed: list[torch.Tensor] = []
"""Tensors that the launch finds by addresses in a table."""


def _allow(launch: Launch) -> bool:
    _allowed[:] = launch.reads
    return True


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _joined(touched: Sequence[tuple[Any, int]]) -> tuple[Any, Any]:
    if not touched:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    return (
        np.concatenate([places.ravel() for places, _ in touched]),
        np.concatenate([np.full(places.size, program) for places, program in touched]),
    )


def _program(builder: Any) -> int:
    x, y, z = builder.grid_idx
    _, across, deep = builder.grid_dim
    return int((x * across + y) * deep + z)


def _width(pointers: Any) -> int:
    return int(max(1, pointers.get_element_ty().primitive_bitwidth // 8))


def _load(self: Any, pointers: Any, mask: Any, other: Any, *_: Any) -> Any:
    kind = pointers.get_element_ty()
    dtype = _numpy_type(kind)
    word = np.dtype(np.uint16) if dtype == BF16 else dtype
    shape = pointers.data.shape
    (memory,) = _memory
    places = memory.touch(pointers.data, mask.data, _width(pointers), self.grid_idx, "load")
    memory.loads.append((places, _program(self)))
    if other is None:
        fill = np.full(shape, np.nan, dtype) if dtype.kind == "f" or dtype == BF16 else np.zeros(shape, dtype)
        if dtype.kind in "iu":
            fill.view(np.uint8)[...] = POISON
    else:
        fill = np.ascontiguousarray(np.broadcast_to(other.data, shape)).astype(dtype)
    on = np.ascontiguousarray(np.broadcast_to(mask.data, shape))
    found = interpreter._interpreter.load(np.ascontiguousarray(pointers.data), on, fill.view(word), word)
    return _Handle(found.view(dtype), kind)


def _store(self: Any, pointers: Any, value: Any, mask: Any, *_: Any) -> Any:
    (memory,) = _memory
    places = memory.touch(pointers.data, mask.data, _width(pointers), self.grid_idx, "store")
    if np.unique(places).size != places.size:
        raise KernelError(f"{memory.name}, program {self.grid_idx}: two lanes store to one address")
    memory.stores.append((places, _program(self)))
    data = np.ascontiguousarray(np.broadcast_to(value.data, pointers.data.shape))
    assert data.dtype == _numpy_type(pointers.get_element_ty())
    data = data.view(np.uint16) if data.dtype == BF16 else data
    on = np.ascontiguousarray(np.broadcast_to(mask.data, pointers.data.shape))
    return interpreter._interpreter.store(np.ascontiguousarray(pointers.data), data, on)


# ---- what a GPU refuses

_shipped_dot = _Builder.create_dot


def _dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    if min(a.data.shape[-1], *a.data.shape[-2:], *b.data.shape[-2:]) < 16:
        raise KernelError(f"dot of {a.data.shape} and {b.data.shape}: a side is below 16")
    if a.data.dtype != b.data.dtype:
        raise KernelError(f"dot of {a.dtype} and {b.dtype}")
    return _shipped_dot(self, _wide(a), _wide(b), d, *rest)


_shipped_sum = interpreter.ReduceOps.sum


def _sum(self: Any, value: Any) -> Any:
    if value.dtype in (tl.bfloat16, tl.float16):
        raise KernelError("a sum of 16-bit floats")
    return _shipped_sum(self, value)


_shipped_patch = interpreter._patch_lang_tensor


def _truth(value: Any) -> bool:
    if sys._getframe(1).f_globals["__name__"].startswith("triton."):
        return True  # Triton asks whether there is a value
    if value.handle.data.size != 1:
        raise KernelError("`if` on many values")
    return bool(value.handle.data.reshape(-1)[0])


def _patch_tensor(tensor: Any, scope: Any) -> None:
    _shipped_patch(tensor, scope)
    scope.set_attr(tensor, "__bool__", _truth)
    # numpy 2.4 makes no int of an array with one element.
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))


_shipped_arguments = interpreter.GridExecutor._init_args_hst
_shipped_call = interpreter.GridExecutor.__call__


def _arguments(self: Any, positional: Sequence[Any], named: dict[str, Any]) -> Any:
    tensors = [one for one in (*positional, *named.values()) if isinstance(one, torch.Tensor)]
    _memory[:] = [_Memory(self.fn.__name__, tensors)]
    return list(positional), dict(named)  # the tensors are on the host as it is


def _call(self: Any, *arguments: Any, **named: Any) -> None:
    try:
        _shipped_call(self, *arguments, **named)
    except interpreter.InterpreterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, KernelError):
            raise cause from None
        raise
    _memory[0].check()


_prepared: set[int] = set()


def _device_call(self: Any, *arguments: Any, **named: Any) -> Any:
    # As shipped, every call patches the language again, which takes longer than most functions.
    if id(self.fn.__globals__) not in _prepared:
        interpreter._patch_lang(self.fn)
        _prepared.add(id(self.fn.__globals__))
    return self.rewrite()(*arguments, **named)


def _install() -> None:
    launching._watchers.append(_allow)
    interpreter.InterpretedFunction.__call__ = _device_call
    interpreter._get_np_dtype = _numpy_type
    interpreter._patch_lang_tensor = _patch_tensor
    interpreter.ReduceOps.sum = _sum
    executor = interpreter.GridExecutor
    executor._init_args_hst, executor.__call__ = _arguments, _call
    executor._restore_args_dev = lambda self, *rest: None
    for name in ("binary_op", "unary_op", "create_fma"):
        _rounding(name)
    for name in ("create_fp_ext", "create_fp_trunc", "create_si_to_fp", "create_ui_to_fp"):
        setattr(_Builder, name, _cast)
    for name in ("create_fp_to_si", "create_fp_to_ui", "create_fp_to_fp", "cast_impl"):
        setattr(_Builder, name, _cast)
    _Builder.create_fabs, _Builder.create_dot = _absolute, _dot
    _Builder.create_masked_load, _Builder.create_masked_store = _load, _store
    _Builder.get_bf16 = lambda self, value: _Handle(np.array([value], BF16), tl.bfloat16)


_install()
