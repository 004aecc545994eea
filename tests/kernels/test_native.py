"""Building the C kernels: the cache, two builders at once, and life without a compiler."""

import multiprocessing
import multiprocessing.process
import os
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from blockkernels.native import build

Started = tuple[multiprocessing.process.BaseProcess, Path]
Start = Callable[..., Started]
"""Has a process with torch and none of our modules load the kernels, use one and say what computed."""

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

PROGRAM = """
import atexit, logging, os, sys
os.environ.clear()
os.environ.update({environment!r})
for descriptor, name in ((1, "out"), (2, "err")):
    os.dup2(os.open({folder!r} + "/" + name, os.O_WRONLY | os.O_CREAT), descriptor)
logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
import torch
from blockkernels.native import library
from blockkernels.rms_norm import rms_norm, rms_norm_reference
x, weight = torch.randn(3, 20), torch.randn(20)
torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))
print("native" if library() else "torch", flush=True)
atexit._run_exitfuncs()
"""
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["torch"])


HASTY_COMPILER = """#!/bin/sh
for last in "$@"; do :; done
object=$(basename "$last" .c).o
kept={folder}/$(printf %s "$*" | cksum | tr ' ' -).o
case " $* " in
*" -c "*)
    if [ -e "$kept" ]; then exec cp "$kept" "$object"; fi
    cc "$@" -O0 && cp "$object" "$kept.$$" && mv "$kept.$$" "$kept" ;;
*)
    exec cc "$@" -O0 ;;
esac
"""
"""Builds in a fifth of the time, and from the objects that it has kept; what is tested is the building."""


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    script = tmp_path_factory.mktemp("compiler") / "hasty-cc"
    script.write_text(HASTY_COMPILER.replace("{folder}", str(script.parent)))
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    def start(cache: Path, **environment: str) -> Started:
        folder = tmp_path_factory.mktemp("program")
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache), **environment}
        script = folder / "program.py"
        script.write_text(PROGRAM.format(environment=environment, folder=str(folder)))
        process = processes.Process(target=runpy.run_path, args=(str(script),))
        process.start()
        return process, folder

    return start


def finish(started: Started) -> tuple[str, str]:
    process, folder = started
    process.join(120)
    out, err = ((folder / name).read_text() for name in ("out", "err"))
    assert process.exitcode == 0, err
    return out.strip(), err


def libraries(cache: Path) -> list[Path]:
    return list((cache / "blockzoo" / "native").iterdir())


@needs_compiler
def test_two_builders_at_once_and_a_third_that_reads(start: Start, tmp_path: Path, compiler: str) -> None:
    pair = [start(tmp_path, CC=compiler), start(tmp_path, CC=compiler)]
    assert [finish(process)[0] for process in pair] == ["native", "native"]
    (made,) = libraries(tmp_path)  # nothing half-built stays behind
    written = made.stat().st_mtime_ns
    assert finish(start(tmp_path, CC="false"))[0] == "native"  # no compiler is needed any more
    assert made.stat().st_mtime_ns == written


def test_without_a_compiler_torch_computes(start: Start, tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    out, err = finish(start(tmp_path / "cache", PATH=str(empty), CC=""))
    assert out == "torch"
    assert err.count("\n") == 1
    assert "no C compiler" in err


def test_a_compiler_that_fails_is_no_fault(start: Start, tmp_path: Path) -> None:
    out, err = finish(start(tmp_path, CC="false"))
    assert out == "torch"
    assert "false failed" in err


def test_the_kernels_can_be_switched_off(start: Start, tmp_path: Path) -> None:
    assert finish(start(tmp_path, BLOCKZOO_NATIVE_KERNELS="off"))[0] == "torch"
    assert not (tmp_path / "blockzoo").exists()


@needs_compiler
def test_without_a_cache_folder_they_are_built_elsewhere(start: Start, tmp_path: Path) -> None:
    """With the compiler and the flags that users have, as everybody's first start."""
    file = tmp_path / "file"
    file.touch()
    assert finish(start(file))[0] == "native"


@needs_compiler
def test_a_damaged_library_is_built_anew(start: Start, tmp_path: Path, compiler: str) -> None:
    assert finish(start(tmp_path, CC=compiler))[0] == "native"
    (made,) = libraries(tmp_path)
    made.write_bytes(b"no library")
    out, err = finish(start(tmp_path, CC=compiler))
    assert out == "native"
    assert "built anew" in err
    assert made.stat().st_size > 10_000


@needs_compiler
def test_a_folder_that_others_can_write_to_is_not_trusted(
    start: Start, tmp_path: Path, compiler: str
) -> None:
    folder = tmp_path / "blockzoo" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    out, err = finish(start(tmp_path, CC=compiler))
    assert out == "native"
    assert "others can write" in err
    assert libraries(tmp_path) == []


def test_the_key_follows_sources_and_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key = build._key()
    assert build._key() == key
    monkeypatch.setattr(build, "_processor", lambda: "another")
    assert build._key() != key
    monkeypatch.undo()
    changed = tmp_path / "paged.c"
    changed.write_bytes(build._SOURCES[0].read_bytes() + b"\n")
    monkeypatch.setattr(build, "_SOURCES", (changed, *build._SOURCES[1:]))
    assert build._key() != key
