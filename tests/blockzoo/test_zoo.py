import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import blockzoo
from blockzoo.errors import (
    BlobNotFoundError,
    CorruptBlobError,
    CurrentVersionError,
    InvalidInputError,
    NotFoundError,
    VariantNotFoundError,
    ZooNotFoundError,
)
from blockzoo.layout import blob_key
from blockzoo.zoo import Zoo
from support.folders import config, tensors, write_adapter, write_checkpoint
from support.zoo_faults import flip


@pytest.fixture
def zoo(tmp_path):
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    zoo.register(write_checkpoint(tmp_path / "base"), name="base")
    return zoo


def test_open(tmp_path, zoo):
    assert Zoo.open(tmp_path / "zoo").resolve("base") == zoo.resolve("base")
    assert zoo.url == str(tmp_path / "zoo")
    with pytest.raises(ZooNotFoundError):
        Zoo.open(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_everything_exported_exists():
    for name in blockzoo.__all__:
        assert getattr(blockzoo, name)


def test_importing_needs_neither_torch_nor_an_object_store_client():
    code = (
        "import sys; import blockzoo, blockzoo.families\n"
        "heavy = {'torch', 'transformers', 'safetensors', 'obstore', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_resolve_and_versions(zoo, tmp_path):
    path = write_checkpoint(tmp_path / "new", items=tensors(config(), seed=1))
    zoo.register(path, name="base")
    assert [record.version for record in zoo.versions("base")] == [1, 2]
    assert zoo.resolve("base").version == 2
    assert zoo.resolve("base@1").version == 1
    assert [record.name for record in zoo.variants()] == ["base"]


def test_read_tensor_is_a_view_of_the_stored_file(zoo, tmp_path):
    block = zoo.block(zoo.chain(zoo.resolve("base").chain).links[1].base)
    ref = block.tensors["mlp.up_proj.weight"]
    (view,) = zoo.read_tensor(ref)
    assert view.readonly
    assert bytes(view) == tensors(config())["model.layers.0.mlp.up_proj.weight"].data
    with pytest.raises(BlobNotFoundError):
        zoo.read_tensor(dataclasses.replace(ref, blobs=("0" * 64,)))


def test_read_file(zoo):
    record = zoo.resolve("base")
    assert zoo.read_file(record, "tokenizer.json") == b'{"model": {}}'
    with pytest.raises(NotFoundError, match=r"chat_template\.jinja") as caught:
        zoo.read_file(record, "chat_template.jinja")
    assert "tokenizer.json" in caught.value.hint


def test_rm_and_rollback(zoo, tmp_path):
    first = zoo.resolve("base")
    zoo.register(write_checkpoint(tmp_path / "new", items=tensors(config(), seed=1)), name="base")
    with pytest.raises(CurrentVersionError):
        zoo.rm("base@2")
    back = zoo.rollback("base")
    assert (back.version, back.chain) == (3, first.chain)
    assert zoo.rollback("base", to=2).version == 4
    assert zoo.rm("base@1").removed == (1,)
    assert zoo.rm("base").removed == (2, 3, 4)
    with pytest.raises(VariantNotFoundError):
        zoo.resolve("base")
    assert zoo.register(tmp_path / "base", name="base").record.version > 4


def test_adapter_keeps_what_it_needs_when_its_base_is_removed(zoo, tmp_path):
    zoo.register(write_adapter(tmp_path / "lora"), name="lora", base="base")
    zoo.rm("base")
    zoo.gc(grace_s=0)
    assert zoo.verify().ok
    for link in zoo.chain(zoo.resolve("lora").chain).links:
        for block in (link.base, *link.applied):
            for ref in zoo.block(block).tensors.values():
                assert sum(view.nbytes for view in zoo.read_tensor(ref)) == ref.num_bytes


def test_verify_names_the_variants_and_repairs(zoo, tmp_path):
    zoo.register(write_adapter(tmp_path / "lora"), name="lora", base="base")
    zoo.backup(tmp_path / "backup")
    block = zoo.block(zoo.chain(zoo.resolve("base").chain).links[1].base)
    blob = block.tensors["mlp.up_proj.weight"].blobs[0]
    flip(zoo.store, blob_key(blob), -1)
    report = Zoo.open(tmp_path / "zoo").verify()
    assert not report.ok
    assert [problem.variants for problem in report.problems] == [("base@1", "lora@1")]
    with pytest.raises(CorruptBlobError):
        zoo.read_tensor(block.tensors["mlp.up_proj.weight"])
    assert zoo.verify(repair_from=tmp_path / "backup").ok
    assert zoo.verify().ok
    zoo.export("base", tmp_path / "out")


def test_backup_and_restore(zoo, tmp_path):
    zoo.register(write_adapter(tmp_path / "lora"), name="lora", base="base")
    assert set(zoo.backup(tmp_path / "copy").added) == {"base@1", "lora@1"}
    fresh = Zoo.open(tmp_path / "fresh", create=True)
    fresh.restore(tmp_path / "copy", names=["base"])
    assert [record.name for record in fresh.variants()] == ["base"]
    fresh.restore(tmp_path / "copy")
    assert fresh.resolve("lora") == zoo.resolve("lora")
    with pytest.raises(InvalidInputError, match="both source and destination"):
        zoo.backup(tmp_path / "zoo")


class Recorder:
    def __init__(self):
        self.events = []

    def start(self, task, total_bytes):
        self.events.append((task, total_bytes))

    def advance(self, num_bytes):
        self.events.append(num_bytes)

    def finish(self):
        self.events.append("finish")


def test_long_operations_report_progress(zoo, tmp_path):
    for run, task in (
        (lambda progress: zoo.backup(tmp_path / "copy", progress=progress), "copying"),
        (lambda progress: zoo.export("base", tmp_path / "out", progress=progress), "exporting base"),
    ):
        recorder = Recorder()
        run(recorder)
        (title, total), *steps, end = recorder.events
        assert (title, end) == (task, "finish")
        assert sum(steps) == total > 0
    recorder = Recorder()
    report = zoo.verify(progress=recorder)
    (title, total), *steps, then, end = recorder.events
    assert (title, then, end) == ("verifying", ("looking for what is missing", 0), "finish")
    assert sum(steps) == total == report.num_bytes > 0
    recorder = Recorder()
    zoo.rm("base")
    report = zoo.gc(grace_s=0.01, progress=recorder)
    looking, waiting, (title, total), *steps, end = recorder.events
    assert looking == ("looking for what no variant needs", 0)
    assert waiting[0].startswith("waiting 0.01 s, so that servers finish loading")
    assert "`--grace 0` does not wait" in waiting[0]
    assert (title, end) == ("deleting", "finish")
    assert sum(steps) == total == report.freed_bytes > 0


def test_reading_from_many_threads(zoo):
    record = zoo.resolve("base")
    expected = {name: item.data for name, item in tensors(config()).items()}

    def read(index):
        block = zoo.block(zoo.chain(record.chain).links[1 + index % 3].base)
        name = "self_attn.q_proj.weight"
        return index % 3, b"".join(zoo.read_tensor(block.tensors[name]))

    with ThreadPoolExecutor(8) as pool:
        for layer, data in pool.map(read, range(200)):
            assert data == expected[f"model.layers.{layer}.self_attn.q_proj.weight"]


def test_two_registrations_at_once(zoo, tmp_path):
    paths = [write_checkpoint(tmp_path / str(n), items=tensors(config(), seed=n)) for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda path: zoo.register(path, name="same"), paths))
    assert sorted(result.record.version for result in results) == [1, 2, 3, 4]
    assert zoo.verify().ok


def test_memory_zoo(tmp_path):
    zoo = Zoo.open("memory://", create=True)
    path = write_checkpoint(tmp_path / "a")
    zoo.register(path, name="a")
    zoo.export("a", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    assert zoo.verify().ok


def test_a_backup_of_a_name_that_nobody_has_is_refused(zoo, tmp_path):
    with pytest.raises(VariantNotFoundError):
        zoo.backup(tmp_path / "copy", names=["base", "nope"])


def test_an_adapter_is_unchanged_after_its_base_was_registered_anew(zoo, tmp_path):
    folder = write_adapter(tmp_path / "lora")
    zoo.register(folder, name="lora", base="base")
    zoo.rm("base")
    zoo.register(write_checkpoint(tmp_path / "again"), name="base")
    again = zoo.register(folder, name="lora", base="base")
    assert again.unchanged
    assert again.record.provenance["base"] == "base@1"
