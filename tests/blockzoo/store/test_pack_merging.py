"""Which packs a collection writes together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from blockzoo.store.pack_merging import (
    MAX_MERGED_BYTES,
    MAX_MOVED_BYTES,
    MIN_MERGED,
    SMALL_PACK_BYTES,
    groups,
)

SIZES = st.dictionaries(
    st.integers(0, 999).map("{:03}".format), st.integers(1, 2 * SMALL_PACK_BYTES), max_size=80
)


@given(
    SIZES, st.dictionaries(st.text(max_size=3), st.sets(st.integers(0, 999).map("{:03}".format)), max_size=9)
)
def test_groups_are_small_and_each_pack_is_in_one(sizes, repeated):
    found = list(groups(sizes, repeated))
    packs = [pack for group in found for pack in group]
    assert len(packs) == len(set(packs))
    assert set(packs) <= sizes.keys()
    for group in found:
        if len(group) > 1:
            assert len(group) >= MIN_MERGED
            assert sum(sizes[pack] for pack in group) <= MAX_MERGED_BYTES
            assert all(sizes[pack] < SMALL_PACK_BYTES for pack in group)
    # What stays small is less than what a group needs, and of copies no two stay unless merging drops one.
    left = [pack for pack, size in sizes.items() if size < SMALL_PACK_BYTES and pack not in packs]
    assert len(left) < MIN_MERGED
    for held in repeated.values():
        assert len(held & sizes.keys() - set(packs)) <= 1


def test_a_few_small_packs_stay():
    assert list(groups({str(number): 1 for number in range(MIN_MERGED - 1)}, {})) == []
    assert len(list(groups({str(number): 1 for number in range(MIN_MERGED)}, {}))) == 1


def test_what_is_merged_is_not_merged_again_before_there_is_much_more():
    size, merges = 1000, 0
    packs: dict[str, int] = {}
    for number in range(1000):
        packs[f"{number:05}"] = size
        for group in list(groups(packs, {})):
            merges += len(group)
            packs[f"m{number:05}"] = sum(packs.pop(pack) for pack in group)
    assert len(packs) < 4 * MIN_MERGED
    assert merges < 1000 * 8


def test_a_collection_copies_a_bounded_number_of_bytes():
    many = {f"{number:05}": SMALL_PACK_BYTES - 1 for number in range(1000)}
    first = list(groups(many, {}))
    assert (
        MAX_MOVED_BYTES - MAX_MERGED_BYTES < sum(many[p] for group in first for p in group) <= MAX_MOVED_BYTES
    )
    large = {f"{number:05}": 60 << 20 for number in range(40)}
    assert sum(large[p] for group in groups(large, {"key": set(large)}) for p in group) <= MAX_MOVED_BYTES
