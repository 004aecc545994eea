"""Remarks on a registration: what was left out, and what was found out instead of being said."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath

from blockzoo.errors import VariantNotFoundError
from blockzoo.folders.checkpoint import FolderKind, ModelFolder
from blockzoo.folders.files import TOKENIZER
from blockzoo.folders.tokenizers.conversion import CONVERTED
from blockzoo.manifest import VariantRecord
from blockzoo.names import parse_ref
from blockzoo.store.writing import WritableZoo

_NAMED = 3
_CACHED = re.compile(r"models--[^/]+--([^/]+)/snapshots/([^/]*)")
"""A folder in the cache of the hub: an outer folder has the name of the model, and this one of the commit."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OTHER_WEIGHTS = re.compile(r"(pytorch_model|adapter_model|model|consolidated)\b.*\.(bin|pth?|gguf)")
"""Files that may hold the same model in another form; not a trainer's own state."""


def remarks_on(folder: ModelFolder, record: VariantRecord, *, base_named: bool) -> tuple[str, ...]:
    """Sentences about what was left out, and what was found out instead of being said.

    Args:
        folder: what was registered.
        record: the version that it became.
        base_named: whether the caller named the base.
    """
    found = []
    if not {TOKENIZER, CONVERTED} & record.files.keys():
        found.append(f"there is no {TOKENIZER}: requests have to give token ids, text and chats are refused")
    if pickles := sorted(item.name for item in folder.path.iterdir() if _OTHER_WEIGHTS.fullmatch(item.name)):
        more = f" and {len(pickles) - _NAMED} more" if len(pickles) > _NAMED else ""
        found.append(f"not read, since the weights are in safetensors: {', '.join(pickles[:_NAMED])}{more}")
    if folder.kind is FolderKind.ADAPTER and not base_named:
        found.append(
            f"the base is {record.provenance.get('base')}, by the name in adapter_config.json "
            f"({_recorded(folder.config)!r}); --base names another one"
        )
    return tuple(found)


def doubt_about_base(store: WritableZoo, folder: ModelFolder, record: VariantRecord) -> str:
    """A sentence where an adapter names another base than the one it was registered on; else "".

    Shapes cannot tell models of one size apart, so names are compared: that of the variant, and that of the
    folder or hub model that it was registered from. PEFT notes nothing of the base's weights. It notes the
    revision that the base was loaded with, which tells weights of one name apart where it is a commit and
    the base came from the hub or its cache.
    """
    recorded, ref = _recorded(folder.config), record.provenance.get("base")
    if folder.kind is not FolderKind.ADAPTER or not recorded or ref is None:
        return ""
    try:
        base = store.resolve(*parse_ref(ref))
    except VariantNotFoundError:
        return ""  # nothing was changed, and that version of the base was removed since
    known = _names_of(base)
    if _tail(recorded) in known:
        return _other_commit(folder.config, base, recorded, ref)
    source = base.provenance.get("source", "")
    told = f"{ref}, registered from {source}" if source else ref
    others = [name for name in store.names() if name != base.name and name.lower() == _tail(recorded)]
    better = f"; the variant {others[0]} has that name" if others else ""
    return f"the adapter says that it was trained on {recorded!r}, and its base here is {told}{better}"


def _other_commit(config: Mapping[str, object], base: VariantRecord, recorded: str, ref: str) -> str:
    theirs = config.get("revision")
    cached = _CACHED.search(base.provenance.get("source", ""))
    ours = base.provenance.get("revision") or (cached[2] if cached else "")
    if not isinstance(theirs, str) or not (_COMMIT.fullmatch(theirs) and _COMMIT.fullmatch(ours)):
        return ""  # branches and tags move
    if ours == theirs:
        return ""
    return f"the adapter was trained on commit {theirs} of {recorded!r}, and its base {ref} is commit {ours}"


def _names_of(base: VariantRecord) -> set[str]:
    source = base.provenance.get("source", "")
    cached = _CACHED.search(source)
    facts = (base.name, source, cached[1] if cached else "")
    return {_tail(fact) for fact in facts if fact}


def _recorded(config: Mapping[str, object]) -> str:
    value = config.get("base_model_name_or_path")
    return value[:200] if isinstance(value, str) else ""


def _tail(name: str) -> str:
    return PurePath(name.replace("\\", "/").rstrip("/")).name.lower()
