"""Operations of transformer blocks, one folder an operation.

Every folder holds ``reference.py`` (plain torch, the truth that tests compare
with) and, where a faster way exists, ``kernel.py``; the folder's ``__init__``
exports what callers use. `backends` chooses among them for a device. This package
knows tensors only: no blocks, no requests, no zoo.
"""
