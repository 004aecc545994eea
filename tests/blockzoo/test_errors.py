"""Errors say the same in another process."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest

import blockserve.common.errors  # noqa: F401 - has subclasses
from blockzoo.errors import BlockzooError

ARGUMENTS: tuple[tuple[object, ...], ...] = (("a message",), ("name", 3), ("name", ["near", "nearer"]))


def kinds(kind: type[BlockzooError] = BlockzooError) -> Iterator[type[BlockzooError]]:
    yield kind
    for further in kind.__subclasses__():
        yield from kinds(further)


def made(kind: type[BlockzooError]) -> BlockzooError:
    for arguments in ARGUMENTS:
        try:
            return kind(*arguments)  # type: ignore[arg-type]
        except TypeError:
            continue
    pytest.fail(f"no arguments for {kind}")


@pytest.mark.parametrize("kind", dict.fromkeys(kinds()))
def test_a_pickled_error_says_the_same(kind: type[BlockzooError]) -> None:
    error = made(kind)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert vars(again) == vars(error)
    assert again.args == error.args
