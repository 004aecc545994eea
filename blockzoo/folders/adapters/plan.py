"""Matching an adapter's tensors with the base it is registered on.

Whole tensors replace the base's in a private block. When the base ties its two
vocabulary matrices, PEFT loads a matrix that is not in modules_to_save into the
shared one, so both change; a matrix in modules_to_save becomes a copy of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from blockzoo.errors import (
    AdapterBaseMismatchError,
    AdapterError,
    UnknownTargetError,
    UnsupportedAdapterError,
)
from blockzoo.folders.adapters.config import AdapterConfig
from blockzoo.folders.adapters.rows import TrainedRows, check_apart, check_names, plan_rows
from blockzoo.folders.adapters.tensors import AdapterTensors, sort_tensors
from blockzoo.folders.contents import OWN_PREFIX, InFile
from blockzoo.folders.outline import EMBEDDING_MODULE, HEAD_MODULE, Outline, Place
from blockzoo.folders.renaming import without_adapter_name, without_marks
from blockzoo.folders.safetensors_io import TensorEntry

_EMBEDDING = f"{EMBEDDING_MODULE}.weight"
_HEAD = f"{HEAD_MODULE}.weight"


@dataclass(frozen=True, slots=True)
class LoraPair:
    """LoRA on one linear module, or on the embedding.

    Attributes:
        module: name inside the block, for example "self_attn.q_proj"; "embed_tokens" for the embedding.
        source_a: name of the [rank, in] matrix in the adapter's file; [rank, vocabulary] for the embedding.
        source_b: name of the [out, rank] matrix.
        rank: of both.
        scale: factor of their product.
        source_bias: name of the bias [out] that is added to the product before it is scaled.
        source_magnitude: name of the length [out] of each output's weights, with DoRA.
    """

    module: str
    source_a: str
    source_b: str
    rank: int
    scale: float
    source_bias: str | None = None
    source_magnitude: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is LoRA on a linear module and nothing more."""
        return not (self.source_bias or self.source_magnitude or self.module == "embed_tokens")

    @property
    def sources(self) -> Mapping[str, str]:
        """Name of a tensor inside the block -> name in the adapter's file."""
        found = {
            "lora_A": self.source_a,
            "lora_B": self.source_b,
            "lora_bias": self.source_bias,
            "magnitude": self.source_magnitude,
        }
        return {f"{self.module}.{part}": source for part, source in found.items() if source is not None}


@dataclass(frozen=True)
class AdapterPlan:
    """What an adapter changes.

    Attributes:
        pairs: chain position -> LoRA pairs there.
        rows: chain position -> single rows of a vocabulary matrix that are new.
        replaced: chain position -> tensor name inside the base block -> name in the adapter's file.
        ignored: names in the adapter's file that PEFT does not read -> where they are kept for export.
        notes: surprises in the adapter for the person who registers it, a sentence each.
    """

    pairs: Mapping[int, tuple[LoraPair, ...]]
    replaced: Mapping[int, Mapping[str, str]]
    ignored: Mapping[str, InFile]
    notes: tuple[str, ...] = ()
    rows: Mapping[int, TrainedRows] = field(default_factory=dict)

    @cached_property
    def adapted(self) -> Mapping[int, Mapping[str, str]]:
        """Chain position -> tensor name inside the adapter's block there -> name in the adapter's file."""
        found: dict[int, dict[str, str]] = {}
        for position in sorted(self.pairs.keys() | self.rows.keys()):
            sources = found.setdefault(position, {})
            for pair in self.pairs.get(position, ()):
                sources |= pair.sources
            if position in self.rows:
                sources[f"{self.rows[position].module}.rows"] = self.rows[position].source
        return found


def plan_adapter(
    config: AdapterConfig,
    entries: Mapping[str, TensorEntry],
    base: Outline,
    equal: Callable[[str, str], bool],
) -> AdapterPlan:
    """Say what an adapter changes in a base chain.

    Args:
        config: from adapter_config.json.
        entries: the tensors in the adapter's file.
        base: the chain it is registered on.
        equal: tells whether two tensors of the file have the same bytes.

    Raises:
        AdapterBaseMismatchError: shapes or layers are not those of the base.
        UnknownTargetError: modules are named that the base does not have.
        UnsupportedAdapterError: blocks cannot compute it.
        AdapterError: config and tensors contradict each other.
    """
    check_names(config)
    config.check_effort(len(base.modules))
    targeted = config.targeted(base.modules, base.linears, HEAD_MODULE)
    if config.keeps_ties and base.is_tied and EMBEDDING_MODULE in targeted and HEAD_MODULE not in targeted:
        targeted.append(HEAD_MODULE)
    plain, marks = without_marks(entries)
    plain, names = without_adapter_name(plain)
    tensors = sort_tensors(plain, config)
    _check_lora_modules(config, targeted, tensors, base)
    whole = _check_whole(config, tensors, set(targeted), base)
    replaced = _share_when_tied(config, whole, base, equal)
    _check_vocabulary(replaced, base)
    vocabulary = _vocabulary(replaced, base)
    rows = plan_rows(config, tensors, vocabulary, base, equal)
    check_apart(config, set(targeted), rows, base)
    pairs: dict[int, list[LoraPair]] = {}
    for module in targeted:
        place = base.tensors[f"{module}.weight"]
        pair = _pair(config, module, place, vocabulary, tensors.lora[module], base)
        pairs.setdefault(place.position, []).append(pair)
    by_position: dict[int, dict[str, str]] = {}
    for name, entry in replaced.items():
        place = base.tensors[name]
        by_position.setdefault(place.position, {})[place.name] = entry.name
    ignored = {
        name: InFile(f"{OWN_PREFIX}tensors/{index}") for index, name in enumerate(sorted(tensors.ignored))
    }
    notes = _notes(config, base, targeted, (*marks, *names))
    return AdapterPlan({key: tuple(value) for key, value in pairs.items()}, by_position, ignored, notes, rows)


def _notes(
    config: AdapterConfig, base: Outline, targeted: list[str], marks: tuple[str, ...]
) -> tuple[str, ...]:
    notes = []
    if marks:
        notes.append(f"names of tensors were read without {', '.join(map(repr, marks))}")
    if missing := config.without_effect(base.modules):
        notes.append(f"target_modules names {', '.join(missing)[:200]}, which the base does not have")
    notes += [
        f"the order of {field} matters here, and PEFT sorts it when it saves the adapter again"
        for field in config.order_matters(targeted)
    ]
    return tuple(notes)


def _check_lora_modules(
    config: AdapterConfig, targeted: list[str], tensors: AdapterTensors, base: Outline
) -> None:
    for module in tensors.lora:
        if module not in base.modules:
            raise _unknown_module(module, base)
    for module in targeted:
        if module != EMBEDDING_MODULE and module not in base.linears:
            raise UnsupportedAdapterError(
                f"LoRA on {module!r}, which is not a linear module, is not supported"
            )
        if module == EMBEDDING_MODULE and config.lora_bias:
            raise UnsupportedAdapterError(
                "adapter_config.json: lora_bias together with LoRA on embed_tokens is not supported",
                hint="PEFT refuses it too; set lora_bias to false.",
                module=module,
            )
        _check_parts(config, module, tensors.lora.get(module, {}), base)
    stray = tensors.lora.keys() - set(targeted)
    if stray:
        raise AdapterError(
            f"the adapter holds matrices for {min(stray)!r}, which its target_modules leave out",
            hint="adapter_config.json and adapter_model.safetensors do not belong together.",
            module=min(stray),
        )


_PARTS = {"bias": "lora_bias", "magnitude": "use_dora"}
"""Parts beside the two matrices, and the fields that say whether they are there."""


def _check_parts(config: AdapterConfig, module: str, found: Mapping[str, TensorEntry], base: Outline) -> None:
    """Check that a module has both matrices, and what else the config says."""
    if not found.keys() >= {"A", "B"}:
        raise AdapterBaseMismatchError(
            f"target_modules names {module!r} of base {base.ref}, "
            "but the adapter does not hold its two matrices",
            hint="The adapter was probably trained on another base; name that base with --base.",
            base=base.ref,
            module=module,
        )
    for part, field_name in _PARTS.items():
        if (part in found) != getattr(config, field_name):
            holds = "holds" if part in found else "does not hold"
            raise AdapterError(
                f"the adapter {holds} a {part} for {module!r}, and its {field_name} says otherwise",
                hint="adapter_config.json and adapter_model.safetensors do not belong together.",
                module=module,
            )


def _unknown_module(module: str, base: Outline) -> AdapterError:
    layer = re.match(r"model\.layers\.(\d+)\.", module)
    if layer and layer[1].isascii() and len(layer[1]) < 9 and int(layer[1]) >= base.num_layers:
        return AdapterBaseMismatchError(
            f"the adapter changes {module!r}, but base {base.ref} has {base.num_layers} layers",
            hint="The adapter was trained on another base; name that base with --base.",
            base=base.ref,
            module=module,
        )
    leaves = ", ".join(sorted({linear.rpartition(".")[2] for linear in base.linears}))
    return UnknownTargetError(
        f"the adapter changes {module[:200]!r}, which base {base.ref} does not have",
        hint=f"Modules that can be adapted: {leaves}.",
        base=base.ref,
        module=module[:200],
    )


def _pair(
    config: AdapterConfig,
    module: str,
    place: Place,
    vocabulary: Mapping[str, int],
    parts: Mapping[str, TensorEntry],
    base: Outline,
) -> LoraPair:
    a, b = parts["A"], parts["B"]
    rank = config.rank_of(module)
    outer, inner = place.ref.shape
    outer = vocabulary.get(module, outer)
    if module == EMBEDDING_MODULE:
        inner, outer = outer, inner
    _check_shape(a, (a.shape[0] if a.shape else 0, inner), base)
    _check_shape(b, (outer, b.shape[-1] if b.shape else 0), base)
    for part in parts.keys() - {"A", "B"}:
        _check_shape(parts[part], (outer,), base)
    if not a.shape[0] == b.shape[1] == rank:
        raise AdapterError(
            f"{module}: lora_A has rank {a.shape[0]}, lora_B has rank {b.shape[1]}, "
            f"adapter_config.json says {rank}",
            hint="adapter_config.json and adapter_model.safetensors do not belong together.",
            module=module,
        )
    inside = "embed_tokens" if module == EMBEDDING_MODULE else place.name.removesuffix(".weight")
    names = {part: entry.name for part, entry in parts.items()}
    scale = config.scale_of(module)
    return LoraPair(inside, a.name, b.name, rank, scale, names.get("bias"), names.get("magnitude"))


def _check_shape(entry: TensorEntry, expected: tuple[int, ...], base: Outline) -> None:
    if entry.shape != expected:
        raise AdapterBaseMismatchError(
            f"tensor {entry.name!r} has shape {list(entry.shape)}, base {base.ref} needs {list(expected)}",
            hint="The adapter was trained on another base; name that base with --base.",
            tensor=entry.name,
            found=list(entry.shape),
            expected=list(expected),
            base=base.ref,
        )


def _check_whole(
    config: AdapterConfig, tensors: AdapterTensors, targeted: set[str], base: Outline
) -> dict[str, TensorEntry]:
    """Return the whole tensors after checking that PEFT would load each of them, and that none is missing."""
    adapted = targeted | tensors.tokens.keys()
    for name, entry in tensors.whole.items():
        module = name.rpartition(".")[0]
        if name not in base.tensors:
            raise _unknown_module(module, base)
        if (module in adapted) != (name in tensors.inner):
            raise AdapterError(f"tensor {entry.name!r} does not fit target_modules", tensor=entry.name)
        place = base.tensors[name]
        rows = entry.shape[:1] if name in (_EMBEDDING, _HEAD) else place.ref.shape[:1]
        _check_shape(entry, (*rows, *place.ref.shape[1:]), base)
    for suffix in config.saved:
        if not any(path.endswith(suffix) for name in base.tensors for path in _ancestors(name)):
            raise UnknownTargetError(
                f"modules_to_save names {suffix[:200]!r}, which base {base.ref} does not have", base=base.ref
            )
    for name in base.tensors:
        if _is_saved(config, name) and name not in tensors.whole:
            raise AdapterError(
                f"modules_to_save covers {name!r}, but the adapter does not hold it",
                hint="adapter_config.json and adapter_model.safetensors do not belong together.",
                tensor=name,
            )
    return tensors.whole


def _is_saved(config: AdapterConfig, name: str) -> bool:
    return bool(config.saved) and any(config.saves(path) for path in _ancestors(name))


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _share_when_tied(
    config: AdapterConfig, whole: Mapping[str, TensorEntry], base: Outline, equal: Callable[[str, str], bool]
) -> dict[str, TensorEntry]:
    replaced = dict(whole)
    if not base.is_tied:
        return replaced
    bare = [name for name in (_EMBEDDING, _HEAD) if name in whole and not _is_saved(config, name)]
    if len(bare) == 2 and not equal(whole[_EMBEDDING].name, whole[_HEAD].name):
        raise UnsupportedAdapterError(
            f"the adapter holds different matrices for embed_tokens and lm_head, which base {base.ref} ties",
            hint="Name the one that was trained in modules_to_save.",
            base=base.ref,
        )
    if len(bare) == 1:
        other = _HEAD if bare[0] == _EMBEDDING else _EMBEDDING
        replaced.setdefault(other, whole[bare[0]])
    return replaced


def _vocabulary(replaced: Mapping[str, TensorEntry], base: Outline) -> dict[str, int]:
    """Rows of the two vocabulary matrices, by module."""
    return {
        module: replaced[name].shape[0] if name in replaced else base.tensors[name].ref.shape[0]
        for module, name in ((EMBEDDING_MODULE, _EMBEDDING), (HEAD_MODULE, _HEAD))
    }


def _check_vocabulary(replaced: Mapping[str, TensorEntry], base: Outline) -> None:
    rows = _vocabulary(replaced, base)
    if rows[EMBEDDING_MODULE] != rows[HEAD_MODULE]:
        raise AdapterBaseMismatchError(
            f"with this adapter the embedding would have {rows[EMBEDDING_MODULE]} rows "
            f"and the head {rows[HEAD_MODULE]}",
            hint="Save both matrices with the adapter: save_pretrained(..., save_embedding_layers=True).",
            base=base.ref,
        )
