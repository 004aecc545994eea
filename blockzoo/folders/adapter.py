"""PEFT LoRA folders: what they change in a base chain, by PEFT's own rules.

The rules (names in target_modules, patterns for rank and alpha, what
modules_to_save covers, what a tensor saved without either replaces) were read
from PEFT 0.21 and are held to it by tests. What blocks cannot compute exactly is
refused with a name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from blockzoo.errors import AdapterError, UnknownTargetError, UnsupportedAdapterError

MAX_RANK = 1 << 14
"""Highest LoRA rank accepted; above a layer's width it makes no sense."""

_MAX_PATTERN = 4096
"""Characters of a regular expression in adapter_config.json."""

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Matrices that hold several linear maps, and what these are called elsewhere."""

_ALL_LINEAR = "all-linear"
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base as it is; the others subtract from its weights."""

# Fields that change nothing in inference, whatever they hold.
_IGNORED = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora", "bias",
}  # fmt: skip

_METHODS = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA with a bias (lora_bias)",
    "fan_in_fan_out": "fan_in_fan_out",
    "layer_replication": "layer replication",
    "trainable_token_indices": "trainable tokens",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The part of adapter_config.json that decides what is computed.

    Attributes:
        rank: rank of modules that no pattern matches.
        alpha: numerator of the scale of modules that no pattern matches.
        use_rslora: divide alpha by the square root of the rank instead of the rank.
        rank_pattern: regular expression -> rank; the first match counts.
        alpha_pattern: regular expression -> alpha; the first match counts.
        targets: names, or one regular expression, or "all-linear".
        excluded: names, or one regular expression.
        layers: only these layers, or None for all.
        layers_pattern: names of the list of layers, empty for any.
        saved: suffixes of modules that are stored whole (modules_to_save).
        base_model: what the adapter was trained on, as PEFT recorded it.
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    saved: tuple[str, ...]
    base_model: str

    def rank_of(self, module: str) -> int:
        """Rank of the adapter on a module."""
        return self.rank_pattern.get(_first_match(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        """What the product of the two matrices is multiplied with."""
        alpha = self.alpha_pattern.get(_first_match(self.alpha_pattern, module), self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targeted(self, modules: Iterable[str], linears: Iterable[str], output: str) -> list[str]:
        """Return which of the base's `modules` the adapter changes.

        Args:
            modules: paths of all modules that can be named, embeddings included.
            linears: paths of the linear modules.
            output: path of the output projection, which "all-linear" leaves out.

        Raises:
            UnknownTargetError: a target names nothing in the base.
        """
        modules, linears = list(modules), list(linears)
        if isinstance(self.targets, str) and self.targets.lower() == _ALL_LINEAR:
            wanted = [module for module in linears if module != output]
        else:
            self._check_targets(modules, linears)
            wanted = [module for module in modules if self._is_target(module)]
        found = [module for module in wanted if not self._is_excluded(module)]
        if not found and not self.saved:
            raise UnknownTargetError(
                "the adapter's target_modules leave no module of the base to change",
                hint=f"Modules that can be adapted: {_leaf_names(linears)}.",
            )
        return found

    def saves(self, module: str) -> bool:
        """Whether modules_to_save covers a module; PEFT compares endings, not whole names."""
        return any(module.endswith(name) for name in self.saved)

    def _check_targets(self, modules: list[str], linears: list[str]) -> None:
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets
        for target in targets:
            if isinstance(self.targets, str):
                known = any(re.fullmatch(target, module) for module in modules)
            else:
                # PEFT passes over names that match nothing if others do; here the parts of one matrix may.
                known = any(_is_suffix(target, module) for module in (*modules, *_parts(modules)))
            if not known:
                raise UnknownTargetError(
                    f"the adapter changes {target[:200]!r}, which the base does not have",
                    hint=f"Modules that can be adapted: {_leaf_names(linears)}.",
                    target=target[:200],
                )

    def _is_target(self, module: str) -> bool:
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, module) is not None
        if module in self.targets:
            return True
        return any(_is_suffix(target, module) for target in self.targets) and self._is_chosen_layer(module)

    def _is_chosen_layer(self, module: str) -> bool:
        if self.layers is None:
            return True
        if self.layers_pattern:
            tries = [
                re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", module)
                for pattern in self.layers_pattern
            ]
        else:
            tries = [re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", module)]
        index = next((int(match["index"]) for match in tries if match), None)
        return index in self.layers

    def _is_excluded(self, module: str) -> bool:
        if isinstance(self.excluded, str):
            if self.excluded and re.fullmatch(self.excluded, module):
                return True
        elif any(_is_suffix(name, module) for name in self.excluded):
            return True
        return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved)


def parse_adapter_config(values: Mapping[str, object]) -> AdapterConfig:
    """Read adapter_config.json.

    Raises:
        UnsupportedAdapterError: it describes something other than plain LoRA on a causal language model.
        AdapterError: a value is missing or impossible.
    """
    _refuse_other_methods(values)
    rank_pattern = {key: _rank(value, key) for key, value in _pattern(values, "rank_pattern").items()}
    alpha_pattern = {key: _alpha(value, key) for key, value in _pattern(values, "alpha_pattern").items()}
    layers = values.get("layers_to_transform")
    if isinstance(layers, int) and not isinstance(layers, bool):
        layers = [layers]
    if layers is not None and not (isinstance(layers, list) and all(type(item) is int for item in layers)):
        raise _bad("layers_to_transform", layers)
    targets = _names_or_pattern(values, "target_modules")
    saved = _names(values, "modules_to_save")
    for name in saved:
        _compile("modules_to_save", name)
    if not targets and not saved:
        raise AdapterError("adapter_config.json: target_modules is empty")
    return AdapterConfig(
        rank=_rank(values.get("r"), "r"),
        alpha=_alpha(values.get("lora_alpha"), "lora_alpha"),
        use_rslora=_flag(values, "use_rslora"),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        targets=targets,
        excluded=_names_or_pattern(values, "exclude_modules"),
        layers=tuple(cast(list[int], layers)) if layers else None,
        layers_pattern=_layers_pattern(values),
        saved=saved,
        base_model=str(values.get("base_model_name_or_path") or "")[:1000],
    )


def _refuse_other_methods(values: Mapping[str, object]) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise _unsupported(f"peft_type {str(kind)[:80]!r}", "Only LORA adapters can be registered.")
    task = values.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise _unsupported(f"task_type {str(task)[:80]!r}", "Only adapters for CAUSAL_LM can be registered.")
    if values.get("bias", "none") != "none":
        raise _unsupported(f"bias {str(values['bias'])[:80]!r}", 'Train with bias="none".')
    init = values.get("init_lora_weights", True)
    if not any(init is item or (isinstance(init, str) and init == item) for item in _HARMLESS_INITS):
        raise _unsupported(
            f"init_lora_weights {str(init)[:80]!r}, which changes the base's weights,",
            "Convert it to plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...).",
        )
    for key, value in values.items():
        if not value or key in _IGNORED:
            continue
        if key in _METHODS:
            raise _unsupported(
                _METHODS[key], "Train with plain LoRA, or merge and register the full checkpoint."
            )
        raise _unsupported(
            f"the field {key[:80]!r}, which this version does not know,",
            "Remove the field if it has no effect, or upgrade blockzoo.",
        )


def _unsupported(what: str, hint: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(f"adapter_config.json: {what} is not supported", hint=hint)


def _bad(field: str, value: object) -> AdapterError:
    return AdapterError(f"adapter_config.json: {field} cannot be {str(value)[:80]!r}", field=field)


def _rank(value: object, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RANK:
        raise _bad(f"rank {field[:80]!r}", value)
    return value


def _alpha(value: object, field: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e9:
        raise _bad(f"alpha {field[:80]!r}", value)
    return float(value)


def _flag(values: Mapping[str, object], field: str) -> bool:
    value = values.get(field) or False
    if not isinstance(value, bool):
        raise _bad(field, value)
    return value


def _pattern(values: Mapping[str, object], field: str) -> dict[str, object]:
    value = values.get(field) or {}
    if not isinstance(value, dict):
        raise _bad(field, value)
    for key in value:
        _compile(field, key)
    return value


def _names(values: Mapping[str, object], field: str) -> tuple[str, ...]:
    value = values.get(field) or []
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise _bad(field, value)
    return tuple(value)


def _names_or_pattern(values: Mapping[str, object], field: str) -> str | tuple[str, ...]:
    value = values.get(field)
    if isinstance(value, str):
        _compile(field, value)
        return value
    return _names(values, field)


def _layers_pattern(values: Mapping[str, object]) -> tuple[str, ...]:
    value = values.get("layers_pattern")
    patterns = (value,) if isinstance(value, str) and value else _names(values, "layers_pattern")
    for pattern in patterns:
        _compile("layers_pattern", pattern)
    return patterns


def _compile(field: str, pattern: str) -> None:
    try:
        if len(pattern) > _MAX_PATTERN:
            raise _bad(field, pattern)
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(
            f"adapter_config.json: {field} holds {pattern[:80]!r}, which is no regular expression: {error}",
            field=field,
        ) from error


def _first_match(patterns: Mapping[str, object], module: str) -> str:
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def _parts(modules: Iterable[str]) -> Iterator[str]:
    """Paths that the parts of fused matrices have in checkpoints that do not fuse them."""
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        yield from (f"{parent}.{part}" for part in _FUSED.get(leaf, ()))


def _is_suffix(name: str, module: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _leaf_names(modules: Iterable[str]) -> str:
    return ", ".join(sorted({module.rpartition(".")[2] for module in modules}))
