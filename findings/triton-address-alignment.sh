#!/usr/bin/env bash
# triton 3.6.0: a pointer made from an integer loads element by element; tl.multiple_of on the integer does not change that,
# on the pointer it does. Exit status: 0 as described, 1 changed, 2 the packages could not be installed.
#
# Kernels that find matrices by addresses in a table (grouped adapters, experts, pages) turn int64 into pointers. What the
# compiler knows of an integer is lost in the cast, silently: the kernel is right and loads 2 bytes at a time.
# `tl.multiple_of(pointer, 16)` after the cast brings loads of 16 bytes back. Seen by compiling for sm_90, which needs no GPU.
#
# Seen with triton 3.6.0: loads of 16 bytes in the machine code: 0 as it is, 0 with the hint on the integer, 1 on the pointer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv >&2 || exit 2
venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps triton==3.6.0 >&2 || exit 2
cat > kernels.py <<'PYTHON'
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def plain(y, table):
    row = tl.load(table).to(y.dtype, bitcast=True)
    at = tl.arange(0, 1024)
    tl.store(y + at, tl.load(row + at))


@triton.jit
def on_the_integer(y, table):
    row = tl.multiple_of(tl.load(table), 16).to(y.dtype, bitcast=True)
    at = tl.arange(0, 1024)
    tl.store(y + at, tl.load(row + at))


@triton.jit
def on_the_pointer(y, table):
    row = tl.multiple_of(tl.load(table).to(y.dtype, bitcast=True), 16)
    at = tl.arange(0, 1024)
    tl.store(y + at, tl.load(row + at))


def wide_loads(kernel):
    known = {(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]}
    source = ASTSource(kernel, {"y": "*bf16", "table": "*i64"}, {}, known)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    return len(re.findall(r"ld\.global\S*\.v4\.b32", code))


found = {kernel.__name__: wide_loads(kernel) for kernel in (plain, on_the_integer, on_the_pointer)}
print(f"triton {triton.__version__}: loads of 16 bytes: {found}")
sys.exit(found != {"plain": 0, "on_the_integer": 0, "on_the_pointer": 1})
PYTHON
venv/bin/python -W ignore kernels.py
