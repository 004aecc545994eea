import json

import pytest

from blockzoo.errors import (
    CheckpointError,
    InvalidConfigError,
    MissingShardError,
    PathEscapeError,
    PickleRefusedError,
    TensorMismatchError,
    TruncatedFileError,
)
from blockzoo.folders.checkpoint import FolderKind, open_folder
from blockzoo.folders.files import inside, read_kept_file
from support.folders import (
    adapter_config,
    config,
    safetensors_bytes,
    tensors,
    write_adapter,
    write_checkpoint,
)


def refused(path, expected, match=None):
    with pytest.raises(expected, match=match) as caught, open_folder(path):
        pass
    assert type(caught.value) is expected
    assert caught.value.hint
    return caught.value


def test_kind_is_told_by_the_files(tmp_path):
    with open_folder(write_checkpoint(tmp_path / "a")) as folder:
        assert folder.kind is FolderKind.CHECKPOINT
        assert folder.config["architectures"] == ["LlamaForCausalLM"]
    with open_folder(write_adapter(tmp_path / "b")) as folder:
        assert folder.kind is FolderKind.ADAPTER
        assert folder.config["peft_type"] == "LORA"


def test_a_folder_with_both_is_a_checkpoint(tmp_path):
    path = write_adapter(write_checkpoint(tmp_path / "a"))
    with open_folder(path) as folder:
        assert folder.kind is FolderKind.CHECKPOINT


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_tensors_of_all_shards(tmp_path, shards):
    items = tensors(config())
    with open_folder(write_checkpoint(tmp_path / "a", items=items, shards=shards)) as folder:
        assert len(folder.shards) == shards
        assert set(folder.tensors) == set(items)
        assert folder.num_bytes == sum(len(item.data) for item in items.values())
        for name, item in items.items():
            assert bytes(folder.read(name)) == item.data
        assert ("model.safetensors.index.json" in folder.files) is (shards > 1)


def test_known_files_are_kept_and_others_left_alone(tmp_path):
    files = {"tokenizer.json": "{}", "chat_template.jinja": "x", "optimizer.pt": "x", "notes.txt": "x"}
    with open_folder(write_checkpoint(tmp_path / "a", files=files)) as folder:
        assert set(folder.files) == {"config.json", "tokenizer.json", "chat_template.jinja"}


def test_pickles_beside_safetensors_are_left_alone(tmp_path):
    path = write_checkpoint(tmp_path / "a")
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with open_folder(path) as folder:
        assert folder.kind is FolderKind.CHECKPOINT


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickles_alone_are_refused_with_the_way_out(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(config()))
    (tmp_path / name).write_bytes(b"\x80\x04")
    error = refused(tmp_path, PickleRefusedError, name)
    assert "save_pretrained" in error.hint


def test_pickled_adapter_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter_config()))
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    refused(tmp_path, PickleRefusedError)


def test_folders_without_a_model(tmp_path):
    refused(tmp_path, CheckpointError, "no weights")
    refused(tmp_path / "nothing", CheckpointError, "no folder")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "GGUF" in refused(tmp_path, CheckpointError).hint
    refused(tmp_path / "model.gguf", CheckpointError, "not a folder")


def test_weights_without_config(tmp_path):
    path = write_checkpoint(tmp_path / "a")
    (path / "config.json").unlink()
    refused(path, InvalidConfigError, "config.json")


def write_index(path, weight_map):
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/hostname",
        "sub/x.safetensors",
        "..",
        "",
        "a\0b",
        "a\\b",
        "a\nb.safetensors",
    ],
)
def test_index_cannot_name_files_elsewhere(tmp_path, name):
    path = write_checkpoint(tmp_path / "a", shards=2)
    (tmp_path / "secret.safetensors").write_bytes(safetensors_bytes({}))
    refused(write_index(path, {"x": name}), PathEscapeError)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "tokenizer.json", "config.json"])
def test_links_cannot_lead_elsewhere(tmp_path, name):
    path = write_checkpoint(tmp_path / "a", shards=2)
    (path / name).rename(tmp_path / "outside")
    (path / name).symlink_to(tmp_path / "outside")
    refused(path, PathEscapeError)


@pytest.mark.parametrize("write", [write_checkpoint, write_adapter])
def test_links_of_single_weight_files_cannot_lead_elsewhere(tmp_path, write):
    path = write(tmp_path / "a")
    weights = next(path.glob("*.safetensors"))
    weights.rename(tmp_path / "outside")
    weights.symlink_to("../outside")
    refused(path, PathEscapeError)


def test_links_of_the_hub_cache_are_followed(tmp_path):
    repo = tmp_path / "models--org--name"
    path = write_checkpoint(repo / "snapshots" / "abc")
    (repo / "blobs").mkdir()
    for file in list(path.iterdir()):
        target = repo / "blobs" / f"digest-{file.name}"
        file.rename(target)
        file.symlink_to(f"../../blobs/{target.name}")
    with open_folder(path) as folder:
        assert folder.kind is FolderKind.CHECKPOINT
    with open_folder(tmp_path / "models--org--name/snapshots/abc") as folder:
        assert len(folder.files) == 3


def test_a_path_that_is_a_link_to_the_folder_is_fine(tmp_path):
    write_checkpoint(tmp_path / "a", shards=2)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with open_folder(tmp_path / "b") as folder:
        assert len(folder.shards) == 2


def test_missing_shard(tmp_path):
    path = write_checkpoint(tmp_path / "a", shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    refused(path, MissingShardError, "model-00002-of-00003")


def test_pickled_shards(tmp_path):
    path = write_index(write_checkpoint(tmp_path / "a", shards=2), {"x": "pytorch_model-00001.bin"})
    refused(path, PickleRefusedError)


@pytest.mark.parametrize("value", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_index_without_a_map(tmp_path, value):
    path = write_checkpoint(tmp_path / "a", shards=2)
    (path / "model.safetensors.index.json").write_text(json.dumps(value))
    with pytest.raises(InvalidConfigError), open_folder(path):
        pass


def test_index_that_does_not_tell_the_truth(tmp_path):
    path = write_checkpoint(tmp_path / "a", shards=2)
    index = path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    names = list(weight_map)
    refused(write_index(path, {**weight_map, "ghost": weight_map[names[0]]}), TensorMismatchError, "ghost")
    swapped = {**weight_map, names[0]: weight_map[names[-1]]}
    refused(write_index(path, swapped), TensorMismatchError)
    del weight_map[names[0]]
    with (
        pytest.raises(TensorMismatchError, match="does not list"),
        open_folder(write_index(path, weight_map)),
    ):
        pass


def test_tensor_in_two_shards(tmp_path):
    path = write_checkpoint(tmp_path / "a", shards=2)
    first, second = sorted(path.glob("*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    second.write_bytes(data)
    with pytest.raises(TensorMismatchError, match="both"), open_folder(path):
        pass


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", TruncatedFileError),
        ("   ", TruncatedFileError),
        ("{", InvalidConfigError),
        ("[]", InvalidConfigError),
        ('{"a": NaN}', InvalidConfigError),
        ("[" * 100_000, InvalidConfigError),
        ("\0\0", InvalidConfigError),
    ],
)
def test_json_files_are_checked(tmp_path, text, expected):
    path = write_checkpoint(tmp_path / "a")
    (path / "config.json").write_text(text)
    with pytest.raises(expected), open_folder(path):
        pass
    (path / "tokenizer_config.json").write_text(text)
    with pytest.raises(expected):
        read_kept_file(path / "tokenizer_config.json")


def test_large_json_files_are_checked_at_their_ends(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"vocab": "' + "x" * 2_000_000 + '"}\n')
    assert len(read_kept_file(path)) > 2_000_000
    path.write_text(path.read_text()[:-10])
    with pytest.raises(TruncatedFileError):
        read_kept_file(path)


def test_inside_accepts_plain_names(tmp_path):
    assert inside(tmp_path, "a-b.c_1") == tmp_path / "a-b.c_1"
