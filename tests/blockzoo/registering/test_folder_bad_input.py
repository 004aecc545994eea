"""Every kind of bad folder: the error's type, a sentence that helps, and nothing new in the zoo."""

import json
import os

import numpy as np
import pytest

from blockzoo.errors import (
    AdapterBaseMismatchError,
    AdapterError,
    BlockzooError,
    CheckpointError,
    InvalidConfigError,
    InvalidNameError,
    MissingShardError,
    NonFiniteWeightsError,
    PathEscapeError,
    PickleRefusedError,
    StorageFullError,
    TensorMismatchError,
    TruncatedFileError,
    UnknownTargetError,
    UnsupportedAdapterError,
    UnsupportedArchitectureError,
    UnsupportedFeatureError,
    VariantNotFoundError,
)
from blockzoo.zoo import Zoo
from support.folders import (
    adapter_config,
    adapter_tensors,
    config,
    encode,
    tensor,
    tensors,
    write_adapter,
    write_checkpoint,
)

UP = "model.layers.1.mlp.up_proj.weight"
LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def poisoned(items, name, value):
    values = np.zeros(items[name].shape)
    values.flat[-1] = value
    return {**items, name: encode(values, items[name].dtype)}


def truncated(path, keep):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    return path


def without(items, name):
    return {key: item for key, item in items.items() if key != name}


def pickled(path):
    write_checkpoint(path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    return path


def without_shard(path):
    write_checkpoint(path, shards=2)
    (path / "model-00002-of-00002.safetensors").unlink()
    return path


def with_index(path, name):
    write_checkpoint(path, shards=2)
    index = path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"][UP] = name
    index.write_text(json.dumps(values))
    return path


def with_link(path):
    write_checkpoint(path, shards=2)
    shard = path / "model-00001-of-00002.safetensors"
    shard.rename(path.parent / "elsewhere.safetensors")
    shard.symlink_to(path.parent / "elsewhere.safetensors")
    return path


def with_file(path, name, text):
    write_checkpoint(path)
    (path / name).write_text(text)
    return path


def checkpoint(**changes):
    def write(path):
        return write_checkpoint(path, config(**changes), tensors(config()))

    return write


def weights(change):
    return lambda path: write_checkpoint(path, items=change(tensors(config())))


def adapter(items=None, **changes):
    return lambda path: write_adapter(path, adapter_config(**changes), items)


CHECKPOINTS = {
    "nothing there": (lambda path: path, CheckpointError),
    "empty folder": (lambda path: path.mkdir() or path, CheckpointError),
    "empty file": (lambda path: truncated(write_checkpoint(path), 0), TruncatedFileError),
    "cut in the header": (lambda path: truncated(write_checkpoint(path), 100), TruncatedFileError),
    "cut in the tensors": (lambda path: truncated(write_checkpoint(path), -1), TruncatedFileError),
    "pickle": (pickled, PickleRefusedError),
    "missing shard": (without_shard, MissingShardError),
    "index leaves the folder": (lambda path: with_index(path, "../x.safetensors"), PathEscapeError),
    "index with absolute path": (lambda path: with_index(path, "/x.safetensors"), PathEscapeError),
    "shard is a link to elsewhere": (with_link, PathEscapeError),
    "NaN": (weights(lambda items: poisoned(items, UP, np.nan)), NonFiniteWeightsError),
    "infinity": (weights(lambda items: poisoned(items, "model.norm.weight", np.inf)), NonFiniteWeightsError),
    "missing tensor": (weights(lambda items: without(items, UP)), TensorMismatchError),
    "unexpected tensor": (weights(lambda items: {**items, "extra": tensor((2,))}), TensorMismatchError),
    "another shape": (weights(lambda items: {**items, UP: tensor((24, 17))}), TensorMismatchError),
    "transposed": (weights(lambda items: {**items, UP: tensor((16, 24))}), TensorMismatchError),
    "integers": (weights(lambda items: {**items, UP: tensor((24, 16), dtype="I64")}), TensorMismatchError),
    "doubles": (weights(lambda items: {**items, UP: tensor((24, 16), dtype="F64")}), TensorMismatchError),
    "more layers in the config": (checkpoint(num_hidden_layers=4), TensorMismatchError),
    "fewer layers in the config": (checkpoint(num_hidden_layers=2), TensorMismatchError),
    "biases promised": (checkpoint(attention_bias=True), TensorMismatchError),
    "vocabulary too large": (checkpoint(vocab_size=41), TensorMismatchError),
    "zero heads": (checkpoint(num_attention_heads=0), InvalidConfigError),
    "negative size": (checkpoint(hidden_size=-16), InvalidConfigError),
    "size not divisible": (checkpoint(num_attention_heads=3, num_key_value_heads=3), InvalidConfigError),
    "no architecture": (checkpoint(architectures=None, model_type=None), InvalidConfigError),
    "two architectures": (checkpoint(architectures=["LlamaForCausalLM"] * 2), InvalidConfigError),
    "config is no JSON": (lambda path: with_file(path, "config.json", "{"), InvalidConfigError),
    "config is empty": (lambda path: with_file(path, "config.json", ""), TruncatedFileError),
    "config is a list": (lambda path: with_file(path, "config.json", "[]"), InvalidConfigError),
    "broken tokenizer file": (lambda path: with_file(path, "tokenizer.json", '{"a"'), InvalidConfigError),
    "unsupported architecture": (checkpoint(architectures=["GPT2LMHeadModel"]), UnsupportedArchitectureError),
    "unsupported rope": (
        checkpoint(rope_parameters={"rope_type": "su", "factor": 4.0}), UnsupportedFeatureError,
    ),
    "quantised": (checkpoint(quantization_config={"quant_method": "awq"}), UnsupportedFeatureError),
}  # fmt: skip

ADAPTERS = {
    "for another base": (adapter(adapter_tensors(config(hidden_size=32))), AdapterBaseMismatchError),
    "unknown target": (adapter(target_modules=["c_attn"]), UnknownTargetError),
    "DoRA without magnitudes": (adapter(use_dora=True), AdapterError),
    "prefix tuning": (adapter(peft_type="PREFIX_TUNING"), UnsupportedAdapterError),
    "NaN": (adapter(poisoned(adapter_tensors(config()), LORA, np.nan)), NonFiniteWeightsError),
    "rank 0": (adapter(r=0), AdapterError),
    "no tensors": (adapter({}), AdapterBaseMismatchError),
}


def listing(zoo):
    return sorted((info.key, info.size) for info in zoo.store.storage.list(""))


@pytest.fixture
def zoo(tmp_path):
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    zoo.register(write_checkpoint(tmp_path / "base"), name="base")
    return zoo


def check_refused(zoo, path, expected, **options):
    before = listing(zoo)
    with pytest.raises(BlockzooError) as caught:
        zoo.register(path, name="bad", **options)
    assert type(caught.value) is expected, caught.value
    assert 10 < len(str(caught.value)) < 500
    assert listing(zoo) == before
    assert not list((zoo.store.storage.inner._root / "tmp").glob("*/[!.]*"))
    return caught.value


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(zoo, tmp_path, name):
    write, expected = CHECKPOINTS[name]
    check_refused(zoo, write(tmp_path / "bad"), expected)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(zoo, tmp_path, name):
    write, expected = ADAPTERS[name]
    check_refused(zoo, write(tmp_path / "bad"), expected, base="base")


def test_messages_say_what_to_do(zoo, tmp_path):
    error = check_refused(zoo, CHECKPOINTS["NaN"][0](tmp_path / "a"), NonFiniteWeightsError)
    assert UP in str(error)
    assert error.metadata["tensor"] == UP
    error = check_refused(
        zoo, CHECKPOINTS["unsupported architecture"][0](tmp_path / "b"), UnsupportedArchitectureError
    )
    for architecture in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        assert architecture in error.hint
    error = check_refused(zoo, CHECKPOINTS["another shape"][0](tmp_path / "c"), TensorMismatchError)
    assert (error.metadata["found"], error.metadata["expected"]) == ("[24, 17]", "[24, 16]")
    error = check_refused(zoo, pickled(tmp_path / "d"), PickleRefusedError)
    assert "save_pretrained" in error.hint


@pytest.mark.parametrize(
    "name", ["../up", "a/b", "..", ".x", "", "a b", "ä", "x\n", "CON/..", "a" * 200, "a\0"]
)
def test_names_with_path_tricks(zoo, tmp_path, name):
    before = listing(zoo)
    path = write_checkpoint(tmp_path / "good")
    with pytest.raises(InvalidNameError):
        zoo.register(path, name=name)
    for read in (zoo.resolve, zoo.show, zoo.versions, zoo.rm, zoo.rollback):
        with pytest.raises(InvalidNameError):
            read(name)
    assert listing(zoo) == before


def test_unknown_variants_suggest_near_names(zoo):
    for read in (zoo.resolve, zoo.show, zoo.versions, zoo.rm, zoo.rollback):
        with pytest.raises(VariantNotFoundError) as caught:
            read("bse")
        assert caught.value.suggestions == ("base",)
    with pytest.raises(VariantNotFoundError, match="base@7") as caught:
        zoo.resolve("base@7")
    assert caught.value.suggestions == ("base@1",)


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_disk_full_during_register(zoo, tmp_path, monkeypatch, after):
    path = write_checkpoint(tmp_path / "a", items=tensors(config(), seed=1))
    zoo.register(tmp_path / "base", name="a")
    real, calls = os.writev, []

    def full(fd, buffers):
        calls.append(fd)
        if len(calls) > after:
            raise OSError(28, "No space left on device")
        return real(fd, buffers)

    monkeypatch.setattr(os, "writev", full)
    with pytest.raises(StorageFullError):
        zoo.register(path, name="a")
    monkeypatch.undo()
    assert [record.version for record in zoo.versions("a")] == [1]
    assert zoo.verify().ok
    assert zoo.register(path, name="a").record.version == 2
