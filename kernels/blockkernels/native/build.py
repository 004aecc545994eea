"""Building the C kernels and keeping the result.

The shared library goes into a cache folder of the user, under the digest of
everything it depends on: sources, flags, processor. It appears there in one step,
so processes that build at the same time do not disturb each other. Where there is
no such folder, it is built into a temporary one and loaded from there.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_LOG = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parent.parent
_HEADERS = _PACKAGE / "native"
_SOURCES = (
    _PACKAGE / "attention" / "paged.c",
    _PACKAGE / "decoder" / "layer.c",
    _PACKAGE / "linear" / "int8.c",
    _PACKAGE / "linear" / "packed.c",
    _PACKAGE / "lora" / "grouped.c",
    _PACKAGE / "native" / "rows.c",
    _PACKAGE / "sampling" / "logprobs.c",
)
# Products are fused with sums only where the source says so: see vectors.h.
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-ffp-contract=off", "-fno-math-errno")
_THREADS = ("-fopenmp",)
_BUILD_SECONDS = 120.0


class BuildError(Exception):
    """There is no compiler, or it cannot build the kernels. Callers then do without."""


def load() -> ctypes.CDLL:
    """The kernels' shared library, from the cache or built now.

    Raises:
        BuildError: it cannot be built here.
    """
    folder = _cache_folder()
    if folder is not None:
        path = folder / f"{_key()}.so"
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError as error:
                _LOG.warning("%s cannot be loaded and is built anew: %s", path, error)
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as work:
                built, loaded = _build(Path(work))
                built.replace(path)
                return loaded
        except OSError as error:
            _LOG.debug("no native kernels kept in %s: %s", folder, error)
    try:
        with tempfile.TemporaryDirectory(prefix="blockkernels-") as work:
            return _build(Path(work))[1]  # the mapping outlives the file
    except OSError as error:
        raise BuildError(f"no folder to build in: {error}") from error


def _cache_folder() -> Path | None:
    """A folder that only this user can write to, or None: code is loaded from it."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "blockzoo" / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError) as error:
        _LOG.debug("no cache folder for native kernels: %s", error)
        return None
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        _LOG.warning("others can write to %s: native kernels are not kept there", folder)
        return None
    return folder


def _key() -> str:
    """Digest of sources, flags and the processor's features."""
    digest = hashlib.blake2b(digest_size=16)
    parts = [path.read_bytes() for path in (*_SOURCES, *sorted(_HEADERS.glob("*.h")))]
    parts += [" ".join((*_FLAGS, *_THREADS)).encode(), _processor().encode()]
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _processor() -> str:
    """Machine type and features; what `-march=native` stands for depends on them."""
    wanted = ("flags", "Features", "model name", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    first = {line.split(":")[0].strip(): line for line in reversed(lines) if line.startswith(wanted)}
    return "\n".join([platform.machine(), platform.processor(), *sorted(first.values())])


def _build(work: Path) -> tuple[Path, ctypes.CDLL]:
    """Compile with the best flags that work.

    Threads come from the OpenMP library that torch has loaded (a second one would compete with it for the
    cores), so the kernels are not linked with any; where torch has none that fits, they run on one thread.
    """
    compiler = _compiler()
    error: Exception = BuildError("no flags to try")
    for flags in _flag_choices():
        try:
            _compile([*compiler, *_FLAGS, *flags, f"-I{_HEADERS}", "-c"], work)
            built = work / "kernels.so"
            _run([*compiler, "-shared", *(f"{path.stem}.o" for path in _SOURCES), "-o", str(built)], work)
            return built, ctypes.CDLL(str(built))
        except (BuildError, OSError) as failure:
            _LOG.debug("native kernels with %s: %s", flags, failure)
            error = failure
    raise BuildError(str(error)) from error


def _compile(command: list[str], work: Path) -> None:
    """All sources, side by side: somebody waits for this."""
    with ThreadPoolExecutor(len(_SOURCES)) as pool:
        for done in [pool.submit(_run, [*command, str(source)], work) for source in _SOURCES]:
            done.result()


def _flag_choices() -> Iterator[tuple[str, ...]]:
    for threads in (_THREADS, ()):
        for processor in (("-march=native",), ("-mcpu=native",), ()):
            yield (*processor, *threads)


def _compiler() -> list[str]:
    chosen = os.environ.get("CC")
    if chosen:
        return shlex.split(chosen)
    for name in ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return [found]
    raise BuildError("no C compiler (cc, gcc or clang) on the path")


def _run(command: list[str], work: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=work, capture_output=True, text=True, timeout=_BUILD_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise BuildError(f"{command[0]} failed: {done.stderr.strip()[-2000:]}")
