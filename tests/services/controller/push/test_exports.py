"""Exporting over the network writes what exporting at hand writes, whatever happens on the way."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from contextlib import contextmanager

import pytest

from blockproto.v1 import zoo_pb2
from blockserve.client.zoo import RemoteZoo
from blockserve.client.zoo_calls import Calls
from blockserve.common.errors import (
    ExportCapacityError,
    ExportInterruptedError,
    UnauthenticatedError,
    UnavailableError,
    UnknownBlobError,
)
from blockserve.common.rpc.channel import Credentials
from blockserve.controller.push.exports import Exports
from blockserve.controller.push.limits import ControllerConfig
from blockzoo.errors import (
    BlockzooError,
    CorruptBlobError,
    CorruptManifestError,
    InvalidInputError,
    NotFoundError,
    VariantNotFoundError,
)
from blockzoo.layout import blob_key
from blockzoo.zoo import Zoo
from support.folders import (
    adapter_config,
    adapter_tensors,
    config,
    tensor,
    tensors,
    write_adapter,
    write_checkpoint,
)
from support.network import WAIT, wire, zoo_server
from support.zoo_faults import flip

PIECE_BYTES = 1 << 14


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@contextmanager
def served(zoo, **controller):
    with zoo_server(zoo, controller={"max_piece_bytes": PIECE_BYTES, **controller}) as server:
        yield server


@pytest.fixture
def server(local):
    with served(local) as server:
        yield server


@pytest.fixture
def remote(server):
    with RemoteZoo(server.address, patience_s=30) as remote:
        yield remote


def same_at_hand(remote, zoo, ref, tmp_path):
    here = zoo.export(ref, tmp_path / "here" / ref)
    there = remote.export(ref, tmp_path / "there" / ref)
    assert contents(there.path) == contents(here.path)
    assert (there.ref, there.files, there.num_bytes) == (here.ref, here.files, here.num_bytes)
    return contents(there.path)


@pytest.mark.parametrize(
    ("name", "folder"), [("base", "base"), ("tuned", "tuned"), ("large", "large"), ("bot", "adapter")]
)
def test_a_folder_is_the_same_as_at_hand(remote, local, folders, tmp_path, name, folder):
    """tuned has three shards and differences to base; a tensor of large takes several messages."""
    assert same_at_hand(remote, local, name, tmp_path) == contents(folders / folder)


def test_differences_are_decoded_by_the_server(remote, local, tmp_path):
    values = config(hidden_size=64, intermediate_size=256, vocab_size=5000)
    items = tensors(values)
    local.register(write_checkpoint(tmp_path / "a", values, items), name="a")
    name = "model.embed_tokens.weight"
    items[name] = type(items[name])("BF16", items[name].shape, bytes(items[name].data[:-2]) + b"\1\0")
    path = write_checkpoint(tmp_path / "b", values, items)
    result = local.register(path, name="b", base="a")
    assert result.stored_bytes < result.new_bytes / 2
    assert same_at_hand(remote, local, "b", tmp_path) == contents(path)


def test_tensors_that_no_block_uses_and_files_beside_come_too(remote, local, tmp_path):
    items = {**tensors(config()), "model.layers.0.self_attn.rotary_emb.inv_freq": tensor((2,), dtype="F32")}
    path = write_checkpoint(tmp_path / "a", items=items, shards=2)
    (path / "README.md").write_text("mine")
    (path / "chat_template.jinja").write_text("")
    local.register(path, name="a")
    assert same_at_hand(remote, local, "a", tmp_path) == contents(path)


def test_an_adapter_with_a_matrix_of_its_own(remote, local, tmp_path):
    items = adapter_tensors(config())
    items["base_model.model.lm_head.weight"] = tensor((40, 16), seed="head")
    path = write_adapter(tmp_path / "a", adapter_config(modules_to_save=["lm_head"]), items)
    local.register(path, name="a", base="base")
    assert same_at_hand(remote, local, "a", tmp_path) == contents(path)


def test_old_versions(remote, local, folders, tmp_path):
    local.register(folders / "tuned", name="base")
    assert same_at_hand(remote, local, "base@1", tmp_path) == contents(folders / "base")
    assert same_at_hand(remote, local, "base", tmp_path) == contents(folders / "tuned")


def test_tiny_messages_and_few_digests(local, tmp_path):
    with served(local, max_digests=3, max_piece_bytes=100) as server, RemoteZoo(server.address) as remote:
        same_at_hand(remote, local, "tuned", tmp_path)


def test_progress_adds_up(remote, local, tmp_path):
    told = []

    class Told:
        def start(self, task, total_bytes):
            told.append((task, total_bytes))

        def advance(self, num_bytes):
            told.append(num_bytes)

        def finish(self):
            told.append("finish")

    remote.export("large", tmp_path / "out", progress=Told())
    (start, *steps, end) = told
    total = int(local.resolve("large").provenance["num_bytes"])
    assert (start, end) == (("exporting large", total), "finish")
    assert sum(steps) == total
    assert max(steps) <= PIECE_BYTES


@pytest.mark.parametrize("seed", range(3))
def test_a_connection_cut_at_random_bytes_is_taken_up_again(
    server, local, folders, tmp_path, monkeypatch, seed
):
    monkeypatch.setattr("blockserve.client.zoo_calls.MAX_BACKOFF_S", 0.05)
    draw = random.Random(seed)
    num_bytes = int(local.resolve("large").provenance["num_bytes"])
    cuts = iter([draw.randrange(30_000, num_bytes // 3) for _ in range(8)])
    with wire(server.address, answers_cut_at=cuts) as carrier:
        with RemoteZoo(carrier.address, patience_s=30) as remote:
            remote.export("large", tmp_path / "out")
        assert carrier.connections > 3
        # What had come is not sent again.
        assert carrier.answered < 2.5 * num_bytes
    assert contents(tmp_path / "out") == contents(folders / "large")


def test_a_server_that_does_not_come_back(server, tmp_path):
    cuts = itertools.chain([300_000], itertools.repeat(0))
    before = sorted(os.listdir(tmp_path))
    with (
        wire(server.address, answers_cut_at=cuts) as carrier,
        RemoteZoo(carrier.address, patience_s=0.5) as remote,
        pytest.raises(ExportInterruptedError, match=r"made no progress for 0.5 s") as caught,
    ):
        remote.export("large", tmp_path / "out")
    assert "leaves nothing behind" in caught.value.hint
    assert sorted(os.listdir(tmp_path)) == before


def test_damage_at_the_server_is_named_and_leaves_nothing(remote, local, tmp_path):
    chain = local.chain(local.resolve("base").chain)
    blob = local.block(chain.links[2].base).tensors["mlp.up_proj.weight"].blobs[0]
    flip(local.store, blob_key(blob), -1)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CorruptBlobError) as caught:
        remote.export("base", tmp_path / "out")
    assert caught.value.metadata["blob"] == blob
    assert sorted(os.listdir(tmp_path)) == before


def change_parts(monkeypatch, change):
    stream = Calls.stream

    def changed(self, method, request, **options):
        for message in stream(self, method, request, **options):
            if method == "DownloadBlobs":
                change(message)
            yield message

    monkeypatch.setattr(Calls, "stream", changed)


def flip_a_bit(message):
    part = message.parts[-1]
    part.data = part.data[:-1] + bytes([part.data[-1] ^ 1])


def send_another(message):
    message.parts[0].blob = "ab" * 32


def send_too_much(message):
    message.parts[-1].data += bytes(1 << 20)


def leave_a_gap(message):
    message.parts[0].offset += 1


def send_nothing(message):
    message.parts[0].data = b""


@pytest.mark.parametrize("change", [flip_a_bit, send_another, send_too_much, leave_a_gap, send_nothing])
def test_bytes_that_are_not_what_the_manifests_name_are_not_written(remote, tmp_path, monkeypatch, change):
    change_parts(monkeypatch, change)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises((CorruptBlobError, CorruptManifestError), match=r"came damaged"):
        remote.export("large", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == before


def test_ctrl_c_leaves_nothing_behind_and_ends_the_call(server, remote, tmp_path):
    class Impatient:
        def start(self, task, total_bytes):
            pass

        def advance(self, num_bytes):
            raise KeyboardInterrupt

        def finish(self):
            pass

    before = sorted(os.listdir(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        remote.export("large", tmp_path / "out", progress=Impatient())
    assert sorted(os.listdir(tmp_path)) == before
    until_ended(server)


def until_ended(server):
    deadline = time.monotonic() + WAIT
    while server.server._zoo_servicer._exports._running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_cannot_be_exported(remote, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    with pytest.raises(InvalidInputError, match="not an empty folder"):
        remote.export("base", tmp_path / "full")
    assert contents(tmp_path / "full") == {"mine.txt": b"precious"}
    with pytest.raises(VariantNotFoundError, match="bass") as caught:
        remote.export("bass", tmp_path / "out")
    assert caught.value.suggestions == ("base",)
    with pytest.raises(VariantNotFoundError):
        remote.export("base@7", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    remote.export("base", tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


def test_a_version_that_is_removed_meanwhile(remote, local, tmp_path, monkeypatch):
    monkeypatch.setattr("blockserve.client.zoo_calls.STREAM_SECONDS", 5.0)
    change_parts(monkeypatch, lambda message: local.store.current("large") and local.rm("large"))
    with pytest.raises(NotFoundError):
        remote.export("large", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_token_nothing_is_read(local, tmp_path):
    with zoo_server(local, token="sesame") as server:
        with RemoteZoo(server.address) as remote:
            with pytest.raises(UnauthenticatedError):
                remote.export("base", tmp_path / "out")
            request = zoo_pb2.DownloadBlobsRequest(ref="base@1", blobs=[first_blob(local, "base")])
            with pytest.raises(UnauthenticatedError):
                list(remote._calls.stream("DownloadBlobs", request))
        with RemoteZoo(server.address, credentials=Credentials(token="sesame")) as remote:
            remote.export("base", tmp_path / "out")


def first_blob(zoo, name):
    chain = zoo.chain(zoo.resolve(name).chain)
    return next(iter(zoo.block(chain.links[-2].base).tensors.values())).blobs[0]


def ask(remote, ref, blobs, offset=0):
    request = zoo_pb2.DownloadBlobsRequest(ref=ref, blobs=blobs, offset=offset)
    return [part for message in remote._calls.stream("DownloadBlobs", request) for part in message.parts]


def test_only_what_the_version_is_made_of_can_be_read(remote, local):
    own, other = first_blob(local, "base"), first_blob(local, "large")
    assert ask(remote, "base@1", [own])[0].blob == own
    absent = "ab" * 32
    said = set()
    for blob in (other, absent):
        with pytest.raises(UnknownBlobError, match="is not part of base@1") as caught:
            ask(remote, "base@1", [own, blob])
        said.add(str(caught.value).replace(blob, ""))
    assert len(said) == 1  # whether or not the zoo has it
    # Not even what a difference is taken to.
    base = next(
        info.base for blob in blobs(local, "tuned") if (info := local.store.blobs.info(blob)).base is not None
    )
    with pytest.raises(UnknownBlobError):
        ask(remote, "tuned@1", [base])
    # What an adapter runs on is part of its chain.
    assert ask(remote, "bot@1", [own])[0].data
    for ref, names, offset, error in (
        ("base@1", [own], 1 << 40, InvalidInputError),
        ("base@1", ["x"], 0, InvalidInputError),
        ("../x", [own], 0, InvalidInputError),
        ("nobody@1", [own], 0, VariantNotFoundError),
    ):
        with pytest.raises(error):
            ask(remote, ref, names, offset)
    assert ask(remote, "base@1", []) == []


def blobs(zoo, name):
    chain = zoo.chain(zoo.resolve(name).chain)
    tensors = (tensor for link in chain.links for tensor in zoo.block(link.base).tensors.values())
    return [blob for tensor in tensors for blob in tensor.blobs]


def test_exports_beyond_the_limit_wait(local, folders, tmp_path, monkeypatch):
    """Two at once where one may run: the second goes on when the first has ended."""
    monkeypatch.setattr("blockserve.controller.push.exports.RETRY_AFTER_SECONDS", 0.05)
    with served(local, max_exports=1) as server:
        failures = []

        def export(number):
            try:
                with RemoteZoo(server.address, patience_s=30) as remote:
                    remote.export("large", tmp_path / f"out{number}")
            except BaseException as error:  # noqa: BLE001 - told to the test
                failures.append(error)

        threads = [threading.Thread(target=export, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        assert failures == []
        for number in range(3):
            assert contents(tmp_path / f"out{number}") == contents(folders / "large")
        until_ended(server)


def test_a_server_that_exports_nothing(local, tmp_path):
    with served(local, max_exports=0) as server, RemoteZoo(server.address) as remote:
        with pytest.raises(ExportCapacityError, match="exports nothing") as caught:
            remote.export("base", tmp_path / "out")
        assert "max_exports" in caught.value.hint
        assert len(remote.ls()) == 4


def test_an_export_that_nobody_reads_loses_its_place(local):
    now = [0.0]
    exports = Exports(local, ControllerConfig(max_exports=1, push_idle_seconds=100), clock=lambda: now[0])
    stopped = []
    first = exports.begin(lambda: stopped.append("first"))
    now[0] = 90.0
    with pytest.raises(ExportCapacityError, match="the maximum of this server") as caught:
        exports.begin(stopped.clear)
    assert caught.value.retry_after > 0
    exports.move(first)
    now[0] = 180.0
    with pytest.raises(ExportCapacityError):
        exports.begin(stopped.clear)
    assert not stopped
    now[0] = 191.0
    second = exports.begin(stopped.clear)
    assert stopped == ["first"]
    with pytest.raises(ExportCapacityError, match="idle for too long"):
        exports.move(first)
    exports.end(first)
    assert exports._running == {second}


def test_the_call_of_an_export_that_nobody_reads_ends(local, monkeypatch):
    """Otherwise each would hold a tensor for as long as its caller keeps the connection."""
    alive = []
    real = Exports.messages

    def messages(self, *arguments):
        alive.append(1)
        try:
            yield from real(self, *arguments)
        finally:
            alive.pop()

    monkeypatch.setattr(Exports, "messages", messages)
    blob = max(blobs(local, "large"), key=lambda blob: local.store.blobs.read(blob).nbytes)
    request = zoo_pb2.DownloadBlobsRequest(ref="large@1", blobs=[blob] * 1000)
    with served(local, max_exports=2, push_idle_seconds=0.2) as server:
        calls = [RemoteZoo(server.address) for _ in range(6)]
        streams = []
        for remote in calls:
            # Until the buffers between are full an export that nobody reads goes on.
            for _ in range(200):
                stream = remote._calls.stream("DownloadBlobs", request)
                try:
                    assert next(stream).parts
                    break
                except ExportCapacityError:
                    time.sleep(0.1)
            streams.append(stream)
            assert len(alive) <= 2
        for stream in streams[:4]:
            with pytest.raises(BlockzooError):  # after what had been sent before
                list(stream)
        for remote in calls:
            remote.close()


def test_no_server(tmp_path):
    with RemoteZoo("127.0.0.1:1") as remote, pytest.raises(UnavailableError):
        remote.export("base", tmp_path / "out")


def test_a_zoo_that_is_empty(tmp_path):
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    with (
        served(zoo) as server,
        RemoteZoo(server.address) as remote,
        pytest.raises(VariantNotFoundError),
    ):
        remote.export("base", tmp_path / "out")
