"""Registering over the network does what registering at hand does, and sends only what is missing."""

from __future__ import annotations

import threading

import pytest

from blockserve.client.blocking import Client
from blockserve.client.zoo import RemoteZoo
from blockzoo.errors import (
    ManifestNotFoundError,
    NonFiniteWeightsError,
    UnsupportedArchitectureError,
    VariantNotFoundError,
)
from blockzoo.layout import blob_key, block_key, chain_key
from blockzoo.store.packs import read_index
from support.edge import variant_files
from support.folders import (
    Raw,
    adapter_config,
    adapter_tensors,
    config,
    tensor,
    tensors,
    write_adapter,
    write_checkpoint,
)
from support.network import objects, wire, zoo_server
from support.zoo_faults import lose


def push_all(remote, folders):
    remote.register(folders / "base", name="base")
    remote.register(folders / "tuned", name="tuned", base="base")
    remote.register(folders / "large", name="large")
    remote.register(folders / "adapter", name="bot", base="base")


def test_a_push_stores_exactly_what_registering_at_hand_stores(remote, far, local, folders):
    push_all(remote, folders)
    # Digests name bytes, so equal sets of objects are equal zoos; a difference to a base is one too.
    assert objects(far) == objects(local)
    for name in ("base", "tuned", "large", "bot"):
        here, there = local.resolve(name), far.resolve(name)
        assert (there.chain, there.kind, there.files) == (here.chain, here.kind, here.files)
        assert there.provenance.keys() == here.provenance.keys()
        for fact in ("source", "num_bytes", "base", "architecture"):
            assert there.provenance.get(fact) == here.provenance.get(fact)
    for info in local.store.storage.list("blobs"):
        assert far.store.storage.size(info.key) == info.size
    assert far.verify().ok


def test_what_was_pushed_is_exported_byte_for_byte(remote, far, folders, tmp_path):
    push_all(remote, folders)
    for name, folder in {"tuned": "tuned", "bot": "adapter", "large": "large"}.items():
        far.export(name, tmp_path / "out" / name)
        for file in (folders / folder).iterdir():
            assert (tmp_path / "out" / name / file.name).read_bytes() == file.read_bytes()


def test_the_result_says_what_was_new(remote, local, folders, tmp_path):
    from blockzoo.zoo import Zoo

    here = Zoo.open(tmp_path / "fresh", create=True)
    for name, base in {"base": None, "tuned": "base"}.items():
        first = remote.register(folders / name, name=name, base=base)
        second = here.register(folders / name, name=name, base=base)
        for field in ("unchanged", "num_bytes", "new_bytes", "stored_bytes", "num_blobs", "num_new_blobs"):
            assert getattr(first, field) == getattr(second, field), field
        assert first.record.version == 1


def test_pushing_again_restores_what_the_server_lost(remote, far, folders):
    push_all(remote, folders)
    record = far.resolve("bot")
    block = far.chain(record.chain).links[-2].applied[0]
    blob = next(iter(far.block(block).tensors.values())).blobs[0]
    lose(far.store, chain_key(record.chain), block_key(block), blob_key(blob))
    again = remote.register(folders / "adapter", name="bot", base="base")
    assert (again.record, again.unchanged, again.restored) == (record, True, 3)
    assert far.verify().ok
    assert remote.register(folders / "adapter", name="bot", base="base").restored == 0


def test_a_lost_variant_can_be_removed_at_a_server(remote, far, folders):
    push_all(remote, folders)
    lose(far.store, chain_key(far.resolve("bot").chain))
    with pytest.raises(ManifestNotFoundError, match="bot@1 is damaged"):
        remote.gc(grace_s=0)
    assert remote.rm("bot").removed == (1,)
    assert remote.gc(grace_s=0).finished


def test_pushing_the_same_again_changes_nothing(remote, far, folders):
    remote.register(folders / "base", name="base")
    before = objects(far)
    again = remote.register(folders / "base", name="base")
    assert (again.unchanged, again.record.version, again.new_bytes) == (True, 1, 0)
    changed = remote.register(folders / "tuned", name="base")
    assert (changed.unchanged, changed.record.version) == (False, 2)
    assert objects(far) > before


ADAPTERS = {
    "saved embedding": lambda: (
        adapter_config(modules_to_save=["embed_tokens"]),
        {
            **adapter_tensors(config()),
            "base_model.model.model.embed_tokens.weight": tensor((40, 16), seed="saved", dtype="F32"),
        },
    ),
    "both matrices": lambda: (
        adapter_config(),
        {
            **adapter_tensors(config()),
            "base_model.model.model.embed_tokens.weight": tensor((43, 16), seed="saved"),
            "base_model.model.lm_head.weight": tensor((43, 16), seed="saved"),
        },
    ),
    "other rank": lambda: (
        adapter_config(r=2, lora_alpha=3, use_rslora=True),
        adapter_tensors(config(), rank=2),
    ),
}


@pytest.mark.parametrize("kind", sorted(ADAPTERS))
def test_every_kind_of_adapter_passes_the_servers_check(remote, far, local, folders, tmp_path, kind):
    remote.register(folders / "base", name="base")
    path = write_adapter(tmp_path / "adapter", *ADAPTERS[kind]())
    result = remote.register(path, name="new", base="base")
    assert result.record.chain == local.register(path, name="new", base="base").record.chain
    assert far.verify().ok


@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_every_family_passes_the_servers_check(remote, local, tmp_path, architecture):
    values = config(architecture, tie_word_embeddings=False)
    items = tensors(values)
    items["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensor((2,), dtype="F32")
    path = write_checkpoint(tmp_path / "model", values, items)
    result = remote.register(path, name="model")
    assert result.ignored == ("model.layers.0.self_attn.rotary_emb.inv_freq",)
    assert result.record.chain == local.register(path, name="model").record.chain


def test_a_second_push_of_a_base_sends_no_tensor_bytes(server, folders, tmp_path):
    with wire(server.address) as first, RemoteZoo(first.address) as zoo:
        num_bytes = zoo.register(folders / "large", name="one").num_bytes
        assert first.sent > num_bytes
    with wire(server.address) as second, RemoteZoo(second.address) as zoo:
        result = zoo.register(folders / "large", name="two")
        assert (result.unchanged, result.new_bytes, result.record.version) == (False, 0, 1)
        # Digests and proofs, 100 bytes a blob, and the manifests.
        assert second.sent < 32_000 < num_bytes / 100


def chat_model(path, seed):
    """A checkpoint with a tokenizer and a template that can be asked something."""
    files = {name: data.decode() for name, data in variant_files().items() if name != "config.json"}
    values = config(vocab_size=300)
    return write_checkpoint(path, values, tensors(values, seed=seed), files=files)


@pytest.mark.parametrize("refresh_seconds", [0.0, 3600.0])
def test_a_pushed_version_answers_at_once(tmp_path, refresh_seconds):
    router = {"refresh_seconds": refresh_seconds}
    with (
        zoo_server(tmp_path / "far", router=router) as server,
        RemoteZoo(server.address) as zoo,
        Client(server.address) as client,
    ):
        for number in (1, 2):
            record = zoo.register(chat_model(tmp_path / f"chat{number}", number), name="chat").record
            answer = client.generate("chat", "hello", max_tokens=2).result()
            assert (answer.info.version, answer.info.chain_digest) == (number, record.chain)
        zoo.rollback("chat")
        assert client.generate("chat", "hello", max_tokens=1).result().info.version == 3


def test_two_clients_push_the_same_checkpoint_at_once(server, far, local, folders):
    both = threading.Barrier(2, timeout=30)
    results = {}

    def push(number):
        with RemoteZoo(server.address) as zoo:
            both.wait()
            results[number] = zoo.register(folders / "large", name=f"large{number}")

    threads = [threading.Thread(target=push, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    chain = local.resolve("large").chain
    assert [results[number].record.chain for number in range(2)] == [chain, chain]
    # Each object is stored once.
    storage = far.store.storage.inner
    packed = [key for info in storage.list("packs") for key, _ in read_index(storage, info.key).objects()]
    alone = [info.key for folder in ("blobs", "blocks", "chains") for info in storage.list(folder)]
    assert len({*packed, *alone}) == len(packed) + len(alone)
    assert far.verify().ok


def test_bad_folders_are_refused_before_the_server_hears_of_them(server, folders, tmp_path):
    nan = {**tensors(config()), "model.norm.weight": Raw("BF16", (16,), b"\xc0\x7f" * 16)}
    with wire(server.address) as carrier, RemoteZoo(carrier.address) as zoo:
        with pytest.raises(NonFiniteWeightsError):
            zoo.register(write_checkpoint(tmp_path / "nan", items=nan), name="nan")
        values = config(architectures=["MambaForCausalLM"])
        with pytest.raises(UnsupportedArchitectureError):
            zoo.register(write_checkpoint(tmp_path / "other", values), name="other")
        assert carrier.sent < 2000
    with RemoteZoo(server.address) as zoo, pytest.raises(VariantNotFoundError, match="nobody"):
        zoo.register(folders / "adapter", name="bot", base="nobody")


def test_an_adapter_finds_the_base_that_peft_recorded(remote, folders, tmp_path):
    remote.register(folders / "base", name="base")
    path = write_adapter(tmp_path / "a", adapter_config(base_model_name_or_path="somewhere/base"))
    assert remote.register(path, name="bot").record.provenance["base"] == "base@1"


def test_progress_counts_every_byte_once(remote, folders):
    class Counting:
        def __init__(self):
            self.tasks = {}

        def start(self, task, total_bytes):
            self.task = task
            self.tasks[task] = [total_bytes, 0]

        def advance(self, num_bytes):
            self.tasks[self.task][1] += num_bytes

        def finish(self):
            pass

    for name in ("one", "two"):
        counting = Counting()
        result = remote.register(folders / "large", name=name, progress=counting)
        total, done = counting.tasks["storing"]
        files = sum(path.stat().st_size for path in (folders / "large").glob("*.json"))
        assert done == total == result.num_bytes + files


def test_small_messages_carry_a_push_too(tmp_path, folders, local):
    with zoo_server(tmp_path / "far", max_message_bytes=1 << 16) as server, RemoteZoo(server.address) as zoo:
        assert zoo.register(folders / "large", name="large").record.chain == local.resolve("large").chain


def test_an_empty_file_is_a_file(remote, far, tmp_path):
    path = write_checkpoint(tmp_path / "model", files={"README.md": "", "tokenizer.json": "{}"})
    remote.register(path, name="model")
    far.export("model", tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_bytes() == b""
