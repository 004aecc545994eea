"""Make the tiny zoo that every later version must open.

Each release that changes what is written adds one beside the old ones and leaves those alone:

    python tests/blockzoo/data/make_tiny_zoo.py tests/blockzoo/data/tiny-zoo
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from blockzoo.folders.outline import Outline
from blockzoo.registering import job as register_job
from blockzoo.store import blobs
from blockzoo.store.codec import ULP, XOR
from blockzoo.zoo import Zoo

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

import folders


def nudged(items: folders.Tensors, every: int) -> folders.Tensors:
    """Return the tensors with every n-th element one step further from zero, as fine-tuning leaves them."""
    changed = {}
    for name, item in items.items():
        bits = np.frombuffer(item.data, "<u2").copy()
        bits[::every] += 1
        changed[name] = folders.Raw(item.dtype, item.shape, bits.tobytes())
    return changed


def provenance(self: register_job.RegisterJob, base: Outline | None) -> dict[str, str]:
    """Say the same whenever and wherever the zoo is made."""
    facts = {"source": f"tests/{self.name}", "registered_at": "2026-11-23T00:00:00+00:00"}
    return facts if base is None else {**facts, "base": base.ref}


def make(target: Path, work: Path) -> None:
    """Register a checkpoint, two full fine-tunes with either codec, an adapter, a rollback and a removal."""
    zoo = Zoo.open(target, create=True)
    values = folders.config(hidden_size=32, intermediate_size=48)
    items = folders.tensors(values)
    base = folders.write_checkpoint(work / "base", values, items, shards=2)
    zoo.register(base, name="base")
    for name, codec, every in [("tuned-ulp", ULP, 7), ("tuned-xor", XOR, 11)]:
        blobs.DELTA_CODEC = codec
        tuned = folders.write_checkpoint(work / name, values, nudged(items, every))
        zoo.register(tuned, name=name, base="base")
    adapter = folders.write_adapter(work / "adapter", items=folders.adapters.tensors(values))
    zoo.register(adapter, name="adapter", base="base")
    zoo.register(
        folders.write_checkpoint(work / "other", values, nudged(items, 13)), name="moving", base="base"
    )
    zoo.register(base, name="moving")
    zoo.rollback("moving")
    zoo.register(base, name="removed")
    zoo.rm("removed")


if __name__ == "__main__":
    register_job.RegisterJob.provenance = provenance
    destination = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        make(destination, Path(folder))
    shutil.rmtree(destination / "tmp", ignore_errors=True)
