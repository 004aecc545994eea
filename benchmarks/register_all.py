"""register-300: 300 LoRA adapters, by one `register --all` over 300 single commands of an earlier commit.

The adapters are of rank 16 on all linear modules of SmolLM2, bfloat16, 9.8 MB each, in the page cache. Each
sample is the wall time for an adapter: of one command for all of them, and of a fifth of the single commands.
Both zoos hold the base before. The row files-300 is how many files the two zoos have in the end.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

import torch
from builds import Build, open_builds
from harness import CACHE, Row, check
from program import Bar, Program, Say, Scale
from safetensors.torch import save_file
from served import ALL_LINEAR, MODEL, fresh_folder

from blockzoo.zoo import Zoo

BASE = "125b15b"
"""The commit before this step."""
VARIANTS, RANK, PARTS = 300, 16, 5
FILES = 3000


async def measure(scale: Scale, say: Say) -> list[Row]:
    """All at once with this build, and one after the other with the earlier one, in turns."""
    count = 6 if scale.quick else VARIANTS
    source = CACHE / "bench" / f"adapters-{count}"
    _write_adapters(source, count, say)
    names = sorted(path.name for path in source.iterdir() if path.is_dir())
    ours, theirs = fresh_folder("register-all-ours"), fresh_folder("register-all-base")
    with open_builds(BASE) as (here, base):
        _command(base, theirs, str(MODEL), "--name", "base")
        together, single = [], []
        for part in range(PARTS):
            shutil.rmtree(ours, ignore_errors=True)
            _command(here, ours, str(MODEL), "--name", "base")
            together.append(_command(here, ours, "--all", str(source), "--base", "base") / count)
            share = names[part::PARTS]
            seconds = [_command(base, theirs, str(source / n), "--name", n, "--base", "base") for n in share]
            single.append(sum(seconds) / len(share))
            say(f"part {part + 1}/{PARTS}: {together[-1]:.3f} s and {single[-1]:.3f} s an adapter")
    zoo = Zoo.open(ours)
    check([row.name for row in zoo.ls()] == ["base", *names], "not every adapter is registered")
    check(not zoo.verify().problems, "verify finds damage in what was just registered")
    check(_chains(ours) == _chains(theirs), "the two builds made other chains of the same adapters")
    files = [sum(path.is_file() for path in folder.rglob("*")) for folder in (ours, theirs)]
    fresh_folder("register-all-ours")
    fresh_folder("register-all-base")
    case = f"{count} LoRA adapters of rank {RANK} on all linear modules of SmolLM2"
    command = "python benchmarks/run.py --only register-300"
    peer = f"single commands of {BASE}"
    return [
        Row("register-300", f"register --all of {case}", "s/adapter", command, together, single, peer),
        Row(
            "files-300",
            f"files of a zoo of {case}",
            "files",
            command,
            [files[0]] * PARTS,
            [files[1]] * PARTS,
            peer,
        ),
    ]


def _command(build: Build, zoo: Path, *words: str) -> float:
    command = [str(build.python), "-m", "blockserve.cli", "register", *words, "--zoo", str(zoo)]
    started = time.perf_counter()
    subprocess.run(command, check=True, env=build.environment(), stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def _chains(folder: Path) -> dict[str, str]:
    zoo = Zoo.open(folder)
    return {record.name: record.chain for record in zoo.variants()}


def _write_adapters(folder: Path, count: int, say: Say) -> None:
    """Make them once."""
    whole = folder / "whole"
    if whole.exists():
        return
    say(f"making {count} adapters, once")
    shutil.rmtree(folder, ignore_errors=True)
    config = json.loads((MODEL / "config.json").read_text())
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    rows = {"k_proj": narrow, "v_proj": narrow, "gate_proj": wide, "up_proj": wide}
    columns = {"down_proj": wide}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ALL_LINEAR,
        "base_model_name_or_path": "base",
    }
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        tensors = {}
        for layer in range(config["num_hidden_layers"]):
            for module in ALL_LINEAR:
                part = "self_attn" if module in {"q_proj", "k_proj", "v_proj", "o_proj"} else "mlp"
                prefix = f"base_model.model.model.layers.{layer}.{part}.{module}"
                for side, shape in (
                    ("A", (RANK, columns.get(module, hidden))),
                    ("B", (rows.get(module, hidden), RANK)),
                ):
                    values = torch.randn(shape, generator=generator) / 50
                    tensors[f"{prefix}.lora_{side}.weight"] = values.to(torch.bfloat16)
        adapter = folder / f"bot-{number:03}"
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
        save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    whole.touch()


PROGRAM = Program(
    "register-300",
    "registering 300 adapters at once",
    measure,
    (
        Bar("register-300", 0.05, 0.03, at_most=True),
        Bar("files-300", FILES, at_most=True, per_peer=False),
    ),
)
BENCHMARK = PROGRAM.benchmark

if __name__ == "__main__":
    sys.exit(PROGRAM.main())
