"""Tiny checkpoint and adapter folders made with numpy alone, byte by byte.

Names and shapes are written down here a second time on purpose: they are what
Hugging Face checkpoints hold, not what `blockzoo.families` thinks they hold.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, WIDE, HEADS, KV_HEADS, VOCAB, LAYERS = 16, 24, 4, 2, 40, 3
BITS = {"BF16": 16, "F16": 16, "F32": 32, "F64": 64, "I64": 64, "U8": 8}
_GEMMA = {
    "hidden_act": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 8,
    "query_pre_attn_scalar": 9,
    "sliding_window": 32,
    "attention_bias": False,
    "final_logit_softcapping": 12.0,
}
_OWN: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 32},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 6},
    "Gemma2ForCausalLM": {**_GEMMA, "attn_logit_softcapping": 11.0},
    "Gemma3ForCausalLM": {
        **_GEMMA,
        "model_type": "gemma3_text",
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
        },
    },
    "Glm4ForCausalLM": {"head_dim": 8, "partial_rotary_factor": 0.75, "attention_bias": False},
    "GraniteForCausalLM": {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.25,
        "residual_multiplier": 0.22,
        "logits_scaling": 8,
    },
    "Olmo2ForCausalLM": {},
    "Phi3ForCausalLM": {"partial_rotary_factor": 0.5, "sliding_window": 32},
    "SmolLM3ForCausalLM": {"no_rope_layer_interval": 2},
}
"""What a config.json of each architecture has of its own."""
ARCHITECTURES = tuple(_OWN)
_NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Raw:
    """A tensor as raw bits."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


Tensors = dict[str, Raw]


def config(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    """A config.json of the architecture; None as a value removes the field."""
    values: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-05,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
    }
    values.update(_OWN[architecture], **changes)
    return {key: value for key, value in values.items() if value is not None}


def shapes(values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that transformers saves for this config."""
    architecture = values["architectures"][0]
    hidden, wide, vocab = values["hidden_size"], values["intermediate_size"], values["vocab_size"]
    head_dim = values.get("head_dim") or hidden // values["num_attention_heads"]
    query, kv = values["num_attention_heads"] * head_dim, values["num_key_value_heads"] * head_dim
    bias = values.get("attention_bias", False)
    qkv_bias = bias or architecture == "Qwen2ForCausalLM"
    mlp_bias = values.get("mlp_bias", False)
    norms = {
        "Gemma2ForCausalLM": (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        "Gemma3ForCausalLM": (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        "Glm4ForCausalLM": (*_NORMS, "post_self_attn_layernorm", "post_mlp_layernorm"),
        "Olmo2ForCausalLM": ("post_attention_layernorm", "post_feedforward_layernorm"),
    }.get(architecture, _NORMS)
    whole = {"Olmo2ForCausalLM": (query, kv)}
    by_head = dict.fromkeys(("Qwen3ForCausalLM", "Gemma3ForCausalLM"), (head_dim, head_dim))
    qk_norms = {**whole, **by_head}.get(architecture)
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(values["num_hidden_layers"]):
        linears = {
            "self_attn.q_proj": (query, hidden, qkv_bias),
            "self_attn.k_proj": (kv, hidden, qkv_bias),
            "self_attn.v_proj": (kv, hidden, qkv_bias),
            "self_attn.o_proj": (hidden, query, bias and architecture != "Glm4ForCausalLM"),
            "mlp.gate_proj": (wide, hidden, mlp_bias),
            "mlp.up_proj": (wide, hidden, mlp_bias),
            "mlp.down_proj": (hidden, wide, mlp_bias),
        }
        if architecture == "Phi3ForCausalLM":
            for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                del linears[name]
            linears["self_attn.qkv_proj"] = (query + 2 * kv, hidden, False)
        if architecture in ("Phi3ForCausalLM", "Glm4ForCausalLM"):
            del linears["mlp.gate_proj"], linears["mlp.up_proj"]
            linears["mlp.gate_up_proj"] = (2 * wide, hidden, False)
        prefix = f"model.layers.{index}."
        for name, (rows, columns, has_bias) in linears.items():
            result[f"{prefix}{name}.weight"] = (rows, columns)
            if has_bias:
                result[f"{prefix}{name}.bias"] = (rows,)
        for name in norms:
            result[f"{prefix}{name}.weight"] = (hidden,)
        if qk_norms:
            result[f"{prefix}self_attn.q_norm.weight"] = (qk_norms[0],)
            result[f"{prefix}self_attn.k_norm.weight"] = (qk_norms[1],)
    result["model.norm.weight"] = (hidden,)
    if not values.get("tie_word_embeddings", False):
        result["lm_head.weight"] = (vocab, hidden)
    return result


def tensor(shape: Sequence[int], *, seed: Any = 0, dtype: str = "BF16") -> Raw:
    """Small finite values, in whatever float type."""
    return _tensor(tuple(shape), hash_seed(seed), dtype)


@functools.lru_cache(maxsize=1024)
def _tensor(shape: tuple[int, ...], seed: int, dtype: str) -> Raw:
    """Every test of registering asks for the same few."""
    return encode(np.random.default_rng(seed).normal(scale=0.1, size=shape), dtype)


def encode(values: np.ndarray, dtype: str = "BF16") -> Raw:
    """Encode an array; bfloat16 is the upper half of float32."""
    if dtype == "BF16":
        data = (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    else:
        kind = {"F": "f", "I": "i", "U": "u"}[dtype[0]]
        data = values.astype(f"<{kind}{BITS[dtype] // 8}").tobytes()
    return Raw(dtype, tuple(values.shape), data)


def hash_seed(seed: Any) -> int:
    """A number from any text, the same in every process."""
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "little")


def tensors(values: Mapping[str, Any], *, seed: int = 0, dtype: str = "BF16") -> Tensors:
    """Random weights for a config; the same name, seed and shape give the same bytes."""
    return {name: tensor(shape, seed=f"{seed} {name}", dtype=dtype) for name, shape in shapes(values).items()}


def header(items: Mapping[str, Raw]) -> dict[str, Any]:
    """The header that belongs to tensors written one after the other."""
    entries, position = {}, 0
    for name, item in items.items():
        end = position + len(item.data)
        entries[name] = {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": [position, end]}
        position = end
    return entries


def safetensors_bytes(items: Mapping[str, Raw], entries: Mapping[str, Any] | None = None) -> bytes:
    """A safetensors file; `entries` replaces the true header."""
    text = json.dumps(header(items) if entries is None else entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(item.data for item in items.values())


def write_checkpoint(
    path: Path,
    values: Mapping[str, Any] | None = None,
    items: Mapping[str, Raw] | None = None,
    *,
    shards: int = 1,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write a folder as `save_pretrained` does."""
    values = config() if values is None else values
    items = tensors(values) if items is None else items
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(values))
    extra = {"tokenizer.json": '{"model": {}}', "generation_config.json": '{"eos_token_id": 2}'}
    for name, text in (extra if files is None else files).items():
        (path / name).write_text(text)
    if shards == 1:
        (path / "model.safetensors").write_bytes(safetensors_bytes(items))
        return path
    names, weight_map = list(items), {}
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = {name: items[name] for name in names[index::shards]}
        weight_map.update(dict.fromkeys(part, file))
        (path / file).write_bytes(safetensors_bytes(part))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def adapter_config(**changes: Any) -> dict[str, Any]:
    """An adapter_config.json as PEFT writes it."""
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "someone/base",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_rslora": False,
        "use_dora": False,
        "megatron_core": "megatron.core",
        "loftq_config": {},
        "peft_version": "0.21.2",
    }
    return {**values, **changes}


def adapter_tensors(
    values: Mapping[str, Any],
    modules: Sequence[str] = ("self_attn.q_proj", "self_attn.v_proj"),
    rank: int = 4,
) -> Tensors:
    """LoRA matrices for modules of every layer."""
    known = shapes({**values, "tie_word_embeddings": False})
    items: Tensors = {}
    for index in range(values["num_hidden_layers"]):
        for module in modules:
            rows, columns = known[f"model.layers.{index}.{module}.weight"]
            name = f"base_model.model.model.layers.{index}.{module}"
            items[f"{name}.lora_A.weight"] = tensor((rank, columns), seed=f"A{index}{module}", dtype="F32")
            items[f"{name}.lora_B.weight"] = tensor((rows, rank), seed=f"B{index}{module}", dtype="F32")
    return items


def write_adapter(
    path: Path, values: Mapping[str, Any] | None = None, items: Mapping[str, Raw] | None = None
) -> Path:
    """Write a folder as PEFT's `save_pretrained` does."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(adapter_config() if values is None else values))
    items = adapter_tensors(config()) if items is None else items
    (path / "adapter_model.safetensors").write_bytes(safetensors_bytes(items))
    return path
