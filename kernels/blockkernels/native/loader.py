"""The loaded C kernels."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from blockkernels.native.build import BuildError, load

_LOG = logging.getLogger(__name__)

SWITCH = "BLOCKZOO_NATIVE_KERNELS"
"""Environment variable: `off` keeps the C kernels out, should a compiler get them wrong."""

Functions = dict[torch.dtype, Callable[..., None]]
"""One function for each type of elements."""

_WORTH_THREADS = 1 << 16
"""Elements; as many take some 20 microseconds."""


class NativeLibrary:
    """The functions of the C kernels, most of them for float32 and bfloat16.

    Attributes:
        linear_panel: outputs of a panel of a packed weight; 0 where the processor lacks what `linear`,
            and with it `decoder_layers`, needs. Both are for bfloat16.
        rms_norm_wide, rotary_wide: of bfloat16 rows, with weights or angles in float32.
        has_fast_int8: whether the processor multiplies bytes four at a time; `linear_int8` is right without.
        attention, lora, linear, linear_int8, decoder_layers, logprobs: run without the interpreter's lock;
            they may take long.
        rms_norm, rotary, gated_silu, gated_gelu, soft_cap: keep the lock; to give it away costs more.
    """

    def __init__(self, loaded: ctypes.CDLL) -> None:
        """Declare the functions of a loaded library."""
        quick = ctypes.PyDLL(loaded._name, handle=loaded._handle)
        pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        self.attention = _both(loaded, "attention_paged", [pointer])
        self.lora = _both(loaded, "lora_grouped", [pointer])
        self.rms_norm = _both(quick, "rms_norm", [pointer] * 3 + [integer] * 5 + [real, integer])
        self.rotary = _both(quick, "rotary", [pointer] * 4 + [integer] * 8)
        self.gated_silu = _both(quick, "gated_silu", [pointer] * 2 + [integer] * 4)
        self.gated_gelu = _both(quick, "gated_gelu", [pointer] * 2 + [integer] * 4)
        self.soft_cap = _both(quick, "soft_cap", [pointer] * 2 + [integer] * 3 + [real, integer])
        self.rms_norm_wide = _declared(
            quick.rms_norm_wide_bf16, [pointer] * 3 + [integer] * 5 + [real, integer]
        )
        self.rotary_wide = _declared(quick.rotary_wide_bf16, [pointer] * 4 + [integer] * 8)
        self.logprobs = _declared(loaded.logprobs_f32, [pointer] * 6 + [integer] * 5)
        self.linear = _declared(loaded.linear_bf16, [pointer])
        self.linear_panel = int(_declared(loaded.linear_panel, [], integer)())
        self.linear_int8 = _declared(loaded.linear_int8, [pointer])
        self.has_fast_int8 = bool(_declared(loaded.linear_int8_is_fast, [], integer)())
        self.decoder_layers = _declared(loaded.decoder_layers_bf16, [pointer])
        self.decoder_scratch_bytes = _declared(loaded.decoder_scratch_bytes, [pointer, integer], integer)
        self.attention_scratch_bytes = _declared(loaded.attention_scratch_bytes, [integer] * 5, integer)


def _both(source: ctypes.CDLL, name: str, arguments: list[type]) -> Functions:
    functions: Functions = {}
    for dtype, suffix in ((torch.float32, "f32"), (torch.bfloat16, "bf16")):
        functions[dtype] = _declared(source[f"{name}_{suffix}"], arguments)
    return functions


def _declared(function: Any, arguments: list[type], result: type | None = None) -> Callable[..., Any]:
    function.argtypes = arguments
    function.restype = result
    return cast("Callable[..., Any]", function)


_lock = threading.Lock()
_loaded: list[NativeLibrary | None] = []


def library() -> NativeLibrary | None:
    """The C kernels, or None where they are switched off or cannot be built; decided once per process."""
    if not _loaded:
        with _lock:
            if not _loaded:
                _loaded.append(_find())
    return _loaded[0]


def _find() -> NativeLibrary | None:
    chosen = os.environ.get("BLOCKZOO_KERNELS", "").lower()
    if chosen not in ("", "cpu"):
        _LOG.info("BLOCKZOO_KERNELS is %s: no native kernels", chosen)
        return None
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "no", "false"):
        _LOG.info("native kernels are off (%s): torch computes everything", SWITCH)
        return None
    try:
        return NativeLibrary(load())
    except (BuildError, AttributeError) as error:
        _LOG.warning("no native kernels, torch computes everything: %s", error)
        return None


def has_dtype(tensor: Tensor) -> bool:
    """Whether the C kernels can compute with a tensor: on the CPU, float32 or bfloat16."""
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.bfloat16)


def threads_for(num_elements: int) -> int:
    """Threads for an elementwise operation: waking others costs more than a little work."""
    return torch.get_num_threads() if num_elements > _WORTH_THREADS else 1
