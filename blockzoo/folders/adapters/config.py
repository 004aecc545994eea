"""adapter_config.json of a PEFT LoRA folder, read by PEFT's own rules.

The rules (names in target_modules, patterns for rank and alpha, what
modules_to_save covers, what a tensor saved without either replaces) were read
from PEFT 0.21 and are held to it by tests. What blocks cannot compute exactly is
refused with a name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar, cast

from blockzoo.errors import AdapterError, UnknownTargetError, UnsupportedAdapterError
from blockzoo.folders.adapters.patterns import ModulePattern, check_number, compile_pattern, compile_patterns
from blockzoo.folders.fields import ADAPTER_FIELDS, Treatment, is_without_effect

MAX_ORDERED = 256
"""Patterns of a field whose order is looked at."""

MAX_MATCHES = 1 << 20
"""Most pairs of a pattern and a module; they take some seconds."""

MAX_RANK = 1 << 14
"""Highest LoRA rank accepted; above a layer's width it makes no sense."""

MAX_TOKENS = 1 << 14
"""Most trained tokens of one matrix; an adapter that trains more of them saves the matrix."""

_ALL_LINEAR = "all-linear"
_ANY_LAYERS = compile_pattern("layers_pattern", "", r".*?\.[^.]*", r"\.(?P<idx>\d+)\.")
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The part of adapter_config.json that decides what is computed.

    Attributes:
        rank: rank of modules that no pattern matches.
        alpha: numerator of the scale of modules that no pattern matches.
        use_rslora: divide alpha by the square root of the rank instead of the rank.
        ranks: patterns and the rank of modules that match; the first match counts.
        alphas: patterns and the alpha of modules that match; the first match counts.
        targets: names, or one pattern, or "all-linear".
        excluded: names, or one pattern.
        layers: only these layers, or None for all.
        layers_pattern: patterns for the list of layers, empty for any.
        saved: suffixes of modules that are stored whole (modules_to_save).
        saved_patterns: the same, as patterns for modules that LoRA leaves out.
        base_model: what the adapter was trained on, as PEFT recorded it.
        use_dora: adapted modules have a magnitude for each output (DoRA).
        lora_bias: adapted modules have a bias of their own.
        keeps_ties: where the base ties its head to its embedding, adapters on the one are on the other too.
        tokens: name of a vocabulary matrix -> the rows that were trained (trainable_token_indices).
    """

    rank: int
    alpha: float
    use_rslora: bool
    ranks: tuple[tuple[ModulePattern, int], ...]
    alphas: tuple[tuple[ModulePattern, float], ...]
    targets: str | ModulePattern | frozenset[str]
    excluded: ModulePattern | frozenset[str]
    layers: frozenset[int] | None
    layers_pattern: tuple[ModulePattern, ...]
    saved: tuple[str, ...]
    saved_patterns: tuple[ModulePattern, ...]
    base_model: str
    use_dora: bool = False
    lora_bias: bool = False
    keeps_ties: bool = False
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """Rank of the adapter on a module."""
        return _first_match(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What the product of the two matrices is multiplied with."""
        alpha = _first_match(self.alphas, module, self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targeted(self, modules: Iterable[str], linears: Iterable[str], output: str) -> list[str]:
        """Return which of the base's `modules` the adapter changes.

        Args:
            modules: paths of all modules that can be named, embeddings included.
            linears: paths of the linear modules.
            output: path of the output projection, which "all-linear" leaves out.

        Raises:
            UnknownTargetError: the targets leave nothing of the base to change.
        """
        modules, linears = list(modules), list(linears)
        if isinstance(self.targets, str):
            wanted = [module for module in linears if module != output]
        else:
            wanted = [module for module in modules if self._is_target(module)]
        found = [module for module in wanted if not self._is_excluded(module)]
        if not found and not self.saved and not self.tokens:
            raise UnknownTargetError(
                f"the adapter's target_modules ({self._targets_text()}) leave nothing of the base to change",
                hint=f"Modules that can be adapted: {_leaf_names(linears)}.",
            )
        return found

    def without_effect(self, modules: Iterable[str]) -> list[str]:
        """Names in target_modules that match none of the base's modules, which PEFT passes over too."""
        if isinstance(self.targets, str | ModulePattern):
            return []
        known = {name for module in modules for name in _suffixes(module)}
        return sorted(self.targets - known)

    def order_matters(self, modules: Iterable[str]) -> list[str]:
        """Patterns for rank and alpha of which several match one module, with other values in another order.

        PEFT takes the first that matches, and sorts them when it saves an adapter. Of more than
        `MAX_ORDERED` patterns nobody writes by hand, nothing is said.
        """
        modules = list(modules)
        return [
            field
            for field, patterns in (("rank_pattern", self.ranks), ("alpha_pattern", self.alphas))
            if 1 < len(patterns) <= MAX_ORDERED and _depends_on_order(patterns, modules)
        ]

    def check_effort(self, num_modules: int) -> None:
        """Refuse more matches of patterns with modules than a few seconds hold (AdapterError)."""
        count = len(self.ranks) + len(self.alphas) + len(self.saved_patterns) + len(self.layers_pattern)
        if count * num_modules > MAX_MATCHES:
            raise AdapterError(
                f"adapter_config.json: {count} patterns for {num_modules} modules are too many",
                hint="Use fewer patterns; the name of a module without its layer matches in every layer.",
            )

    def saves(self, module: str) -> bool:
        """Whether modules_to_save covers a module; PEFT compares endings, not whole names."""
        return any(module.endswith(name) for name in self.saved)

    def _targets_text(self) -> str:
        if isinstance(self.targets, str):
            return self.targets
        names = [self.targets.text] if isinstance(self.targets, ModulePattern) else sorted(self.targets)
        return ", ".join(names)[:200]

    def _is_target(self, module: str) -> bool:
        if isinstance(self.targets, ModulePattern):
            return self.targets.matches_all(module)
        if module in self.targets:
            return True
        return not _suffixes(module).isdisjoint(self.targets) and self._is_chosen_layer(module)

    def _is_chosen_layer(self, module: str) -> bool:
        if self.layers is None:
            return True
        found = (pattern.index(module) for pattern in self.layers_pattern or (_ANY_LAYERS,))
        index = next((index for index in found if index is not False), None)
        return isinstance(index, str) and int(index) in self.layers

    def _is_excluded(self, module: str) -> bool:
        if isinstance(self.excluded, ModulePattern):
            if self.excluded.matches_all(module):
                return True
        elif not _suffixes(module).isdisjoint(self.excluded):
            return True
        return any(pattern.matches(module) for pattern in self.saved_patterns)


def parse_adapter_config(values: Mapping[str, object]) -> AdapterConfig:
    """Read adapter_config.json.

    Raises:
        UnsupportedAdapterError: it describes something that blocks do not compute.
        AdapterError: a value is missing or impossible.
    """
    _refuse_other_methods(values)
    ranks = _pattern(values, "rank_pattern", _rank)
    alphas = _pattern(values, "alpha_pattern", _alpha)
    layers = values.get("layers_to_transform")
    if isinstance(layers, int) and not isinstance(layers, bool):
        layers = [layers]
    if layers is not None and not (isinstance(layers, list) and all(type(item) is int for item in layers)):
        raise _bad("layers_to_transform", layers)
    targets = _targets(values)
    saved = _names(values, "modules_to_save")
    tokens = _tokens(values)
    if not targets and not saved and not tokens:
        raise AdapterError("adapter_config.json: target_modules is empty")
    return AdapterConfig(
        rank=_rank(values.get("r"), "r"),
        alpha=_alpha(values.get("lora_alpha"), "lora_alpha"),
        use_rslora=_flag(values, "use_rslora"),
        ranks=ranks,
        alphas=alphas,
        targets=targets,
        excluded=_names_or_pattern(values, "exclude_modules"),
        layers=frozenset(cast(list[int], layers)) if layers else None,
        layers_pattern=_layers_pattern(values),
        saved=saved,
        saved_patterns=compile_patterns("modules_to_save", saved, r"(^|.*\.)", r"($|\..*)"),
        base_model=str(values.get("base_model_name_or_path") or "")[:1000],
        use_dora=_flag(values, "use_dora"),
        lora_bias=_flag(values, "lora_bias"),
        keeps_ties=_flag(values, "ensure_weight_tying"),
        tokens=tokens,
    )


def _refuse_other_methods(values: Mapping[str, object]) -> None:
    if values.get("peft_type") is None:
        raise _unsupported("peft_type 'None'", _HINTS["peft_type"])
    if values.get("use_dora") and values.get("lora_bias"):
        raise _unsupported("use_dora together with lora_bias", "PEFT refuses it too; set one to false.")
    for key, value in values.items():
        field = ADAPTER_FIELDS.get(key)
        if field is None and value:
            raise _unsupported(
                f"the field {key[:80]!r}, which this version does not know,",
                "Remove the field if it has no effect, or upgrade blockzoo.",
            )
        if field is None or field.treatment is not Treatment.REFUSED or is_without_effect(field, value):
            continue
        if not value and key not in _HINTS:  # switched off
            continue
        raise _unsupported(
            f"{key} {str(value)[:80]!r} ({field.meaning})",
            _HINTS.get(key, "Train with plain LoRA, or merge and register the full checkpoint."),
        )


_HINTS = {
    "peft_type": "Only LORA adapters can be registered.",
    "task_type": "Only adapters for CAUSAL_LM can be registered.",
    "bias": 'Train with bias="none".',
    "init_lora_weights": "Convert it to plain LoRA: "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...).",
}
"""What helps against a refused field."""


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


def _pattern(
    values: Mapping[str, object], field: str, check: Callable[[object, str], _Number]
) -> tuple[tuple[ModulePattern, _Number], ...]:
    value = values.get(field) or {}
    if not isinstance(value, dict):
        raise _bad(field, value)
    patterns = compile_patterns(field, value, r"(.*\.)?(", ")$")
    return tuple((pattern, check(value[pattern.text], pattern.text)) for pattern in patterns)


def _names(values: Mapping[str, object], field: str) -> tuple[str, ...]:
    value = values.get(field) or []
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise _bad(field, value)
    check_number(field, value)
    return tuple(value)


def _names_or_pattern(values: Mapping[str, object], field: str) -> ModulePattern | frozenset[str]:
    value = values.get(field)
    if isinstance(value, str) and value:
        return compile_pattern(field, value)
    return frozenset(() if value == "" else _names(values, field))


def _tokens(values: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    value = values.get("trainable_token_indices") or {}
    named: dict[str, Any] = value if isinstance(value, dict) else {"embed_tokens": value}
    for items in named.values():
        if not isinstance(items, list) or not all(type(item) is int and item >= 0 for item in items):
            raise _bad("trainable_token_indices", value)
        if len(set(items)) != len(items):
            raise AdapterError("adapter_config.json: trainable_token_indices names a token twice")
        if len(items) > MAX_TOKENS:
            raise UnsupportedAdapterError(
                f"trainable_token_indices names {len(items)} tokens; at most {MAX_TOKENS} are supported",
                hint="Save the whole matrix with the adapter instead (modules_to_save).",
            )
    return {name: tuple(items) for name, items in named.items()}


def _targets(values: Mapping[str, object]) -> str | ModulePattern | frozenset[str]:
    value = values.get("target_modules")
    if isinstance(value, str) and value.lower() == _ALL_LINEAR:
        return _ALL_LINEAR
    return _names_or_pattern(values, "target_modules")


def _layers_pattern(values: Mapping[str, object]) -> tuple[ModulePattern, ...]:
    value = values.get("layers_pattern")
    texts = (value,) if isinstance(value, str) and value else _names(values, "layers_pattern")
    return compile_patterns("layers_pattern", texts, r"(?:^|.*?\.)", r"\.(?P<idx>\d+)\.")


def _first_match(patterns: Iterable[tuple[ModulePattern, _Number]], module: str, default: _Number) -> _Number:
    return next((value for pattern, value in patterns if pattern.matches(module)), default)


def _depends_on_order(patterns: Sequence[tuple[ModulePattern, _Number]], modules: Sequence[str]) -> bool:
    ordered = sorted(patterns, key=lambda item: item[0].text)
    return any(_first_match(patterns, one, 0) != _first_match(ordered, one, 0) for one in modules)


@lru_cache(4096)
def _suffixes(module: str) -> frozenset[str]:
    """What a name in a list may be: the path, or its last parts."""
    parts = module.split(".")
    return frozenset(".".join(parts[start:]) for start in range(len(parts)))


def _leaf_names(modules: Iterable[str]) -> str:
    return ", ".join(sorted({module.rpartition(".")[2] for module in modules}))
