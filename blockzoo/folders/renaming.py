"""Names of tensors on which a wrapper of the training run left its mark, and the names without it.

torch.compile, FSDP, activation checkpointing and data parallelism put the wrapped module under a name of
their own; a state dict that was saved by hand holds the name of the adapter. None of this says anything
about the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from blockzoo.errors import TensorMismatchError

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_PARALLEL = "module."
_ADAPTER_NAME = re.compile(
    r"\.(lora_[A-Za-z_]+|modules_to_save|token_adapter\.[a-z_]+)\.([^.]+)(?=\.weight$|\.bias$|$)"
)

_Value = TypeVar("_Value")


def without_marks(entries: Mapping[str, _Value]) -> tuple[dict[str, _Value], tuple[str, ...]]:
    """Return the tensors by their names without marks, and the marks that were left out.

    Raises:
        TensorMismatchError: two tensors have the same name then.
    """
    marks: dict[str, None] = {}
    plain: dict[str, _Value] = {}
    is_parallel = bool(entries) and all(name.startswith(_PARALLEL) for name in entries)
    for name, value in entries.items():
        new = name
        if is_parallel:
            new = _leave_out(new, _PARALLEL, marks, count=1)
        for mark in _WRAPPERS:
            new = _leave_out(new, mark, marks)
        if new in plain:
            raise TensorMismatchError(f"two tensors are {new!r} without the marks of wrappers", tensor=new)
        plain[new] = value
    return plain, tuple(marks)


def without_adapter_name(entries: Mapping[str, _Value]) -> tuple[dict[str, _Value], tuple[str, ...]]:
    """Return an adapter's tensors without the adapter's name inside theirs, and that name.

    PEFT leaves the name out when it saves. A name is left out where all tensors have the same one.
    """
    found = {match[2] for name in entries if (match := _ADAPTER_NAME.search(name))} - {"weight", "bias"}
    if len(found) != 1:
        return dict(entries), ()
    (name,) = found
    mark = f".{name}"
    plain = {
        _ADAPTER_NAME.sub(lambda match: f".{match[1]}" if match[2] == name else match[0], key): value
        for key, value in entries.items()
    }
    return (plain, (mark,)) if len(plain) == len(entries) else (dict(entries), ())


def _leave_out(name: str, mark: str, marks: dict[str, None], count: int = -1) -> str:
    new = name.replace(mark, "", count)
    if new != name:
        marks[mark] = None
    return new
