"""Three calls of the C library that Python lacks or wraps unsuitably."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from pathlib import Path

_MAP_FROM = 128 << 10
"""Bytes from which mapping beats reading; below, page tables and faults cost more than the copy."""

_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_syncfs = getattr(_libc, "syncfs", None)
_statfs = getattr(_libc, "statfs", None)
_STATFS_BYTES = 256
"""More than any `struct statfs` of Linux has; its first field is the type of the file system, a long."""
_LOCAL_TYPES = frozenset(
    {
        0xEF53,  # ext2 to ext4
        0x58465342,  # XFS
        0x9123683E,  # Btrfs
        0x2FC12FC1,  # ZFS
        0xF2F52010,  # F2FS
        0x794C7630,  # overlayfs, as in containers
        0x01021994,  # tmpfs
    }
)
"""statfs(2) and linux/magic.h."""


def map_file(path: Path, start: int = 0, length: int | None = None, *, is_mapped: bool = True) -> memoryview:
    """Return the file's bytes from `start`, read-only, without holding a file descriptor.

    At most `length` bytes; all up to the end when None, fewer where the file ends. With `is_mapped` large
    files are mapped.

    `mmap.mmap` keeps a duplicate of the descriptor before Python 3.13, and a server with a
    thousand tensors loaded would meet the usual limit of 1024 open files. Raises OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = max(os.fstat(fd).st_size - start, 0)
        if length is not None:
            size = min(size, length)
        if size < _MAP_FROM or not is_mapped:
            return memoryview(_read_all(fd, start, size))
        skipped = start % mmap.ALLOCATIONGRANULARITY
        size += skipped
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, start - skipped)
        if address == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
    finally:
        os.close(fd)
    array = (ctypes.c_ubyte * size).from_address(address)
    # Every memoryview keeps the array alive, so the pages stay as long as anybody can see them.
    weakref.finalize(array, _libc.munmap, address, size).atexit = False
    return memoryview(array).cast("B")[skipped:].toreadonly()


def sync_file_system(folder: Path) -> bool:
    """Flush the whole file system that holds `folder`; False where there is no such call.

    Errors of any write since the call began are reported by Linux 5.8 and newer. Raises OSError.
    """
    if _syncfs is None:
        return False
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _syncfs(fd):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(folder))
    finally:
        os.close(fd)
    return True


def is_on_this_machine(folder: Path) -> bool:
    """Whether a folder is, or will be, on a file system of a kind that is known not to be a network's."""
    if _statfs is None or sys.platform != "linux":
        return False
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    found = ctypes.create_string_buffer(_STATFS_BYTES)
    if _statfs(os.fsencode(folder), found):
        return False
    kind = ctypes.c_ulong.from_buffer(found).value
    return kind & 0xFFFFFFFF in _LOCAL_TYPES


def _read_all(fd: int, start: int, size: int) -> bytes:
    parts = []
    while size > 0 and (part := os.pread(fd, size, start)):
        parts.append(part)
        start += len(part)
        size -= len(part)
    return b"".join(parts)
