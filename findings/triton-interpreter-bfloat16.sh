#!/usr/bin/env bash
# triton 3.6.0: with TRITON_INTERPRET=1, sums and products of bfloat16 are those of its bits as 16-bit integers.
# Exit status: 0 the behaviour is as described, 1 it has changed, 2 the packages could not be installed.
#
# The interpreter keeps bfloat16 as uint16. Loads, stores and casts to float32 and back know that; +, * and tl.dot do not and
# raise nothing. So a kernel that is right on a GPU fails its interpreted tests, or one that is wrong passes them where
# both sides are wrong alike. float16 and float32 are computed as floats. Cast to float32 before computing, or mend it.
#
# Seen with triton 3.6.0 and torch 2.13.0: 1.0 + 1.0 = 1.70e+38 and 1.5 * 2.0 = 0.0 in bfloat16; 2.0 and 3.0 in float16.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv >&2 || exit 2
venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 >&2 || exit 2
venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps triton==3.6.0 >&2 || exit 2
cat > kernels.py <<'PYTHON'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def both(a, b, total, product):
    x, y = tl.load(a), tl.load(b)
    tl.store(total, x + y)
    tl.store(product, x * y)


def results(dtype):
    def compute(left, right):
        a, b = torch.tensor([left], dtype=dtype), torch.tensor([right], dtype=dtype)
        total, product = torch.zeros(1, dtype=dtype), torch.zeros(1, dtype=dtype)
        both[(1,)](a, b, total, product)
        return total.item(), product.item()

    return compute(1.0, 1.0)[0], compute(1.5, 2.0)[1]


half, brain = results(torch.float16), results(torch.bfloat16)
print(f"triton {triton.__version__}, torch {torch.__version__}")
print(f"float16: 1.0 + 1.0 = {half[0]}, 1.5 * 2.0 = {half[1]}")
print(f"bfloat16: 1.0 + 1.0 = {brain[0]:.3g}, 1.5 * 2.0 = {brain[1]}")
sys.exit(not (half == (2.0, 3.0) and brain[0] > 1e38 and brain[1] != 3.0))
PYTHON
TRITON_INTERPRET=1 venv/bin/python -W ignore kernels.py
