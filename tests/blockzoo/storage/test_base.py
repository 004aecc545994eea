"""One contract for every storage; what only folders do is in test_local.py."""

from __future__ import annotations

import threading

import pytest

from blockzoo.errors import InvalidInputError, NotFoundError
from blockzoo.storage import LocalStorage, MemoryStorage, Storage, open_storage
from blockzoo.storage.objects import ObjectStorage


@pytest.fixture(params=["local", "memory", "objects"])
def storage(request, tmp_path):
    if request.param == "local":
        return LocalStorage(tmp_path / "zoo")
    return MemoryStorage() if request.param == "memory" else ObjectStorage.in_memory()


def test_it_is_a_storage(storage):
    assert isinstance(storage, Storage)


def test_create_once(storage):
    assert storage.put_if_absent("a/b/c", [b"one", memoryview(b"two")])
    assert not storage.put_if_absent("a/b/c", [b"other"])
    assert storage.get("a/b/c") == b"onetwo"
    assert storage.get("a/b/c").readonly


def test_stage_and_publish(storage):
    first, second = storage.stage([b"1"]), storage.stage([b"2"])
    assert list(storage.list("")) == []
    storage.flush([first, second])
    assert first.publish("x/y")
    assert not second.publish("x/y")
    storage.sync(["x/y", "not/there"])
    assert storage.get("x/y") == b"1"
    first.discard()
    second.discard()
    assert [info.key for info in storage.list("")] == ["x/y"]


def test_discarded_bytes_are_gone(storage, tmp_path):
    storage.stage([b"1"]).discard()
    assert list(storage.list("")) == []
    assert storage.clean() == 0


def test_empty_and_many_chunks(storage):
    assert storage.put_if_absent("empty", [])
    assert storage.get("empty") == b""
    chunks = [bytes([index % 256]) * (index % 7) for index in range(5000)]
    assert storage.put_if_absent("many", chunks)
    assert storage.get("many") == b"".join(chunks)


@pytest.mark.parametrize("size", [10, 200_000])
def test_parts(storage, size):
    data = bytes(range(256)) * (size // 256 + 1)
    storage.put_if_absent("k", [data])
    for start, length in ((0, size), (3, 5), (4097, size), (0, 0), (len(data), 1), (len(data) - 2, 99)):
        part = storage.get_part("k", start, length)
        assert part == data[start : start + length]
        assert part.readonly
    with pytest.raises(NotFoundError):
        storage.get_part("none", 0, 1)


def test_ranges(storage):
    storage.put_if_absent("k", [b"0123456789"])
    assert storage.get_range("k", 2, 3) == b"234"
    assert storage.get_range("k", 8, 100) == b"89"
    assert storage.get_range("k", 0, 1024) == b"0123456789"
    assert storage.get_range("k", 10, 5) == b""


def test_sizes_and_listing(storage):
    for key in ("blobs/aa/1", "blobs/ab/2", "blocks/3", "blobsX/4"):
        storage.put_if_absent(key, [key.encode()])
    assert storage.size("blobs/aa/1") == 10
    assert storage.size("blobs/aa") is None
    assert {(info.key, info.size) for info in storage.list("blobs")} == {
        ("blobs/aa/1", 10),
        ("blobs/ab/2", 10),
    }
    assert {info.key for info in storage.list("")} == {"blobs/aa/1", "blobs/ab/2", "blocks/3", "blobsX/4"}
    assert list(storage.list("nothing")) == []
    storage.put_if_absent("blobs/5", [b"5"])
    assert storage.keys("blobs") == {"blobs/5"}
    assert storage.keys("nothing") == storage.keys("blobs/5") == set()


def test_missing(storage):
    for act in (lambda: storage.get("no/where"), lambda: storage.get_range("no/where", 0, 1)):
        with pytest.raises(NotFoundError):
            act()
    assert storage.size("no/where") is None
    storage.delete("no/where")


def test_delete_and_replace(storage):
    storage.put_if_absent("a/b", [b"1"])
    storage.replace("a/b", [b"2", b"2"])
    storage.replace("new/key", [b"3"])
    assert storage.get("a/b") == b"22"
    assert storage.get("new/key") == b"3"
    assert storage.delete("a/b")
    assert storage.size("a/b") is None
    assert storage.put_if_absent("a/b", [b"4"])


def test_of_many_creators_one_wins(storage):
    wins: list[int] = []
    barrier = threading.Barrier(8)

    def create(number: int) -> None:
        barrier.wait()
        if storage.put_if_absent("race", [str(number).encode()]):
            wins.append(number)

    threads = [threading.Thread(target=create, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert storage.get("race") == str(wins[0]).encode()


def test_open_storage(tmp_path, monkeypatch):
    assert open_storage(tmp_path).url == str(tmp_path)
    assert open_storage(f"file://{tmp_path}").url == str(tmp_path)
    assert isinstance(open_storage("memory://"), MemoryStorage)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    assert open_storage("s3://bucket/prefix").is_remote
    with pytest.raises(InvalidInputError) as caught:
        open_storage("ftp://host/zoo")
    assert "s3://" in caught.value.hint
