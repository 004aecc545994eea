"""Checkpoints that can be quantised, and their oracle: transformers and PEFT around int8 products."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Phi3Config, Qwen2Config

from blockkernels.linear import dequantise_int8, linear_int8_reference, quantise_int8
from support.models import ModelSpec
from support.oracle import Oracle

_EVEN = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
"""Inputs of every linear module are a multiple of 64."""

INT8_SPECS: dict[str, ModelSpec] = {
    "int8-llama": ModelSpec(options=_EVEN),
    "int8-llama-tied": ModelSpec(options={**_EVEN, "tie_word_embeddings": True}),
    "int8-qwen2": ModelSpec(Qwen2Config, {**_EVEN, "hidden_size": 128}),
    "int8-gemma2": ModelSpec(
        Gemma2Config,
        {**_EVEN, "sliding_window": 19, "query_pre_attn_scalar": 11, "tie_word_embeddings": False},
    ),
    "int8-phi3": ModelSpec(Phi3Config, {**_EVEN, "hidden_size": 128}),
    "int8-llama-bf16": ModelSpec(options=_EVEN, dtype=torch.bfloat16),
}
"""One of each way in which linear modules are stored: with biases, as one matrix, tied, in bfloat16."""


class Int8Oracle(Oracle):
    """As `Oracle`, with the reference of int8 products in the place of those of the base's linear modules."""

    def __init__(self, base: Path, adapter: Path | None = None) -> None:
        super().__init__(base, adapter)
        tied = bool(self._model.config.tie_word_embeddings)
        for name, module in self._model.named_modules():
            if isinstance(module, nn.Linear) and "lora_" not in name:
                _quantise(module, keeps_weight=tied and "lm_head" in name)


def _quantise(module: nn.Linear, *, keeps_weight: bool) -> None:
    quantised = quantise_int8(module.weight.detach())

    def forward(x: Tensor) -> Tensor:
        return linear_int8_reference(x.flatten(0, -2), quantised, module.bias).view(*x.shape[:-1], -1)

    module.forward = forward  # type: ignore[method-assign]
    if not keeps_weight:  # what PEFT sees of it
        module.weight.data = dequantise_int8(quantised)
