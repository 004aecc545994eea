"""Wishes about placement: kept in the zoo, and no writer loses one to another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from blockzoo import layout
from blockzoo.errors import ConflictError, CorruptManifestError, InvalidNameError
from blockzoo.manifest import ChainId, VariantName
from blockzoo.store.wishes import PlacementWish, WishBook
from blockzoo.zoo import Zoo

BOT = VariantName("bot")


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    return Zoo.open(tmp_path / "zoo", create=True)


def pin(wish: PlacementWish) -> PlacementWish:
    return replace(wish, pinned=True)


def test_a_wish_is_there_for_whoever_opens_the_zoo(zoo: Zoo, tmp_path: Path) -> None:
    book = WishBook(zoo.store)
    assert book.current() == ({}, {})
    wish = book.change("bot", pin)
    book.change(
        "other", lambda wish: replace(wish, replicas=3, workers=("a", "b"), evicted=ChainId("ab" * 32))
    )
    wishes, problems = WishBook(Zoo.open(tmp_path / "zoo").store).current()
    assert problems == {}
    assert wishes[BOT] == wish
    assert wish.number == 1
    assert wish.at > 0
    other = wishes[VariantName("other")]
    assert (other.replicas, other.workers, other.evicted) == (3, ("a", "b"), "ab" * 32)
    assert other.asks_to_hold
    assert not PlacementWish(BOT, avoid=("a",)).asks_to_hold


def test_what_changes_nothing_is_not_written(zoo: Zoo) -> None:
    book = WishBook(zoo.store)
    assert book.change("bot", pin) == book.change("bot", pin)
    assert len(list(zoo.store.storage.list(layout.WISHES))) == 1


def test_two_writers_at_once_lose_nothing(zoo: Zoo) -> None:
    """Each adds a worker of its own, from what it read when it began."""
    names = [f"w{number}" for number in range(40)]

    def add(name: str) -> None:
        book = WishBook(zoo.store)
        book.change("bot", lambda wish: replace(wish, workers=(*wish.workers, name)))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, names))
    wishes, _ = WishBook(zoo.store).current()
    assert sorted(wishes[BOT].workers) == sorted(names)
    assert wishes[BOT].number == len(names)


def test_a_writer_who_is_always_too_slow_gives_up(zoo: Zoo) -> None:
    slow, fast = WishBook(zoo.store), WishBook(zoo.store)

    def overtaken(wish: PlacementWish) -> PlacementWish:
        fast.change("bot", lambda other: replace(other, replicas=other.replicas + 1))
        return replace(wish, pinned=True)

    with pytest.raises(ConflictError) as caught:
        slow.change("bot", overtaken)
    assert caught.value.hint


def test_names_follow_the_rule(zoo: Zoo) -> None:
    for name in ("", "../zoo", "a/b", "bot@1"):
        with pytest.raises(InvalidNameError):
            WishBook(zoo.store).change(name, pin)


def test_damage_is_no_wish_is_verified_and_can_be_written_over(zoo: Zoo) -> None:
    book = WishBook(zoo.store)
    book.change("bot", pin)
    key = layout.wish_key("bot", 1)
    good = bytes(zoo.store.storage.get(key))
    assert zoo.verify().ok
    zoo.store.storage.replace(key, [good.replace(b'"pinned":true', b'"pinned":null')])
    fresh = WishBook(zoo.store)
    wishes, problems = fresh.current()
    assert (wishes, list(problems)) == ({}, [key])
    assert isinstance(problems[key], CorruptManifestError)
    assert [problem.key for problem in zoo.verify().problems] == [key]
    assert fresh.change("bot", pin).number == 2
    assert fresh.current()[1] == {}


def test_a_wish_of_another_key_does_not_count(zoo: Zoo) -> None:
    book = WishBook(zoo.store)
    book.change("bot", pin)
    zoo.store.storage.put_if_absent(
        layout.wish_key("else", 1), [bytes(zoo.store.storage.get(layout.wish_key("bot", 1)))]
    )
    assert list(WishBook(zoo.store).current()[1]) == [layout.wish_key("else", 1)]


def test_strays_are_passed_by_and_named(zoo: Zoo) -> None:
    for key in ("refs/wishes/bot/x", "refs/wishes/bot/1/2", "refs/wishes/bot/0"):
        zoo.store.storage.put_if_absent(key, [b"{}"])
        assert layout.wish_of(key) is None
    assert WishBook(zoo.store).current() == ({}, {})
    assert len(zoo.verify().strays) == 3


def test_gc_and_listing_leave_wishes_alone(zoo: Zoo) -> None:
    WishBook(zoo.store).change("bot", pin)
    zoo.gc(grace_s=0)
    assert zoo.ls() == []
    assert WishBook(zoo.store).current()[0][BOT].pinned
    assert zoo.du().manifest_bytes > 0
