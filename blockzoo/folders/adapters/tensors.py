"""The tensors of a PEFT adapter by what they are.

PEFT puts ``base_model.model.`` before the base's own names. A tensor is one of

- ``MODULE.lora_A.weight`` [rank, in] and ``MODULE.lora_B.weight`` [out, rank], with
  ``MODULE.lora_B.bias`` [out] where the adapter has biases, and
  ``MODULE.lora_magnitude_vector`` [out] where it is DoRA;
- on the embedding ``MODULE.lora_embedding_A`` [rank, vocabulary] and
  ``MODULE.lora_embedding_B`` [hidden, rank], with a magnitude [hidden];
- ``MODULE.token_adapter.trainable_tokens_delta`` [tokens, hidden], new rows of a vocabulary matrix;
- a whole tensor: of a module in modules_to_save, or the embedding or output matrix
  that PEFT saves when they were resized or adapted (``MODULE.base_layer.weight`` then,
  ``MODULE.token_adapter.base_layer.weight`` where single rows of it were trained).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from blockzoo.errors import AdapterError
from blockzoo.folders.adapters.config import AdapterConfig
from blockzoo.folders.outline import EMBEDDING_MODULE
from blockzoo.folders.safetensors_io import TensorEntry
from blockzoo.manifest import DType

PREFIX = "base_model.model."
_PARTS = {
    "A": re.compile(r"(.+)\.lora_A\.weight"),
    "B": re.compile(r"(.+)\.lora_B\.weight"),
    "bias": re.compile(r"(.+)\.lora_B\.bias"),
    "magnitude": re.compile(r"(.+)\.lora_magnitude_vector(?:\.weight)?"),
}
_EMBEDDING_PARTS = {
    "A": re.compile(r"(.+)\.lora_embedding_A"),
    "B": re.compile(r"(.+)\.lora_embedding_B"),
    "magnitude": _PARTS["magnitude"],
}
_TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")
_INNER = re.compile(r"\.(?:base_layer|token_adapter)(?=\.)")
_COPY = re.compile(r"(.+)(\.modules_to_save|\.original_module)\.[^.]+")
_FLOATS = (DType.F32, DType.F16, DType.BF16)


@dataclass
class AdapterTensors:
    """An adapter's tensors; paths are without PEFT's prefix.

    Attributes:
        lora: module -> "A", "B", "bias", "magnitude" -> tensor.
        tokens: module -> its new rows.
        whole: name in the checkpoint -> tensor.
        inner: whole tensors saved from below an adapter.
        ignored: names in the file of copies that PEFT keeps beside a module in modules_to_save, and does not
            read.
    """

    lora: dict[str, dict[str, TensorEntry]] = field(default_factory=dict)
    tokens: dict[str, TensorEntry] = field(default_factory=dict)
    whole: dict[str, TensorEntry] = field(default_factory=dict)
    inner: set[str] = field(default_factory=set)
    ignored: list[str] = field(default_factory=list)


def sort_tensors(entries: Mapping[str, TensorEntry], config: AdapterConfig) -> AdapterTensors:
    """Say what each tensor is.

    Raises:
        AdapterError: there is one twice, or of another type than adapters have.
    """
    tensors = AdapterTensors()
    for name, entry in entries.items():
        if entry.dtype not in _FLOATS:
            raise AdapterError(
                f"tensor {name!r} is {entry.dtype}; adapters are F32, F16 or BF16", tensor=name
            )
        path = name.removeprefix(PREFIX)
        if (copy := _COPY.fullmatch(path)) and config.saves(copy[1]) and name.replace(copy[2], "") in entries:
            tensors.ignored.append(entry.name)
            continue
        slot, key = _place(tensors, path)
        if key in slot:
            raise AdapterError(f"the adapter holds {path!r} twice", tensor=name)
        slot[key] = entry
    return tensors


def _place(tensors: AdapterTensors, path: str) -> tuple[dict[str, TensorEntry], str]:
    """Where a tensor belongs."""
    for part, pattern in _parts_of(path).items():
        if match := pattern.fullmatch(path):
            return tensors.lora.setdefault(match[1], {}), part
    if match := _TOKENS.fullmatch(path):
        return tensors.tokens, match[1].removesuffix(".base_layer")
    key = _INNER.sub("", path)
    if key != path:
        tensors.inner.add(key)
    return tensors.whole, key


def _parts_of(path: str) -> Mapping[str, re.Pattern[str]]:
    return _EMBEDDING_PARTS if path.startswith(f"{EMBEDDING_MODULE}.") else _PARTS
