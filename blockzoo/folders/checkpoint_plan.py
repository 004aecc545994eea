"""Matching a checkpoint's tensors with what its config promises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from blockzoo import families
from blockzoo.errors import InvalidConfigError, TensorMismatchError
from blockzoo.families import ChainPlan, Family
from blockzoo.folders.contents import OWN_PREFIX, InFile
from blockzoo.folders.fields import check_config
from blockzoo.folders.renaming import without_marks
from blockzoo.folders.safetensors_io import TensorEntry
from blockzoo.manifest import DType

_BODY = "model."
_FLOATS = (DType.F32, DType.F16, DType.BF16)


@dataclass(frozen=True, slots=True)
class Matched:
    """Which tensor of a folder goes where.

    Attributes:
        sources: (position, tensor name inside the block) -> name in the folder.
        ignored: names that no block uses -> where they are kept for export.
        notes: surprises in the checkpoint for the person who registers it, a sentence each.
    """

    sources: Mapping[tuple[int, str], str]
    ignored: Mapping[str, InFile]
    notes: tuple[str, ...] = ()


def plan_checkpoint(config: Mapping[str, object]) -> ChainPlan:
    """Find the family of a checkpoint and cut its config into blocks.

    Raises:
        UnsupportedArchitectureError: no family reads this architecture.
        UnsupportedFeatureError: see `Family.plan`; or a field asks for what no family computes.
        InvalidConfigError: see `Family.plan`.
    """
    plan = _family_of(config).plan(config)
    check_config(config, plan.unread)
    return plan


def _family_of(config: Mapping[str, object]) -> Family:
    names = config.get("architectures")
    if not names and isinstance(model_type := config.get("model_type"), str):
        # transformers goes by the model type alone.
        return families.for_model_type(model_type)
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise InvalidConfigError(
            "config.json: architectures does not name exactly one architecture",
            hint=f"Supported architectures: {', '.join(families.supported())}.",
            field="architectures",
        )
    family = families.for_architecture(names[0])
    model_type = config.get("model_type")
    if isinstance(model_type, str) and families.has_model_type(model_type):
        other = families.for_model_type(model_type)
        if other is not family:
            raise InvalidConfigError(
                f"config.json: architectures is {names[0]!r}, model_type is {model_type[:80]!r}",
                hint="transformers goes by model_type: correct the one that is wrong.",
                field="model_type",
            )
    return family


def match_tensors(plan: ChainPlan, entries: Mapping[str, TensorEntry]) -> Matched:
    """Say which tensor of the folder each block tensor is.

    Tied checkpoints hold one vocabulary matrix, under either name. When they hold
    two that differ they are not tied in fact, which transformers sees the same way.

    Raises:
        TensorMismatchError: a tensor is missing, unexpected, or of another shape or type.
    """
    family = families.get(plan.family)
    named, notes = _plain_names(entries)
    sources = {
        (position, name): planned.source
        for position, block in enumerate(plan.blocks)
        for name, planned in block.tensors.items()
    }
    if plan.tied:
        ends = [(0, "weight"), (len(plan.blocks) - 1, "lm_head.weight")]
        for this, other in (ends, ends[::-1]):
            if sources[this] not in named:
                sources[this] = sources[other]
    missing = [source for source in sources.values() if source not in named]
    if missing:
        raise TensorMismatchError(
            f"{len(missing)} tensors are missing, the first is {missing[0]!r}",
            hint="config.json and the weights do not belong together, or a shard is incomplete.",
            tensor=missing[0],
        )
    for position, block in enumerate(plan.blocks):
        for name, planned in block.tensors.items():
            _check(named[sources[position, name]], planned.shape)
    unused = sorted(named.keys() - set(sources.values()))
    unexpected = [name for name in unused if not family.is_ignorable(name)]
    if unexpected:
        raise TensorMismatchError(
            f"{len(unexpected)} tensors are not part of the architecture, the first is {unexpected[0]!r}",
            hint="config.json and the weights do not belong together, or an adapter was saved with them.",
            tensor=unexpected[0],
        )
    kept = {named[name].name: InFile(f"{OWN_PREFIX}tensors/{index}") for index, name in enumerate(unused)}
    return Matched({place: named[source].name for place, source in sources.items()}, kept, notes)


def _plain_names(entries: Mapping[str, TensorEntry]) -> tuple[dict[str, TensorEntry], tuple[str, ...]]:
    """The tensors by the names that the architecture gives them, and what was done to their own."""
    named, marks = without_marks(entries)
    notes = [f"names of tensors were read without {', '.join(map(repr, marks))}"] if marks else []
    if f"{_BODY}embed_tokens.weight" not in named and "embed_tokens.weight" in named:
        # As `save_pretrained` of the model without its head names them.
        named = {name if name.startswith("lm_head.") else _BODY + name: e for name, e in named.items()}
        notes.append(f"names of tensors were read with {_BODY!r} in front")
    return named, tuple(notes)


def _check(entry: TensorEntry, expected: tuple[int, ...]) -> None:
    if entry.shape != expected:
        raise TensorMismatchError(
            f"tensor {entry.name!r} has shape {list(entry.shape)}, config.json asks for {list(expected)}",
            hint="config.json and the weights do not belong together.",
            tensor=entry.name,
            found=list(entry.shape),
            expected=list(expected),
        )
    if entry.dtype not in _FLOATS:
        raise TensorMismatchError(
            f"tensor {entry.name!r} is {entry.dtype}; weights are F32, F16 or BF16",
            hint="Save the model in bfloat16, float16 or float32.",
            tensor=entry.name,
        )
