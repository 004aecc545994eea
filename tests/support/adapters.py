"""LoRA adapters of every form the zoo takes, made with PEFT on a tiny checkpoint, with visible effects."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from support.models import load_model

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterSpec:
    """What an adapter looks like.

    Attributes:
        options: arguments of `peft.LoraConfig`.
        edit_base: changes the base model's parameters before saving, for embeddings saved with the adapter.
        save_options: arguments of `PeftModel.save_pretrained`.
    """

    options: dict[str, Any]
    edit_base: Callable[[PreTrainedModel], None] | None = None
    save_options: dict[str, Any] = field(default_factory=dict)


def _lora(*targets: str, r: int = 4, lora_alpha: int = 8, **options: Any) -> dict[str, Any]:
    return {"r": r, "lora_alpha": lora_alpha, "target_modules": list(targets), **options}


def _move_embedding(model: PreTrainedModel) -> None:
    """Change some rows of the input embedding (and of a tied head), as training added tokens does."""
    weight = model.get_input_embeddings().weight
    weight[5:450:7] += (
        torch.randn(weight[5:450:7].shape, generator=torch.Generator().manual_seed(5)) * weight.std()
    )


ADAPTERS: dict[str, AdapterSpec] = {
    "all-linear": AdapterSpec(_lora(*ALL_LINEAR)),
    "every-linear": AdapterSpec({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
    "q-v": AdapterSpec(_lora("q_proj", "v_proj", r=3, lora_alpha=5)),
    "rank-one": AdapterSpec(_lora("o_proj", "down_proj", r=1, lora_alpha=1)),
    "patterns": AdapterSpec(
        _lora(
            *ALL_LINEAR,
            rank_pattern={
                "q_proj": 7,
                r"layers\.1\.mlp\.down_proj": 2,
                r"model\.layers\.[23]\.self_attn\.v_proj": 5,
            },
            alpha_pattern={"k_proj": 3, r"layers\.2\.mlp\.(gate|up)_proj": 11},
        )
    ),
    "rslora": AdapterSpec(_lora("q_proj", "up_proj", r=6, lora_alpha=7, use_rslora=True)),
    "some-layers": AdapterSpec(_lora(*ATTENTION, layers_to_transform=[1, 3], layers_pattern="layers")),
    "regex": AdapterSpec(
        {"r": 5, "lora_alpha": 9, "target_modules": r".*\.(0|2)\.self_attn\.(q|k)_proj|.*3\.mlp\.up_proj"}
    ),
    "lm-head": AdapterSpec(_lora("q_proj", "lm_head")),
    "saved-lm-head": AdapterSpec(_lora("v_proj", modules_to_save=["lm_head"])),
    "saved-embedding": AdapterSpec(_lora("k_proj", modules_to_save=["embed_tokens"])),
    "saved-both": AdapterSpec(_lora("gate_proj", modules_to_save=["embed_tokens", "lm_head"])),
    "embedding-layers": AdapterSpec(
        _lora("q_proj"), edit_base=_move_embedding, save_options={"save_embedding_layers": True}
    ),
}
"""Adapters by name; each is valid on every checkpoint of `support.models.SPECS`, tied or not."""

FUSED = AdapterSpec(
    _lora(
        "qkv_proj",
        "gate_up_proj",
        "down_proj",
        rank_pattern={"qkv_proj": 7, r"layers\.1\.mlp\.gate_up_proj": 2},
        alpha_pattern={r"layers\.[02]\.self_attn\.qkv_proj": 3},
    )
)
"""For checkpoints that hold queries, keys and values in one matrix, and gate and up in one."""

FURTHER_METHODS: dict[str, AdapterSpec] = {
    "tokens": AdapterSpec(_lora("q_proj", trainable_token_indices=[*range(400, 0, -3)])),
    "tokens-of-the-head": AdapterSpec(
        _lora("q_proj", trainable_token_indices={"lm_head": [5, 2, *range(200, 300)]})
    ),
    "tokens-of-both": AdapterSpec(
        _lora("q_proj", trainable_token_indices={"embed_tokens": [*range(9, 300)], "lm_head": [4, 11, 250]})
    ),
    "tokens-and-head": AdapterSpec(_lora("o_proj", "lm_head", trainable_token_indices=[3, 17, 400])),
    "embedding": AdapterSpec(_lora("q_proj", "embed_tokens", r=3)),
    "embedding-tied": AdapterSpec(_lora("v_proj", "embed_tokens", ensure_weight_tying=True)),
    "embedding-and-head": AdapterSpec(
        _lora("embed_tokens", "lm_head", r=5, alpha_pattern={"lm_head": 3}, use_rslora=True)
    ),
    "biases": AdapterSpec(_lora(*ALL_LINEAR, "lm_head", lora_bias=True)),
    "dora": AdapterSpec(_lora(*ALL_LINEAR, use_dora=True)),
    "dora-ends": AdapterSpec(
        _lora("k_proj", "embed_tokens", "lm_head", use_dora=True, rank_pattern={"lm_head": 7})
    ),
    "dora-tokens": AdapterSpec(
        _lora("v_proj", "down_proj", use_dora=True, trainable_token_indices=[*range(1, 140)])
    ),
}
"""Adapters that are more than plain LoRA on linear modules."""


MATTER_UNTIED = ("tokens", "tokens-of-both", "embedding", "dora-ends")
"""Those of `FURTHER_METHODS` in which a tied head makes a difference."""


def make_adapter(spec: AdapterSpec, base: Path, folder: Path, *, seed: int = 1) -> Path:
    """Write an adapter folder for the checkpoint ``base``; all its matrices are random and none is zero."""
    model = load_model(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT comments on tied weights; the forms are meant as they are
        if spec.edit_base is not None:
            with torch.no_grad():
                spec.edit_base(model)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **spec.options))
        randomise_adapter(adapted, seed)
        adapted.save_pretrained(folder, **spec.save_options)
    return folder


def randomise_adapter(model: PeftModel, seed: int) -> None:
    """Draw the trainable parameters: LoRA products as large as the weight; saved modules are moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            elif "lora_A" in name:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            elif "lora_B" in name:
                parameter.copy_(0.5 * noise / parameter.shape[1] ** 0.5)
            elif "lora_embedding" in name:
                parameter.copy_(0.3 * noise / parameter.shape[0] ** 0.5)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.3 * noise)
            else:
                parameter.add_(0.5 * parameter.std() * noise)


def load_adapted(base: Path, adapter: Path) -> PeftModel:
    """A checkpoint with an adapter in PEFT: float32, not merged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load_model(base), adapter).eval()
