import os
import subprocess
import sys

import pytest

from blockzoo.errors import CorruptBlobError, CorruptManifestError, InvalidInputError, StorageError
from blockzoo.folders.contents import LAYOUT_FILE, FolderLayout, InBlock, InFile
from blockzoo.layout import blob_key
from blockzoo.zoo import Zoo
from support.folders import (
    ARCHITECTURES,
    config,
    safetensors_bytes,
    tensor,
    tensors,
    write_adapter,
    write_checkpoint,
)
from support.zoo_faults import flip


@pytest.fixture
def zoo(tmp_path):
    return Zoo.open(tmp_path / "zoo", create=True)


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_comes_back_byte_for_byte(zoo, tmp_path, architecture, shards, tied):
    path = write_checkpoint(tmp_path / "a", config(architecture, tie_word_embeddings=tied), shards=shards)
    zoo.register(path, name="a")
    result = zoo.export("a", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(path)
    assert set(result.files) == {file.name for file in path.iterdir()}
    assert result.num_bytes == sum(file.stat().st_size for file in path.iterdir())


@pytest.mark.parametrize("ends", [("embed",), ("head",), ("embed", "head")])
def test_tied_checkpoints_come_back_as_they_were(zoo, tmp_path, ends):
    items = tensors(config())
    embed = items.pop("model.embed_tokens.weight")
    if "embed" in ends:
        items["model.embed_tokens.weight"] = embed
    if "head" in ends:
        items["lm_head.weight"] = embed
    path = write_checkpoint(tmp_path / "a", items=items)
    zoo.register(path, name="a")
    zoo.export("a", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(path)


def test_ignored_tensors_and_unknown_metadata_come_back(zoo, tmp_path):
    items = {**tensors(config()), "model.layers.0.self_attn.rotary_emb.inv_freq": tensor((2,), dtype="F32")}
    path = write_checkpoint(tmp_path / "a", items=items)
    from support.folders import header

    entries = {"__metadata__": {"format": "pt", "note": "hällo"}, **header(items)}
    (path / "model.safetensors").write_bytes(safetensors_bytes(items, entries))
    zoo.register(path, name="a")
    zoo.export("a", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(path)


def test_differences_are_decoded(zoo, tmp_path):
    items = tensors(config(hidden_size=64, intermediate_size=256, vocab_size=5000))
    values = config(hidden_size=64, intermediate_size=256, vocab_size=5000)
    zoo.register(write_checkpoint(tmp_path / "a", values, items), name="a")
    name = "model.embed_tokens.weight"
    tuned = bytes(items[name].data[:-2]) + b"\1\0"
    items[name] = type(items[name])("BF16", items[name].shape, tuned)
    path = write_checkpoint(tmp_path / "b", values, items)
    result = zoo.register(path, name="b", base="a")
    assert result.stored_bytes < result.new_bytes / 2
    zoo.export("b", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(path)


@pytest.mark.parametrize("saved", [False, True])
def test_an_adapter_comes_back_without_the_files_of_its_base(zoo, tmp_path, saved):
    from support.folders import adapter_config, adapter_tensors

    zoo.register(write_checkpoint(tmp_path / "base"), name="base")
    items = adapter_tensors(config())
    if saved:
        items["base_model.model.lm_head.weight"] = tensor((40, 16), seed="head")
    values = adapter_config(modules_to_save=["lm_head"] if saved else None)
    path = write_adapter(tmp_path / "a", values, items)
    (path / "README.md").write_text("mine")
    zoo.register(path, name="a", base="base")
    zoo.export("a", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(path)


def test_the_safetensors_library_reads_the_same_tensors(zoo, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    values = config(tie_word_embeddings=False)
    path = write_checkpoint(tmp_path / "a", values)
    originals = load_file(path / "model.safetensors")
    save_file(originals, path / "model.safetensors", metadata={"format": "pt"})
    zoo.register(path, name="a")
    zoo.export("a", tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert set(exported) == set(originals)
    for name, item in originals.items():
        assert exported[name].dtype == item.dtype
        assert torch.equal(exported[name].view(torch.uint8), item.view(torch.uint8))


def test_old_versions_can_be_exported(zoo, tmp_path):
    path = write_checkpoint(tmp_path / "a")
    before = contents(path)
    zoo.register(path, name="a")
    zoo.register(write_checkpoint(path, items=tensors(config(), seed=1)), name="a")
    zoo.export("a@1", tmp_path / "one")
    zoo.export("a", tmp_path / "two")
    assert contents(tmp_path / "one") == before
    assert contents(tmp_path / "two") == contents(path)


def test_destination_must_be_free(zoo, tmp_path):
    zoo.register(write_checkpoint(tmp_path / "a"), name="a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    (tmp_path / "file").write_text("x")
    for dest in ("full", "file"):
        with pytest.raises(InvalidInputError, match="not an empty folder"):
            zoo.export("a", tmp_path / dest)
    assert contents(tmp_path / "full") == {"mine.txt": b"precious"}
    (tmp_path / "empty").mkdir()
    zoo.export("a", tmp_path / "empty")
    zoo.export("a", tmp_path / "new" / "deep")
    assert contents(tmp_path / "empty") == contents(tmp_path / "new" / "deep")


def test_a_destination_that_cannot_be_written(zoo, tmp_path):
    zoo.register(write_checkpoint(tmp_path / "a"), name="a")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        zoo.export("a", tmp_path / "file" / "below")


def test_damage_leaves_nothing_behind(zoo, tmp_path):
    zoo.register(write_checkpoint(tmp_path / "a"), name="a")
    blob = zoo.block(zoo.chain(zoo.resolve("a").chain).links[2].base).tensors["mlp.up_proj.weight"].blobs[0]
    flip(zoo.store, blob_key(blob), -1)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CorruptBlobError) as caught:
        zoo.export("a", tmp_path / "out")
    assert caught.value.metadata["blob"] == blob
    assert sorted(os.listdir(tmp_path)) == before


def layout(**changes):
    fields = {
        "filenames": ("config.json",),
        "shards": {"model.safetensors": "{}"},
        "tensors": {"a": InBlock(3, None, "x"), "b": InBlock(0, 1, "y"), "c": InFile(".blockzoo/tensors/0")},
    }
    return FolderLayout(**{**fields, **changes})


def test_layout_is_read_as_it_was_written():
    assert FolderLayout.from_bytes(layout().to_bytes()) == layout()


@pytest.mark.parametrize(
    "changes",
    [
        {"filenames": ("../config.json",)},
        {"filenames": ("/etc/passwd",)},
        {"filenames": (LAYOUT_FILE,)},
        {"shards": {"../../x.safetensors": "{}"}},
        {"shards": {"": "{}"}},
    ],
)
def test_a_hostile_layout_cannot_leave_the_folder(changes):
    with pytest.raises(CorruptManifestError):
        FolderLayout.from_bytes(layout(**changes).to_bytes())


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b'{"files":1}', b'{"files":[],"shards":[],"tensors":{}}']
)
def test_a_damaged_layout_is_named(data):
    with pytest.raises(CorruptManifestError, match=r"layout\.json"):
        FolderLayout.from_bytes(data)


def test_export_works_without_torch(zoo, tmp_path):
    zoo.register(write_checkpoint(tmp_path / "a"), name="a")
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = sys.modules['safetensors'] = None\n"
        "from blockzoo import Zoo\n"
        f"zoo = Zoo.open({str(tmp_path / 'zoo')!r})\n"
        f"zoo.register({str(tmp_path / 'a')!r}, name='b')\n"
        f"zoo.export('b', {str(tmp_path / 'out')!r})\n"
        "zoo.ls(), zoo.du(), zoo.show('b'), zoo.diff('a', 'b')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "a")
