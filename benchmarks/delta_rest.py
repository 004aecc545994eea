"""delta-rest: bytes stored for a full fine-tune over the bytes of its checkpoint.

Two fine-tunes of all layers, 100 steps of AdamW at 2e-5 (`scripts/train_full.py`): one with weights and
moments in bf16 throughout, one with an fp32 master copy rounded to bf16 at the end. Rounding swallows most
updates of the first, so it stores far less; the second is the harder case. The base's weights were
dequantised from 4 bits, but both fine-tunes are trained in floating point, and only differences are stored.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from harness import CACHE, ROOT, RUNS, Benchmark, Row, check
from safetensors.torch import load_file
from served import MODEL, fresh_folder

from blockzoo.zoo import Zoo

STEPS = 100
MASTERS = {
    "bf16": "weights, gradients and moments in bf16, no master copy",
    "fp32": "fp32 master copy, bf16 autocast, rounded to bf16 when saved",
}


def run(say: Callable[[str], None]) -> list[Row]:
    """Train where needed, register against the base, export and compare."""
    rows = []
    for master, how in MASTERS.items():
        folder = trained(master, say)
        stored, size = zip(*(_register(folder) for _ in range(RUNS)), strict=True)
        say(f"{master} master: {stored[0] / size[0]:.4f} of the checkpoint; export identical")
        rows.append(
            Row(
                id=f"delta-rest-{master}",
                case=f"SmolLM2, all layers trained for {STEPS} steps, AdamW 2e-5, 4 x 256 tokens; {how}",
                unit="bytes",
                command="python benchmarks/run.py --only delta-rest",
                ours=list(stored),
                peer=list(size),
                peer_name="the checkpoint's tensor bytes",
            )
        )
    return rows


def trained(master: str, say: Callable[[str], None]) -> Path:
    """The fine-tuned checkpoint, trained now unless it is cached."""
    folder = CACHE / f"full-{master}"
    if not (folder / "training.json").exists():
        say(f"training all layers ({master} master copy, {STEPS} steps, about 6 minutes on two idle cores)")
        script = ROOT / "scripts" / "train_full.py"
        options = ["--model", MODEL, "--out", folder, "--steps", STEPS, "--master", master]
        command = [sys.executable, script, *options, "--texts", CACHE / "texts"]
        subprocess.run([str(part) for part in command], check=True)
    return folder


def _register(folder: Path) -> tuple[float, float]:
    zoo = Zoo.open(fresh_folder("delta-zoo"), create=True)
    zoo.register(MODEL, name="base")
    before = zoo.du().stored_bytes
    result = zoo.register(folder, name="tuned", base="base")
    stored = zoo.du().stored_bytes - before
    exported = fresh_folder("delta-export")
    zoo.export("tuned", exported)
    check(_equal(exported, folder), "the exported tensors differ from the registered ones")
    fresh_folder("delta-export")
    fresh_folder("delta-zoo")
    return float(stored), float(result.num_bytes)


def _equal(a: Path, b: Path) -> bool:
    """Whether two one-file bf16 checkpoints hold the same tensors, bit by bit."""
    left, right = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return left.keys() == right.keys() and all(
        torch.equal(left[name].view(torch.int16), right[name].view(torch.int16)) for name in left
    )


BENCHMARK = Benchmark(
    "delta-rest", "bytes stored for a full fine-tune over its checkpoint", "at most 0.6, stretch 0.45", run
)
