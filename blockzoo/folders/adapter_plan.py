"""Matching an adapter's tensors with the base it is registered on.

PEFT puts ``base_model.model.`` before the base's own names. A tensor is one of

- ``MODULE.lora_A.weight`` [rank, in] and ``MODULE.lora_B.weight`` [out, rank];
- a whole tensor: of a module in modules_to_save, or the embedding or output matrix
  that PEFT saves when they were resized or adapted (``MODULE.base_layer.weight`` then).

Whole tensors replace the base's in a private block. When the base ties its two
vocabulary matrices, PEFT loads a matrix that is not in modules_to_save into the
shared one, so both change; a matrix in modules_to_save becomes a copy of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from blockzoo.errors import (
    AdapterBaseMismatchError,
    AdapterError,
    UnknownTargetError,
    UnsupportedAdapterError,
)
from blockzoo.folders.adapter import AdapterConfig
from blockzoo.folders.contents import OWN_PREFIX, InFile
from blockzoo.folders.outline import EMBEDDING_MODULE, HEAD_MODULE, Outline, Place
from blockzoo.folders.renaming import without_adapter_name, without_marks
from blockzoo.folders.safetensors_io import TensorEntry
from blockzoo.manifest import DType

_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.lora_([AB])\.weight")
_COPY = re.compile(r"(.+)(\.modules_to_save|\.original_module)\.[^.]+")
_FLOATS = (DType.F32, DType.F16, DType.BF16)
_EMBEDDING = f"{EMBEDDING_MODULE}.weight"
_HEAD = f"{HEAD_MODULE}.weight"
_FOREIGN = {
    ".lora_embedding_": "LoRA on embeddings",
    ".lora_magnitude_vector": "DoRA",
    ".lora_B.bias": "LoRA with a bias",
    ".token_adapter.": "trainable tokens",
}


@dataclass(frozen=True, slots=True)
class LoraPair:
    """LoRA on one linear module.

    Attributes:
        module: name inside the block, for example "self_attn.q_proj".
        source_a: name of the [rank, in] matrix in the adapter's file.
        source_b: name of the [out, rank] matrix.
        rank: of both.
        scale: factor of their product.
    """

    module: str
    source_a: str
    source_b: str
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What an adapter changes.

    Attributes:
        pairs: chain position -> LoRA pairs there.
        replaced: chain position -> tensor name inside the base block -> name in the adapter's file.
        ignored: names in the adapter's file that PEFT does not read -> where they are kept for export.
        notes: what whoever registers the adapter may not expect, a sentence each.
    """

    pairs: Mapping[int, tuple[LoraPair, ...]]
    replaced: Mapping[int, Mapping[str, str]]
    ignored: Mapping[str, InFile]
    notes: tuple[str, ...] = ()


@dataclass
class _Sorted:
    """The adapter's tensors by what they are; paths without PEFT's prefix."""

    lora: dict[str, dict[str, TensorEntry]] = field(default_factory=dict)
    whole: dict[str, TensorEntry] = field(default_factory=dict)
    inner: set[str] = field(default_factory=set)
    """Whole tensors saved from below a LoRA module (`base_layer`)."""
    ignored: list[str] = field(default_factory=list)
    """Names in the file of copies that PEFT keeps beside a module in modules_to_save, and does not read."""


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
    targeted = config.targeted(base.modules, base.linears, HEAD_MODULE)
    plain, marks = without_marks(entries)
    plain, names = without_adapter_name(plain)
    tensors = _sort(plain, config)
    _check_lora_modules(targeted, tensors, base)
    whole = _check_whole(config, tensors, set(targeted), base)
    replaced = _share_when_tied(config, whole, base, equal)
    _check_vocabulary(replaced, base)
    pairs: dict[int, list[LoraPair]] = {}
    for module in targeted:
        place = base.linears[module]
        rows = replaced[_HEAD].shape[0] if module == HEAD_MODULE and _HEAD in replaced else place.ref.shape[0]
        pair = _pair(config, module, place, rows, tensors.lora[module], base)
        pairs.setdefault(place.position, []).append(pair)
    by_position: dict[int, dict[str, str]] = {}
    for name, entry in replaced.items():
        place = base.tensors[name]
        by_position.setdefault(place.position, {})[place.name] = entry.name
    ignored = {
        name: InFile(f"{OWN_PREFIX}tensors/{index}") for index, name in enumerate(sorted(tensors.ignored))
    }
    notes = _notes(config, base, targeted, (*marks, *names))
    return AdapterPlan({key: tuple(value) for key, value in pairs.items()}, by_position, ignored, notes)


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


def _sort(entries: Mapping[str, TensorEntry], config: AdapterConfig) -> _Sorted:
    tensors = _Sorted()
    for name, entry in entries.items():
        for mark, method in _FOREIGN.items():
            if mark in name:
                raise UnsupportedAdapterError(
                    f"the adapter holds {name!r}: {method} is not supported",
                    hint="Train with plain LoRA on linear modules, or register the merged checkpoint.",
                    tensor=name,
                )
        if entry.dtype not in _FLOATS:
            raise AdapterError(
                f"tensor {name!r} is {entry.dtype}; adapters are F32, F16 or BF16", tensor=name
            )
        path = name.removeprefix(_PREFIX)
        if (copy := _COPY.fullmatch(path)) and config.saves(copy[1]) and name.replace(copy[2], "") in entries:
            tensors.ignored.append(entry.name)
            continue
        lora = _LORA.fullmatch(path)
        if lora:
            slot, key = tensors.lora.setdefault(lora[1], {}), lora[2]
        else:
            slot, key = tensors.whole, path.replace(".base_layer.", ".")
            if key != path:
                tensors.inner.add(key)
        if key in slot:
            raise AdapterError(f"the adapter holds {path!r} twice", tensor=name)
        slot[key] = entry
    return tensors


def _check_lora_modules(targeted: list[str], tensors: _Sorted, base: Outline) -> None:
    for module in tensors.lora:
        if module not in base.modules:
            raise _unknown_module(module, base)
    for module in targeted:
        if module == EMBEDDING_MODULE:
            raise UnsupportedAdapterError(
                "LoRA on embed_tokens is not supported",
                hint="Put embed_tokens into modules_to_save instead, or register the merged checkpoint.",
                target=module,
            )
        if module not in base.linears:
            raise UnsupportedAdapterError(
                f"LoRA on {module!r}, which is not a linear module, is not supported"
            )
        if set(tensors.lora.get(module, ())) != {"A", "B"}:
            raise AdapterBaseMismatchError(
                f"target_modules names {module!r} of base {base.ref}, "
                "but the adapter does not hold its two matrices",
                hint="The adapter was probably trained on another base; name that base with --base.",
                base=base.ref,
                module=module,
            )
    stray = tensors.lora.keys() - set(targeted)
    if stray:
        raise AdapterError(
            f"the adapter holds matrices for {min(stray)!r}, which its target_modules leave out",
            hint="adapter_config.json and adapter_model.safetensors do not belong together.",
            module=min(stray),
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
    rows: int,
    matrices: Mapping[str, TensorEntry],
    base: Outline,
) -> LoraPair:
    a, b = matrices["A"], matrices["B"]
    rank = config.rank_of(module)
    _check_shape(a, (a.shape[0] if a.shape else 0, place.ref.shape[1]), base)
    _check_shape(b, (rows, b.shape[-1] if b.shape else 0), base)
    if not a.shape[0] == b.shape[1] == rank:
        raise AdapterError(
            f"{module}: lora_A has rank {a.shape[0]}, lora_B has rank {b.shape[1]}, "
            f"adapter_config.json says {rank}",
            hint="adapter_config.json and adapter_model.safetensors do not belong together.",
            module=module,
        )
    inside = place.name.removesuffix(".weight")
    return LoraPair(inside, a.name, b.name, rank, config.scale_of(module))


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
    config: AdapterConfig, tensors: _Sorted, targeted: set[str], base: Outline
) -> dict[str, TensorEntry]:
    """Return the whole tensors after checking that PEFT would load each of them, and that none is missing."""
    for name, entry in tensors.whole.items():
        module = name.rpartition(".")[0]
        if name not in base.tensors:
            raise _unknown_module(module, base)
        if (module in targeted) != (name in tensors.inner):
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
    return any(config.saves(path) for path in _ancestors(name))


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


def _check_vocabulary(replaced: Mapping[str, TensorEntry], base: Outline) -> None:
    rows = {
        name: replaced[name].shape[0] if name in replaced else base.tensors[name].ref.shape[0]
        for name in (_EMBEDDING, _HEAD)
    }
    if rows[_EMBEDDING] != rows[_HEAD]:
        raise AdapterBaseMismatchError(
            f"with this adapter the embedding would have {rows[_EMBEDDING]} rows and the head {rows[_HEAD]}",
            hint="Save both matrices with the adapter: save_pretrained(..., save_embedding_layers=True).",
            base=base.ref,
        )
