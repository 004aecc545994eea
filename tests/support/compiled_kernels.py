"""Compiles the Triton kernels for GPUs that are not here, and reads what the compilers made of them.

`python tests/support/compiled_kernels.py [--only NAME] [--targets sm_90,...] [--write]` prints one line for
each kernel and target; --write replaces the committed table. No GPU, driver or toolkit is needed: the wheel
of triton has the compilers. What is compiled is what `blockkernels` launches for models of three sizes. Run
it in a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from blockkernels.attention.gpu import TritonAttention
from blockkernels.gated_mlp.gpu import gated_activation_gpu
from blockkernels.launching import Launch, watched
from blockkernels.linear import Int8Weight
from blockkernels.linear.gpu import TritonInt8Linear, TritonLinear
from blockkernels.lora import LoraBank, TokenRun, group_rows
from blockkernels.lora.gpu import add_tables, lora_tables
from blockkernels.rms_norm.gpu import add_norm
from blockkernels.rotary.gpu import place_heads

TABLE = Path(__file__).resolve().parent.parent / "kernels" / "compiled_kernels.json"
TARGETS = ("sm_80", "sm_90", "gfx942")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MOST_SHARED = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}
"""Bytes of shared memory that a program can have."""
CPU, BF16 = torch.device("cpu"), torch.bfloat16


@dataclass(frozen=True)
class Model:
    """Sizes of a model's layers."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    wide: int


MODELS = (
    # A head of 256 dimensions, as in Gemma.
    Model("9b", 3584, 16, 8, 256, 14336),
    Model("135m", 576, 9, 3, 64, 1536),
    Model("1b", 2048, 32, 8, 64, 8192),
    Model("8b", 4096, 32, 8, 128, 14336),
)


def launches() -> Iterator[tuple[str, Launch]]:
    """What is compiled, each with a name."""
    for model in MODELS:
        for name, run in _operations(model):
            seen: list[Launch] = []

            def note(launch: Launch, seen: list[Launch] = seen) -> bool:
                seen.append(launch)
                return False

            with watched(note):
                run()
            for launch in seen:
                yield f"{model.name} {name}: {launch.kernel.__name__.removesuffix('_kernel')}", launch


def _operations(model: Model) -> Iterator[tuple[str, Callable[[], object]]]:
    hidden, dim = model.hidden, model.head_dim
    projected = (model.heads + 2 * model.kv_heads) * dim

    def rows(tokens: int, size: int = hidden) -> torch.Tensor:
        return torch.empty(tokens, size, dtype=BF16)

    def linear(tokens: int, inner: int, outer: int) -> Callable[[], object]:
        return lambda: TritonLinear(rows(outer, inner))(rows(tokens, inner))

    def int8(tokens: int, inner: int, outer: int) -> Callable[[], object]:
        weight = Int8Weight(torch.empty(outer, inner, dtype=torch.int8), torch.empty(outer))
        return lambda: TritonInt8Linear(weight)(rows(tokens, inner))

    for tokens in (8, 64, 512):
        yield f"gate_up, {tokens} tokens", linear(tokens, hidden, 2 * model.wide)
    yield "down, 8 tokens", linear(8, model.wide, hidden)
    for tokens in (8, 512):
        yield f"int8 gate_up, {tokens} tokens", int8(tokens, hidden, 2 * model.wide)
    yield "int8 down, 8 tokens", int8(8, model.wide, hidden)
    norm = torch.empty(hidden, dtype=BF16)
    yield "sum and norm", lambda: add_norm(rows(8), rows(8), following=norm, eps=1e-5)
    yield "gated", lambda: gated_activation_gpu(rows(8, 2 * model.wide), "silu")
    pages = torch.empty(2, 4096, model.kv_heads, dim, dtype=BF16)
    angles = torch.empty(8, 1, dim // 2, dtype=BF16)
    yield (
        "place",
        lambda: place_heads(
            rows(8, projected),
            angles,
            angles,
            torch.zeros(8, dtype=torch.int64),
            *pages,
            num_heads=model.heads,
        ),
    )
    batch = TritonAttention(*pages, 16, [np.zeros((1, 100), np.int64)] * 2, [600, 64], [1, 64])
    query = torch.empty(65, model.heads, dim, dtype=BF16)
    yield "attention", lambda: batch.attend(query, layer=0, scale=0.1, window=None, softcap=None)
    for rank in (16, 128):
        bank = LoraBank(hidden, projected, BF16, CPU)
        row = bank.add(rows(rank), torch.empty(projected, rank, dtype=BF16), 1.0)
        grouped = group_rows([TokenRun(0, 8, 0)], [row], bank.down)
        (tables,) = lora_tables([[(bank, grouped, 0)]], CPU)
        yield f"lora rank {rank}", partial(add_tables, rows(8, projected), rows(8), tables)


def source_of(launch: Launch) -> ASTSource:
    """The kernel with the types and the divisibilities that a launch finds out."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, (parameter, value) in enumerate(zip(launch.kernel.params, launch.arguments, strict=False)):
        name = parameter.name
        if value is None or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            types[name] = "*" + _TYPES[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                attributes[place,] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            types[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[place,] = [["tt.divisibility", 16]]
        else:
            types[name] = "fp32"
    signature = {name: types.get(name, "constexpr") for name in launch.kernel.arg_names}
    return ASTSource(launch.kernel, signature, constants, attributes)


_TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}


def compiled(launch: Launch, target: str) -> dict[str, int]:
    """What the compiler made: registers of a thread, bytes, instructions of each kind."""
    cuda = target.startswith("sm_")
    where = GPUTarget("cuda", int(target[3:]), 32) if cuda else GPUTarget("hip", target, 64)
    options = {"num_warps": launch.warps, "enable_fp_fusion": launch.contracts}
    kernel = triton.compile(source_of(launch), target=where, options=options)
    shared = int(kernel.metadata.shared)
    return {"shared": shared, **(_nvidia(kernel.asm["cubin"]) if cuda else _amd(kernel.asm["amdgcn"]))}


def _nvidia(code: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        listing = _tool("nvdisasm", "-c", file.name)
    found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", listing, re.M)
    counts = collections.Counter(found)

    def total(*starts: str, width: str = "") -> int:
        return sum(n for name, n in counts.items() if name.split(".")[0] in starts and width in name)

    (registers,) = re.findall(r"REG:(\d+)", usage)
    return {
        "registers": int(registers),
        "spills": total("LDL", "STL"),
        "tensor_core": total("HMMA", "IMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA"),
        "loads": total("LDG", "LDGSTS"),
        "loads_16_bytes": total("LDG", "LDGSTS", width=".128"),
    }


def _amd(listing: str) -> dict[str, int]:
    def value(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", listing)
        assert found is not None
        return int(found.group(1))

    def total(pattern: str) -> int:
        return len(re.findall(rf"^\s+{pattern}", listing, re.M))

    return {
        "registers": value("vgpr_count"),
        "spills": value("vgpr_spill_count") + value("sgpr_spill_count"),
        "tensor_core": total("v_mfma"),
        "loads": total("(?:global|buffer)_load"),
        "loads_16_bytes": total("(?:global|buffer)_load_dwordx4"),
    }


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def table(targets: tuple[str, ...], only: str = "") -> dict[str, dict[str, dict[str, int]]]:
    """What was made of every kernel, by its name and target; those that a model has twice are there once."""
    rows: dict[str, dict[str, dict[str, int]]] = {}
    seen: dict[str, str] = {}
    for name, launch in launches():
        if only not in name:
            continue
        key = repr((name.split()[0], launch.kernel.__name__, source_of(launch).hash(), launch.warps))
        if seen.setdefault(key, name) != name:
            continue
        rows[name] = {target: compiled(launch, target) for target in targets}
        for target, row in rows[name].items():
            print(
                f"{name:44} {target:7} " + " ".join(f"{key} {value}" for key, value in row.items()),
                flush=True,
            )
    return rows


def wrong(rows: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """What no kernel may have."""
    found = []
    for name, targets in rows.items():
        for target, row in targets.items():
            if row["spills"]:
                found.append(f"{name}, {target}: {row['spills']} spills")
            if row["shared"] > _MOST_SHARED[target]:
                found.append(f"{name}, {target}: {row['shared']} bytes of shared memory")
            if any(kind in name for kind in (": linear", ": int8", ": attend", ": shrink", ": expand")):
                if not row["tensor_core"]:
                    found.append(f"{name}, {target}: no tensor cores")
                if not row["loads_16_bytes"]:
                    found.append(f"{name}, {target}: no loads of 16 bytes")
    return found


def main() -> int:
    """Exit status 1 where a kernel is not as it should be."""
    assert os.environ.get("TRITON_INTERPRET", "0") in ("", "0"), "unset TRITON_INTERPRET"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--only", default="", help="kernels with this in their name")
    parser.add_argument("--write", action="store_true", help="replace the committed table")
    parser.add_argument("--json", type=Path, help="write what was found there")
    args = parser.parse_args()
    rows = table(tuple(args.targets.split(",")), args.only)
    for path in [path for path in (args.json, TABLE if args.write else None) if path is not None]:
        path.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1) + "\n")
    found = wrong(rows)
    print(*found, f"{len(rows)} kernels, {len(found)} wrong", sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
