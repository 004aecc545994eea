"""ls-300: `blockzoo ls` of a zoo with a base and 300 LoRA adapters, over that of an earlier commit.

Both builds are asked in turns, each sample the wall time of one process, the zoo in the page cache. Each has
a zoo of its own with the same contents, as the earlier build cannot read what this one packs. The row
ls-300 finds what the command before it has kept of the chains, as every command but the first does;
ls-300-first is the first command on a machine, or after the cache folder was emptied. What is listed is the
same.

The base has SmolLM2's layers and tensors at a width of 16: `ls` reads manifests, whatever the tensors hold.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

from builds import Build, open_builds
from harness import CACHE, Row, check, interleave
from program import Bar, Program, Say, Scale
from safetensors.numpy import save_file

from blockzoo.canonical import canonical_json
from blockzoo.zoo import Zoo

BASE = "125b15b"
"""The commit before this step."""
VARIANTS, LAYERS, HIDDEN, WIDE, RANK = 300, 30, 16, 24, 16
MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}


async def measure(scale: Scale, say: Say) -> list[Row]:
    """List in turns with the earlier build."""
    count = 12 if scale.quick else VARIANTS
    # The earlier build knows the first format only.
    folder, former = (CACHE / "bench" / f"ls-zoo-{count}-{number}" for number in ("new", "first"))
    _fill(folder, count, say)
    _fill(former, count, say, is_first_format=True)
    kept = CACHE / "bench" / "ls-cache"
    with open_builds(BASE) as (ours, base):
        check(_listed(ours, folder, kept) == _listed(base, former, kept), "the builds list other variants")

        def first() -> float:
            shutil.rmtree(kept, ignore_errors=True)
            return _seconds(ours, folder, kept)

        samples = interleave(
            first,
            lambda: _seconds(ours, folder, kept),
            lambda: _seconds(base, former, kept),
            runs=scale.runs,
            say=say,
        )
    return [
        _row(name, count, mine, samples[2])
        for name, mine in (("ls-300", samples[1]), ("ls-300-first", samples[0]))
    ]


def _row(name: str, count: int, ours: list[float], peer: list[float]) -> Row:
    return Row(
        id=name,
        case=f"blockzoo ls, a base and {count} LoRA adapters on all linear modules of {LAYERS} layers",
        unit="s",
        command="python benchmarks/run.py --only ls-300",
        ours=ours,
        peer=peer,
        peer_name=f"the same at {BASE}",
    )


def _command(build: Build, folder: Path, *words: str) -> list[str]:
    return [str(build.python), "-m", "blockserve.cli", "ls", "--zoo", str(folder), *words]


def _environment(build: Build, kept: Path) -> dict[str, str]:
    return {**build.environment(), "XDG_CACHE_HOME": str(kept)}


def _seconds(build: Build, folder: Path, kept: Path) -> float:
    command, environment = _command(build, folder), _environment(build, kept)
    started = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def _listed(build: Build, folder: Path, kept: Path) -> list[dict[str, Any]]:
    """What a build says of each variant, as far as both say it."""
    command, environment = _command(build, folder, "--json"), _environment(build, kept)
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout)["variants"]
    others = ("private_stored_bytes", "registered_at")
    return [{key: value for key, value in row.items() if key not in others} for row in rows]


def _fill(folder: Path, count: int, say: Say, *, is_first_format: bool = False) -> None:
    """Register once; a zoo that was begun and not filled is made again."""
    whole = folder / "whole"
    if whole.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    say(f"registering {count} adapters, once")
    if is_first_format:
        formats = dict.fromkeys(("format", "min_reader", "min_writer"), 1)
        folder.mkdir(parents=True)
        (folder / "zoo.json").write_bytes(canonical_json({**formats, "created_by": "blockzoo 0.1.0"}))
    zoo = Zoo.open(folder, create=True)
    source = folder.with_name("ls-source")
    generator = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (40, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{module}.weight": shape for module, shape in MODULES.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"{prefix}{norm}.weight": (HIDDEN,) for norm in norms}
    _write(source, "config.json", CONFIG, "model.safetensors", _random(generator, shapes))
    zoo.register(source, name="base")
    adapter = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": "all-linear"}
    matrices = {}
    for layer in range(LAYERS):
        for module, (rows, columns) in MODULES.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            matrices[f"{prefix}.lora_A.weight"] = (RANK, columns)
            matrices[f"{prefix}.lora_B.weight"] = (rows, RANK)
    settings = {**adapter, "base_model_name_or_path": "base", "task_type": "CAUSAL_LM"}
    for number in range(count):
        weights = _random(generator, matrices)
        _write(source, "adapter_config.json", settings, "adapter_model.safetensors", weights)
        zoo.register(source, name=f"bot-{number:03}", base="base")
    shutil.rmtree(source)
    whole.touch()


def _random(generator: np.random.Generator, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    return {
        name: generator.normal(scale=0.1, size=shape).astype(np.float32) for name, shape in shapes.items()
    }


def _write(folder: Path, config: str, values: dict[str, Any], weights: str, tensors: dict[str, Any]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / config).write_text(json.dumps(values))
    save_file(tensors, folder / weights, {"format": "pt"})


PROGRAM = Program(
    "ls-300", "listing a zoo of 300 adapters", measure, (Bar("ls-300", 0.35, 0.2, at_most=True),)
)
BENCHMARK = PROGRAM.benchmark

if __name__ == "__main__":
    sys.exit(PROGRAM.main())
