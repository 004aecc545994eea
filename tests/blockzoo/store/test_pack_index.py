"""The index of packs in memory, held against a dictionary while packs come and go."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockzoo import layout
from blockzoo.store.pack_index import PackIndex
from blockzoo.store.packs import Pack, build


def key_of(number: int) -> str:
    return layout.blob_key(hashlib.sha256(b"%d" % number).hexdigest())


def pack_of(*numbers: int) -> Pack:
    key, chunks = build({key_of(number): b"%d" % number for number in numbers})
    return Pack(key, bytes(chunks[1]))


NUMBERS = range(40)
PACKS = st.sets(st.sampled_from(NUMBERS), min_size=1, max_size=6)
STEPS = st.lists(st.tuples(st.sampled_from(["add", "add several", "forget", "restart"]), PACKS), max_size=40)


@settings(deadline=None, max_examples=150)
@given(STEPS)
def test_packs_come_and_go(steps):
    index, held = PackIndex(), {}
    for step, numbers in steps:
        if step == "add":
            pack = pack_of(*numbers)
            index.add([pack])
            held[pack.key] = set(numbers)
        elif step == "add several":
            several = [pack_of(number) for number in numbers]
            index.add(several)
            held |= {pack.key: {number} for pack, number in zip(several, numbers, strict=True)}
        elif step == "forget":
            for pack in sorted(held)[: len(numbers)]:
                index.forget(pack)
                del held[pack]
        else:  # as another process does with a summary, which lists one pack that has gone
            packs = sorted(held)
            entries = index.entries_of(packs)
            index = PackIndex()
            index.add_summary(packs, entries, set(packs[1:]))
            if packs:
                del held[packs[0]]
        assert index.packs == held.keys()
        for number in NUMBERS:
            assert set(index.find(key_of(number))) == {key for key, has in held.items() if number in has}
        keys = list(map(key_of, NUMBERS))
        found = set(index.candidates(keys))
        assert found >= {key_of(number) for numbers in held.values() for number in numbers}
        twice = {number for number in NUMBERS if sum(number in has for has in held.values()) > 1}
        several = [{key for key, has in held.items() if number in has} for number in twice]
        assert sorted(map(sorted, index.repeated())) == sorted(map(sorted, several))


@pytest.mark.parametrize("forgotten", [0, 50, 99, 100])
def test_what_has_gone_leaves_memory(forgotten):
    index, packs = PackIndex(), [pack_of(number) for number in range(100)]
    index.add(packs)
    for pack in packs[:forgotten]:
        index.forget(pack.key)
        index.forget(pack.key)
    assert all(index.find(key_of(number)) == [] for number in range(forgotten))
    assert [index.find(key_of(number)) for number in range(forgotten, 100)] == [
        [pack.key] for pack in packs[forgotten:]
    ]
    assert sum(len(run.entries) for run in index._runs) <= 2 * (100 - forgotten) + 64
    index.add(packs)
    assert [index.find(key_of(number)) for number in range(100)] == [[pack.key] for pack in packs]


def test_nothing_is_found_in_nothing():
    index = PackIndex()
    assert index.find(key_of(1)) == []
    assert index.candidates([key_of(1)]) == []
    assert index.candidates([]) == []
    assert list(index.repeated()) == []
    index.add([Pack(layout.pack_key("ab" * 32), b"")])
    assert index.candidates([key_of(1)]) == []
    assert index.find(key_of(1)) == []
