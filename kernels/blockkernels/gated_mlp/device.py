"""Triton code of gated activations; launched by `blockkernels.gated_mlp.gpu`."""

import triton
import triton.language as tl

from blockkernels.soft_cap.device import tanh


@triton.jit
def gated_kernel(gate_up, y, stride, WIDE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """y[m, n] = act(gate_up[m, n]) * gate_up[m, WIDE + n]."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = n < WIDE
    TYPE: tl.constexpr = y.dtype.element_ty
    gate = tl.load(gate_up + row * stride + n, mask=live, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + WIDE + n, mask=live, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        value = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        value = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        value = 0.5 * gate * (1.0 + tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    tl.store(y + row * WIDE + n, (value.to(TYPE).to(tl.float32) * up).to(TYPE), mask=live)
