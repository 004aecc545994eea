"""Single rows of the vocabulary matrices that an adapter trained (PEFT's `trainable_token_indices`).

Where a base ties its matrices, new rows of the embedding are new rows of the head too, unless the adapter
names other tokens for the head. New rows of the head alone stay there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from blockzoo.errors import AdapterBaseMismatchError, AdapterError, UnsupportedAdapterError
from blockzoo.folders.adapters.config import AdapterConfig
from blockzoo.folders.adapters.tensors import AdapterTensors
from blockzoo.folders.outline import EMBEDDING_MODULE, HEAD_MODULE, Outline
from blockzoo.folders.safetensors_io import TensorEntry

_NAMES = {
    "embed_tokens": EMBEDDING_MODULE,
    EMBEDDING_MODULE: EMBEDDING_MODULE,
    HEAD_MODULE: HEAD_MODULE,
}


@dataclass(frozen=True, slots=True)
class TrainedRows:
    """New rows of a vocabulary matrix.

    Attributes:
        module: name inside the block.
        source: name in the adapter's file of the rows [tokens, hidden].
        tokens: which rows they replace, in the order in which they are stored.
    """

    module: str
    source: str
    tokens: tuple[int, ...]


def check_names(config: AdapterConfig) -> None:
    """Raise UnsupportedAdapterError when trained tokens are in something else than a vocabulary matrix."""
    _named(config)


def plan_rows(
    config: AdapterConfig,
    tensors: AdapterTensors,
    rows: Mapping[str, int],
    base: Outline,
    equal: Callable[[str, str], bool],
) -> dict[int, TrainedRows]:
    """Return the new rows at each position of the chain.

    Args:
        config: from adapter_config.json.
        tensors: the adapter's.
        rows: of the two vocabulary matrices, by module.
        base: the chain it is registered on.
        equal: tells whether two tensors of the file have the same bytes.

    Raises:
        UnsupportedAdapterError: PEFT does something else with them than blocks do.
        AdapterError, AdapterBaseMismatchError: config, tensors and base contradict each other.
    """
    wanted = _named(config)
    source = {module: module for module in wanted}
    if base.is_tied and EMBEDDING_MODULE in wanted:
        differ = HEAD_MODULE in wanted and wanted[HEAD_MODULE] != wanted[EMBEDDING_MODULE]
        if differ and config.keeps_ties:
            raise AdapterError("trainable_token_indices differ between tied matrices (ensure_weight_tying)")
        if not differ:
            wanted[HEAD_MODULE] = wanted[EMBEDDING_MODULE]
            source[HEAD_MODULE] = _source_of_head(tensors, equal)
    if stray := tensors.tokens.keys() - wanted.keys():
        raise AdapterError(
            f"the adapter holds tokens of {min(stray)[:200]!r}, which trainable_token_indices leaves out",
            hint="adapter_config.json and adapter_model.safetensors do not belong together.",
        )
    found = {}
    for module, tokens in wanted.items():
        entry = tensors.tokens.get(source[module])
        _check(module, tokens, entry, rows[module], base)
        assert entry is not None
        position, name = (0, "embed_tokens") if module == EMBEDDING_MODULE else (base.head, HEAD_MODULE)
        found[position] = TrainedRows(name, entry.name, tokens)
    return found


def check_apart(
    config: AdapterConfig, targeted: set[str], rows: Mapping[int, TrainedRows], base: Outline
) -> None:
    """Refuse trained rows of a matrix on which something else is that PEFT does not combine with them."""
    for position in rows:
        module = EMBEDDING_MODULE if position == 0 else HEAD_MODULE
        if config.saves(module):
            what = "modules_to_save"
        elif module in targeted and module == EMBEDDING_MODULE:
            what = "LoRA"
        elif module in targeted and (config.use_dora or config.lora_bias):
            what = "DoRA" if config.use_dora else "LoRA with a bias"
        elif f"{HEAD_MODULE}.bias" in base.tensors and module == HEAD_MODULE:
            what = "a bias of the base"
        else:
            continue
        raise UnsupportedAdapterError(
            f"trainable_token_indices together with {what} on {module} is not supported",
            hint="Train the whole matrix (modules_to_save), or register the merged checkpoint.",
            module=module,
        )


def _named(config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Module -> tokens."""
    found: dict[str, tuple[int, ...]] = {}
    for name, tokens in config.tokens.items():
        module = _NAMES.get(name)
        if module is None or module in found:
            raise UnsupportedAdapterError(
                f"adapter_config.json: trainable_token_indices for {name[:80]!r} is not supported",
                hint="Tokens can be trained in embed_tokens and lm_head, each named once.",
            )
        found[module] = tokens
    return found


def _source_of_head(tensors: AdapterTensors, equal: Callable[[str, str], bool]) -> str:
    """The module whose rows a tied head has; a resized vocabulary is saved with them twice."""
    head, embedding = tensors.tokens.get(HEAD_MODULE), tensors.tokens.get(EMBEDDING_MODULE)
    if head is None or embedding is None:
        return EMBEDDING_MODULE
    if not equal(head.name, embedding.name):
        raise UnsupportedAdapterError("the adapter holds different trained tokens for tied matrices")
    return HEAD_MODULE


def _check(module: str, tokens: tuple[int, ...], entry: TensorEntry | None, rows: int, base: Outline) -> None:
    if entry is None:
        raise AdapterError(
            f"trainable_token_indices names tokens of {module}, but the adapter does not hold them",
            hint="adapter_config.json and adapter_model.safetensors do not belong together.",
        )
    hidden = base.tensors[f"{EMBEDDING_MODULE}.weight"].ref.shape[1]
    if entry.shape != (len(tokens), hidden):
        raise AdapterBaseMismatchError(
            f"tensor {entry.name!r} has shape {list(entry.shape)}, needed are {[len(tokens), hidden]}",
            hint="The adapter was trained on another base; name that base with --base.",
            tensor=entry.name,
            base=base.ref,
        )
    if beyond := [token for token in tokens if token >= rows]:
        raise AdapterBaseMismatchError(
            f"trainable_token_indices names token {beyond[0]}; {module} of base {base.ref} has {rows} rows",
            hint="The adapter was trained on another base; name that base with --base.",
            base=base.ref,
        )
