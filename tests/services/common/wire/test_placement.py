"""Wishes about placement on the wire."""

from __future__ import annotations

import pytest

from blockserve.common.api.placement import WishStatus
from blockserve.common.wire.placement import wish_from_message, wish_to_message


@pytest.mark.parametrize(
    "wish",
    [
        WishStatus("tale"),
        WishStatus(
            variant="tale",
            pinned=True,
            replicas=3,
            workers=("a", "b"),
            avoid=("c",),
            since="2024-05-06T07:08:09+00:00",
            chain="b3:" + 64 * "0",
            placed=("a", "b", "d"),
        ),
    ],
)
def test_a_wish_comes_back_as_it_was(wish: WishStatus) -> None:
    assert wish_from_message(wish_to_message(wish)) == wish
