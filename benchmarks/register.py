"""register: bytes per second of registering a checkpoint, over a durable copy and one hash of it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3
from harness import Benchmark, Row, check, interleave
from served import MODEL, fresh_folder

from blockzoo.zoo import Zoo

WEIGHTS = MODEL / "model.safetensors"


def run(say: Callable[[str], None]) -> list[Row]:
    """Measure, and verify what was stored."""
    size = WEIGHTS.stat().st_size
    WEIGHTS.read_bytes()  # both begin with the source in the page cache
    ours, peer = interleave(lambda: size / _register(), lambda: size / _copy_and_hash(), say=say)
    return [
        Row(
            id="register-smollm2",
            case="Zoo.register of SmolLM2 bf16 into a new local zoo, synced to disk; source cached",
            unit="bytes/s",
            command="python benchmarks/run.py --only register",
            ours=ours,
            peer=peer,
            peer_name="cp + fsync + one BLAKE3 pass (all cores) of the same file",
        )
    ]


def _register() -> float:
    folder = fresh_folder("register-zoo")
    zoo = Zoo.open(folder, create=True)
    os.sync()  # what the sample before left unwritten is not this one's to wait for
    started = time.perf_counter()
    zoo.register(MODEL, name="base")
    seconds = time.perf_counter() - started
    check(not zoo.verify().problems, "verify finds damage in what was just registered")
    fresh_folder("register-zoo")
    return seconds


def _copy_and_hash() -> float:
    target = fresh_folder("register-copy")
    target.mkdir(parents=True)
    copy = target / "copy"
    os.sync()
    started = time.perf_counter()
    subprocess.run(["cp", str(WEIGHTS), str(copy)], check=True)
    with copy.open("rb") as file:
        os.fsync(file.fileno())
    digest = _hash(copy)
    seconds = time.perf_counter() - started
    check(digest == _hash(WEIGHTS), "the copy differs from its source")
    fresh_folder("register-copy")
    return seconds


def _hash(path: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


BENCHMARK = Benchmark(
    "register", "registering a checkpoint against copying and hashing it", "at least 0.7", run
)
