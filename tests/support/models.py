"""Tiny random checkpoints of every supported architecture and shape, made with transformers.

Weights are drawn so that each layer changes the residual stream about as much as
the embedding does; transformers' own initialisation (0.02 everywhere) makes models
that repeat one token whatever the layers compute, which would test nothing.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

VOCAB_SIZE = 501
NUM_LAYERS = 4
CONTEXT_LENGTH = 512

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SENTENCES = (
    "The lighthouse keeper counted the ships that passed in the night.",
    "A block is stored once, however many variants share it.",
    "Where the river bends, the miller's daughter keeps three white geese.",
    "Numbers such as 3, 14, 159 and 2653 are split into pieces.",
    "Ein kleiner Satz mit Umlauten: schön, größer, über.",
    "def answer(question):\n    return question.strip() + '?'",
    "Every tenant sends requests, and all of them meet at the shared layers.",
    "Wherever there is a will there is a way, and whoever waits will see it.",
)


@dataclass(frozen=True)
class ModelSpec:
    """What a tiny checkpoint looks like.

    Attributes:
        config_class: configuration class of transformers.
        options: what differs from `base_options`.
        dtype: type the tensors are saved in.
        max_shard_size: makes a sharded checkpoint when small, as for `save_pretrained`.
        seed: of the weights.
    """

    config_class: type[PreTrainedConfig] = LlamaConfig
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "5GB"
    seed: int = 0

    def config(self) -> PreTrainedConfig:
        """The configuration of the model."""
        return self.config_class(**{**base_options(), **self.options})


def base_options() -> dict[str, Any]:
    """Odd sizes throughout: 9 heads of 14 over a hidden size of 63, 3 KV heads, 177 inner features."""
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 63,
        "intermediate_size": 177,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 14,
        "max_position_embeddings": CONTEXT_LENGTH,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


_LLAMA3_ROPE = _rope(
    "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
_MHA = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
_MULTIPLIERS = {
    "embedding_multiplier": 4.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.7,
    "logits_scaling": 3.0,
}
_GEMMA2 = {
    "sliding_window": 19,
    "query_pre_attn_scalar": 11,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 8.0,
    "tie_word_embeddings": False,
}
_UNCAPPED = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
_GEMMA3 = {
    "sliding_window": 19,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 11,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 2.5, "rope_theta": 50000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
    },
    "final_logit_softcapping": 8.0,
    "tie_word_embeddings": False,
}

SPECS: dict[str, ModelSpec] = {
    "llama-mha": ModelSpec(options=_MHA),
    "llama-gqa": ModelSpec(),
    "llama-gqa-tied": ModelSpec(options={"tie_word_embeddings": True}),
    "llama-mqa-theta": ModelSpec(options={"num_key_value_heads": 1, **_rope("default", rope_theta=500.0)}),
    "llama-rope-linear": ModelSpec(options=_rope("linear", factor=2.5)),
    "llama-rope-llama3": ModelSpec(options={**_LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-rope-yarn": ModelSpec(options=_rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "llama-biases": ModelSpec(options={"attention_bias": True, "mlp_bias": True}),
    "llama-gelu": ModelSpec(options={"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-3}),
    "llama-bf16-sharded": ModelSpec(dtype=torch.bfloat16, max_shard_size="150KB"),
    "llama-fp16": ModelSpec(dtype=torch.float16, options={**_MHA, "tie_word_embeddings": True}),
    "mistral": ModelSpec(MistralConfig, {"sliding_window": None}),
    "mistral-window": ModelSpec(MistralConfig, {"sliding_window": 19}),
    "qwen2": ModelSpec(Qwen2Config, {"hidden_size": 126}),
    "qwen2-tied": ModelSpec(Qwen2Config, {**_MHA, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ModelSpec(Qwen3Config, {"head_dim": 18}, seed=3),
    "qwen3-tied-bf16": ModelSpec(Qwen3Config, {"tie_word_embeddings": True}, torch.bfloat16, seed=4),
    "olmo2": ModelSpec(Olmo2Config, dtype=torch.bfloat16, seed=2),
    "granite": ModelSpec(GraniteConfig, {**_MULTIPLIERS, "mlp_bias": True}, torch.bfloat16),
    "smollm3": ModelSpec(
        SmolLM3Config,
        {"use_sliding_window": True, "sliding_window": 19, "no_rope_layers": [1, 0, 1, 0]},
    ),
    "phi3-window": ModelSpec(Phi3Config, {"sliding_window": 19}),
    "phi3-longrope": ModelSpec(
        Phi3Config,
        {
            "hidden_size": 126,
            "original_max_position_embeddings": CONTEXT_LENGTH,
            **_rope(
                "longrope",
                factor=2.0,
                short_factor=[1.0, 1.1, 1.2, 1.5, 2.0, 2.5, 3.0],
                long_factor=[9.0] * 7,
            ),
        },
    ),
    "phi3-partial": ModelSpec(
        Phi3Config,
        {"hidden_size": 126, "num_key_value_heads": 9, **_rope("default", partial_rotary_factor=0.6)},
    ),
    "glm4": ModelSpec(Glm4Config, {"head_dim": 12, "attention_bias": True}, torch.bfloat16),
    "gemma2": ModelSpec(Gemma2Config, _GEMMA2, torch.bfloat16),
    "gemma2-uncapped": ModelSpec(
        Gemma2Config, {**_UNCAPPED, "attention_bias": True, "sliding_window": 19}, seed=4
    ),
    "gemma3": ModelSpec(Gemma3TextConfig, _GEMMA3, torch.bfloat16, seed=1),
}
"""Tiny checkpoints by name, of odd sizes where they can be.

Qwen2 has no head_dim of its own: 126 = 9 heads of 14.
"""


_EVEN = {**_MHA, "num_key_value_heads": 2, "intermediate_size": 176}
EVEN_SPECS: dict[str, ModelSpec] = {
    "llama-even": ModelSpec(options=_EVEN),
    "llama-even-biases": ModelSpec(options={**_EVEN, "attention_bias": True, "mlp_bias": True}),
    "mistral-even-window": ModelSpec(MistralConfig, {**_EVEN, "sliding_window": 19}),
    "qwen2-even": ModelSpec(Qwen2Config, _EVEN),
    "qwen3-even": ModelSpec(Qwen3Config, {**_EVEN, "head_dim": 24}, seed=3),
    "llama-even-gelu": ModelSpec(options={**_EVEN, "hidden_act": "gelu_pytorch_tanh"}),
    "olmo2-even": ModelSpec(Olmo2Config, _EVEN),
    "granite-even": ModelSpec(GraniteConfig, {**_EVEN, **_MULTIPLIERS}),
    "smollm3-even": ModelSpec(SmolLM3Config, {**_EVEN, "no_rope_layers": [1, 0, 0, 1]}),
    "phi3-even": ModelSpec(Phi3Config, {**_EVEN, **_rope("default", partial_rotary_factor=0.75)}),
    "glm4-even": ModelSpec(Glm4Config, {**_EVEN, "attention_bias": True}),
    "gemma2-even": ModelSpec(Gemma2Config, {**_EVEN, **_GEMMA2}),
    "gemma3-even": ModelSpec(Gemma3TextConfig, {**_EVEN, **_GEMMA3}),
}
"""More of them, of the even sizes that kernels for pairs of elements need."""

FURTHER = ("olmo2", "granite", "smollm3", "phi3-window", "glm4", "gemma2", "gemma3")
"""A checkpoint of each family beyond Llama, Mistral, Qwen2 and Qwen3, which most tests are about."""
FURTHER_EVEN = tuple(f"{name.partition('-')[0]}-even" for name in FURTHER)
"""The same, of even sizes."""


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter anew, in name order, so that layers matter and nothing is neutral."""
    generator = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.4 * noise)
            elif parameter.dim() == 1:
                # Norms of some families apply 1 + weight: theirs begin at 0.
                parameter.copy_(parameter.mean().round() + 0.2 * noise)
            elif "embed_tokens" in name:
                # Some families multiply embeddings by the root of the hidden size.
                parameter.copy_(0.4 * noise / getattr(embedding, "scalar_embed_scale", 1.0))
            else:
                parameter.copy_(1.6 * noise / parameter.shape[1] ** 0.5)


def make_checkpoint(spec: ModelSpec, folder: Path) -> Path:
    """Write a checkpoint with weights, tokenizer, chat template and generation defaults into ``folder``."""
    model = AutoModelForCausalLM.from_config(spec.config(), dtype=torch.float32)
    randomise(model, spec.seed)
    model.to(spec.dtype)
    model.config.dtype = spec.dtype
    model.generation_config.eos_token_id = [2]
    model.save_pretrained(folder, max_shard_size=spec.max_shard_size)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few sentences; fewer entries than the models have rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 20,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def load_model(folder: Path) -> PreTrainedModel:
    """A checkpoint in transformers: float32, plain attention, ready to compute."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint as stored."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(shard))
    return tensors


def edit_checkpoint(
    source: Path,
    folder: Path,
    *,
    tensors: Callable[[str, Tensor], Tensor] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """Copy a checkpoint, with some tensors or configuration entries replaced.

    Args:
        source: the checkpoint to copy.
        folder: where the copy goes.
        tensors: gives the new value of a tensor; returning its argument leaves the tensor as it is.
        config: entries to set in config.json.
    """
    shutil.copytree(source, folder)
    if tensors is not None:
        for shard in sorted(folder.glob("*.safetensors")):
            edited = {name: tensors(name, value).contiguous() for name, value in load_file(shard).items()}
            save_file(edited, shard, metadata={"format": "pt"})
    if config is not None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}, indent=2))
    return folder


def tune_layers(
    source: Path, folder: Path, layers: Sequence[int], *, amount: float = 0.1, seed: int = 1
) -> Path:
    """Copy a checkpoint with the matrices of some layers moved, as a partial fine-tune leaves it.

    Args:
        source: the checkpoint to copy.
        folder: where the copy goes.
        layers: which layers change; everything else stays bit-identical.
        amount: size of the change over the spread of the tensor.
        seed: of the change.
    """
    generator = torch.Generator().manual_seed(seed)
    prefixes = tuple(f"model.layers.{layer}." for layer in layers)

    def move(name: str, value: Tensor) -> Tensor:
        if not name.startswith(prefixes) or value.dim() < 2:
            return value
        change = torch.randn(value.shape, generator=generator) * value.float().std() * amount
        return (value.float() + change).to(value.dtype)

    return edit_checkpoint(source, folder, tensors=move)


def top_quarter(num_layers: int) -> range:
    """The layers a top-quarter fine-tune changes."""
    return range(num_layers - max(1, num_layers // 4), num_layers)
