"""What a pusher that does not keep to the rules is told; nothing of it becomes visible."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from blockproto.v1 import zoo_pb2
from blockserve.client.zoo import RemoteZoo
from blockserve.client.zoo_calls import Calls
from blockserve.common.errors import (
    PossessionError,
    PushCapacityError,
    PushNotFoundError,
    UnauthenticatedError,
    UnknownBlobError,
    WrongDigestError,
)
from blockserve.common.rpc.channel import Credentials
from blockserve.common.wire.possession import possession_mac
from blockzoo.canonical import canonical_json
from blockzoo.digest import blob_id
from blockzoo.errors import (
    ConflictError,
    InvalidInputError,
    InvalidManifestError,
    InvalidNameError,
    NonFiniteWeightsError,
    StorageFullError,
    UnsupportedArchitectureError,
    VariantNotFoundError,
)
from blockzoo.manifest import DType
from blockzoo.storage import MemoryStorage
from blockzoo.store.blobs import file_data
from blockzoo.store.zoo_store import ZooStore
from blockzoo.zoo import Zoo
from support.network import zoo_server
from support.zoo_faults import HookedStorage

NUMBERS = bytes(range(64)) * 4
SECRET = b"weights that somebody else has registered"


class Pusher:
    """The calls of a push, one by one."""

    def __init__(self, address, **credentials):
        self.calls = Calls(address, Credentials(**credentials))
        begun = self.calls.call("BeginPush", zoo_pb2.BeginPushRequest(purpose="test"))
        self.push_id, self.nonce = begun.push_id, begun.nonce

    def states(self, *blobs):
        request = zoo_pb2.FindBlobsRequest(push_id=self.push_id, blobs=blobs)
        return [
            (zoo_pb2.BlobState.Status.Name(state.status).removeprefix("STATUS_"), state.received)
            for state in self.calls.call("FindBlobs", request).states
        ]

    def send(self, data, *, blob=None, dtype=DType.U8, shape=None, offset=0, part=None, base=""):
        shape = (len(data) // dtype.itemsize,) if shape is None else shape
        blob = blob or blob_id(dtype, shape, data)
        piece = zoo_pb2.BlobPiece(
            blob=blob,
            dtype=dtype.value,
            shape=shape,
            offset=offset,
            data=data[offset:] if part is None else data[offset : offset + part],
            base=base,
        )
        request = zoo_pb2.UploadBlobsRequest(push_id=self.push_id, pieces=[piece])
        self.calls.call("UploadBlobs", iter([request]))
        return blob

    def prove(self, blob, mac):
        proofs = [zoo_pb2.BlobProof(blob=blob, mac=mac)]
        self.calls.call("ProveBlobs", zoo_pb2.ProveBlobsRequest(push_id=self.push_id, proofs=proofs))

    def rely_on(self, ref):
        self.calls.call("RelyOnVariant", zoo_pb2.RelyOnVariantRequest(push_id=self.push_id, ref=ref))

    def commit(self, **fields):
        values = {"push_id": self.push_id, "name": "new", "kind": "checkpoint", **fields}
        return self.calls.call("CommitPush", zoo_pb2.CommitPushRequest(**values)).record


@pytest.fixture
def pusher(server, far):
    pusher = Pusher(server.address)
    yield pusher
    pusher.calls.close()
    assert far.variants() == []
    assert far.verify().problems == ()


def chain(**changes):
    return canonical_json({"family": "llama", "links": [], "context_length": 8, "vocab_size": 8, **changes})


def block(*blobs, **changes):
    weight = {"dtype": "U8", "shape": [256], "blobs": list(blobs), "chunk_rows": 0}
    return canonical_json(
        {"kind": "layer", "family": "llama", "config": {}, "tensors": {"weight": weight}, **changes}
    )


def digest(body):
    from blockzoo.canonical import digest_bytes

    return digest_bytes(body)


def test_wrong_bytes_are_refused_and_can_be_sent_again(pusher):
    blob = blob_id(DType.U8, (256,), NUMBERS)
    with pytest.raises(WrongDigestError, match=blob):
        pusher.send(bytes(256), blob=blob)
    assert pusher.states(blob) == [("MISSING", 0)]
    pusher.send(NUMBERS, blob=blob)
    assert pusher.states(blob) == [("HELD", 0)]


def test_a_digest_covers_type_and_shape(pusher):
    blob = blob_id(DType.U8, (256,), NUMBERS)
    for dtype, shape in ((DType.I8, (256,)), (DType.U8, (16, 16)), (DType.F32, (64,))):
        with pytest.raises(WrongDigestError):
            pusher.send(NUMBERS, blob=blob, dtype=dtype, shape=shape)


@pytest.mark.parametrize(("dtype", "bits"), [(DType.BF16, b"\xc0\x7f"), (DType.F32, b"\0\0\x80\xff")])
def test_nan_and_infinity_are_refused(pusher, dtype, bits):
    with pytest.raises(NonFiniteWeightsError):
        pusher.send(bits * 8, dtype=dtype)


def test_bytes_come_in_order_and_twice_does_no_harm(pusher, far):
    blob = pusher.send(NUMBERS, part=100)
    assert pusher.states(blob) == [("MISSING", 100)]
    with pytest.raises(ConflictError):
        pusher.send(NUMBERS, offset=101)
    pusher.send(NUMBERS, offset=50, part=70)
    assert pusher.states(blob) == [("MISSING", 120)]
    assert not far.store.blobs.exists(blob)
    with pytest.raises(InvalidInputError, match="more bytes"):
        pusher.send(NUMBERS + b"x", blob=blob, shape=(256,), offset=120)
    pusher.send(NUMBERS, offset=120)
    pusher.send(NUMBERS)
    assert pusher.states(blob) == [("HELD", 0)]
    assert bytes(far.store.blobs.read(blob)) == NUMBERS


def test_a_blob_keeps_the_type_it_was_begun_with(pusher):
    blob = pusher.send(NUMBERS, part=10)
    with pytest.raises(InvalidInputError, match="another type"):
        pusher.send(NUMBERS, blob=blob, shape=(16, 16), offset=10)


@pytest.mark.parametrize(
    "changes", [{"blob": "c0ffee"}, {"blob": "Z" * 64}, {"shape": (1 << 40, 1 << 40)}, {"shape": (1,) * 20}]
)
def test_what_no_tensor_can_be_is_refused(pusher, changes):
    with pytest.raises(InvalidInputError):
        pusher.send(NUMBERS, **{"blob": blob_id(DType.U8, (256,), NUMBERS), **changes})


def test_knowing_a_digest_grants_nothing(server, far):
    """Somebody else's blob has to be proved: by its bytes, under the nonce of this push."""
    with far.store.registration("owner") as registration:
        blob = registration.put_tensors([file_data(SECRET)])[0].blob
    pusher = Pusher(server.address)
    body = block(blob)
    links = [{"base": digest(body), "applied": []}]
    assert pusher.states(blob) == [("TO_PROVE", 0)]
    with pytest.raises(UnknownBlobError, match=blob):
        pusher.commit(chain=chain(links=links), blocks=[body])
    with pytest.raises(UnknownBlobError, match=blob):
        pusher.commit(chain=chain(), files={"config.json": zoo_pb2.FileRef(blob=blob, size=len(SECRET))})
    with pytest.raises(UnknownBlobError, match=blob):
        pusher.send(NUMBERS, base=blob)
    other = Pusher(server.address)
    for mac in (b"", bytes(32), bytes.fromhex(blob), hashlib.blake2s(SECRET).digest()):
        with pytest.raises(PossessionError, match=blob):
            pusher.prove(blob, mac)
    with pytest.raises(PossessionError):
        pusher.prove(blob, possession_mac(other.nonce, blob, SECRET))
    assert pusher.states(blob) == [("TO_PROVE", 0)]
    pusher.prove(blob, possession_mac(pusher.nonce, blob, SECRET))
    assert pusher.states(blob) == [("HELD", 0)]
    assert other.states(blob) == [("TO_PROVE", 0)]
    # Sending it proves it too; nothing is stored twice.
    other.send(SECRET)
    assert other.states(blob) == [("HELD", 0)]


def test_a_proof_does_not_tell_whether_the_zoo_has_a_blob(server, far):
    pusher = Pusher(server.address)
    blob = blob_id(DType.U8, (len(SECRET),), SECRET)
    with pytest.raises(PossessionError) as absent:
        pusher.prove(blob, bytes(32))
    with pytest.raises(PossessionError):
        pusher.prove(blob, b"")
    with far.store.registration("owner") as registration:
        registration.put_tensors([file_data(SECRET)])
    with pytest.raises(PossessionError) as present:
        pusher.prove(blob, bytes(32))
    assert str(absent.value) == str(present.value)


def test_where_every_caller_is_an_administrator_nothing_has_to_be_proved(tmp_path):
    with zoo_server(tmp_path / "far", controller={"prove_possession": False}) as server:
        with Zoo.open(tmp_path / "far").store.registration("owner") as registration:
            blob = registration.put_tensors([file_data(SECRET)])[0].blob
        assert Pusher(server.address).states(blob, "0" * 64) == [("HELD", 0), ("MISSING", 0)]


def test_manifests_that_name_what_was_not_sent_are_refused(pusher):
    missing = "ab" * 32
    body = block(missing)
    with pytest.raises(UnknownBlobError, match=missing):
        pusher.commit(chain=chain(links=[{"base": digest(body), "applied": []}]), blocks=[body])
    with pytest.raises(UnknownBlobError, match=missing):
        pusher.commit(chain=chain(links=[{"base": missing, "applied": []}]))


def test_blocks_of_the_zoo_can_be_named_by_who_relies_on_their_variant(server, far, folders):
    far.register(folders / "base", name="base")
    links = [{"base": link.base, "applied": []} for link in far.chain(far.resolve("base").chain).links]
    pusher = Pusher(server.address)
    with pytest.raises(UnknownBlobError):
        pusher.commit(chain=chain(links=links))
    pusher.rely_on("base@1")
    # Named with right, but no files make this chain.
    with pytest.raises(InvalidManifestError):
        pusher.commit(chain=chain(links=links))
    with pytest.raises(VariantNotFoundError):
        pusher.rely_on("nobody@1")


def test_an_unsupported_family_is_refused_by_name(pusher):
    with pytest.raises(UnsupportedArchitectureError, match="mamba") as caught:
        pusher.commit(chain=chain(family="mamba"))
    assert "LlamaForCausalLM" in caught.value.hint


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b'{"family": "llama"}',
        chain().replace(b":", b": "),
        chain(links=[{"base": "x", "applied": []}]),
        chain(vocab_size=-1),
        b'{"family":1.5}',
    ],
)
def test_manifests_that_cannot_be_read_are_refused(pusher, body):
    with pytest.raises(InvalidManifestError):
        pusher.commit(chain=body)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../evil"},
        {"provenance": {"source": "x" * 100_000}},
        {"provenance": {str(i): "" for i in range(100)}},
        {"files": {"../evil": zoo_pb2.FileRef(blob="ab" * 32)}},
        {"files": {"config.json": zoo_pb2.FileRef(blob="no digest")}},
        {"kind": "tombstone"},
    ],
)
def test_records_that_cannot_be_are_refused(pusher, changes):
    with pytest.raises(InvalidInputError):
        pusher.commit(**{"chain": chain(), **changes})


def test_calls_carry_a_bounded_number_of_bytes_and_digests(pusher):
    with pytest.raises(InvalidInputError, match="tensor bytes"):
        pusher.send(bytes(1 << 15))
    with pytest.raises(InvalidInputError, match="digests"):
        pusher.states(*["ab" * 32] * 5000)


def test_pushes_are_bounded_in_number_and_bytes(tmp_path):
    limits = {"max_pushes": 2, "max_unstored_bytes": 1000, "push_idle_seconds": 3600.0}
    with zoo_server(tmp_path / "far", controller=limits) as server:
        first, second = Pusher(server.address), Pusher(server.address)
        with pytest.raises(PushCapacityError) as caught:
            Pusher(server.address)
        assert caught.value.retry_after > 0
        with pytest.raises(InvalidInputError, match="more than this server takes") as large:
            first.send(bytes(1001), part=1)
        assert "max_unstored_bytes" in large.value.hint
        held = bytes(900)
        first.send(held, part=800)
        with pytest.raises(PushCapacityError, match="800 bytes"):
            second.send(bytes(300))
        first.send(held, offset=800)
        second.send(bytes(300))
        first.calls.call("AbortPush", zoo_pb2.AbortPushRequest(push_id=first.push_id))
        Pusher(server.address)
        with pytest.raises(PushNotFoundError):
            first.states("ab" * 32)


def test_a_pusher_waits_for_room(tmp_path, folders, monkeypatch):
    """A push that is refused for want of room comes back until there is some."""
    limits = {"max_pushes": 1}
    with zoo_server(tmp_path / "far", controller=limits) as server:
        first = Pusher(server.address)
        paused = []

        def leave(seconds):
            paused.append(seconds)
            first.calls.call("AbortPush", zoo_pb2.AbortPushRequest(push_id=first.push_id))

        monkeypatch.setattr("blockserve.client.zoo_calls.pause_for", leave)
        with RemoteZoo(server.address) as zoo:
            assert zoo.register(folders / "base", name="base").record.version == 1
        assert paused[0] >= 1


def test_a_full_disk_at_the_server_is_told_and_nothing_is_registered(folders):
    full = False

    def refuse(operation, key):
        if full and operation in ("put", "stage", "publish") and not key.startswith("leases"):
            raise StorageFullError("the storage is full", hint="Make room.")

    storage = HookedStorage(MemoryStorage(), before=refuse)
    zoo = Zoo(ZooStore.open(storage, create=True))
    with zoo_server(zoo) as server, RemoteZoo(server.address) as remote:
        full = True
        with pytest.raises(StorageFullError, match="full"):
            remote.register(folders / "base", name="base")
        assert zoo.variants() == []
        assert not list(storage.list("leases"))
        full = False
        assert remote.register(folders / "base", name="base").record.version == 1
        assert zoo.verify().ok


def test_a_push_needs_the_credential_of_the_server(tmp_path, folders):
    token: Path = tmp_path / "token"
    token.write_text("sesame")
    with zoo_server(tmp_path / "far", token_file=token) as server:
        with RemoteZoo(server.address) as zoo:
            for act in (zoo.ls, zoo.verify, lambda: zoo.register(folders / "base", name="base")):
                with pytest.raises(UnauthenticatedError):
                    act()
        upload = zoo_pb2.UploadBlobsRequest(push_id="x")
        with pytest.raises(UnauthenticatedError):
            Calls(server.address, Credentials()).call("UploadBlobs", iter([upload]))
        with RemoteZoo(server.address, credentials=Credentials(token="sesame")) as zoo:
            assert zoo.register(folders / "base", name="base").record.version == 1


def test_manifests_of_a_server_are_checked_by_the_client_too(remote, far, folders, monkeypatch):
    from blockzoo.errors import CorruptManifestError

    far.register(folders / "base", name="base")
    call = Calls.call

    def tamper(self, method, request, **options):
        answer = call(self, method, request, **options)
        if method == "GetManifests":
            answer.chain = answer.chain.replace(b'"vocab_size":40', b'"vocab_size":41')
        return answer

    monkeypatch.setattr(Calls, "call", tamper)
    with pytest.raises(CorruptManifestError):
        remote.register(folders / "adapter", name="bot", base="base")


def test_a_name_that_servers_give_cannot_be_pushed(pusher):
    with pytest.raises(InvalidNameError, match="as names that servers give"):
        pusher.commit(name="unregistered.mine", chain=chain())
