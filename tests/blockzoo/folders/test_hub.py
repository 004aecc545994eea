"""Models of the hub by their id: huggingface_hub itself, against a hub on the loopback interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockzoo.errors import CheckpointError
from blockzoo.folders.hub import find_folder, is_hub_id
from blockzoo.zoo import Zoo
from support.folders import write_adapter, write_checkpoint
from support.hub_server import Hub, hub_server
from support.paths import ROOT

SCRIPT = """
import json, sys
from blockzoo.errors import BlockzooError
from blockzoo.zoo import Zoo
zoo = Zoo.open(sys.argv[1], create=True)
for source, name, revision in json.loads(sys.argv[2]):
    try:
        record = zoo.register(source, name=name, revision=revision).record
        print(json.dumps(dict(record.provenance)))
    except BlockzooError as error:
        print(json.dumps([error.reason, str(error), error.hint]))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_server() as hub:
        yield hub


def register(
    hub: Hub, tmp_path: Path, *asked: tuple[str, str, str | None], offline: bool = False
) -> list[dict[str, str] | list[str]]:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "zoo"), json.dumps(asked)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_model_is_fetched_once_and_its_commit_is_kept(hub: Hub, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "m", shards=2)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag[1].jinja").write_text("x")
    for name in ("pytorch_model.bin", "original/params.json", "onnx/model.onnx", "consolidated.safetensors"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("not wanted")
    adapter = write_adapter(tmp_path / "a")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/model"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    hub.models = {
        "org/model": {"main": model, "v2": write_checkpoint(tmp_path / "v2")},
        "org/lora": {"main": adapter},
    }
    hub.fetched.clear()
    first, other, lora = register(
        hub, tmp_path, ("org/model", "model", None), ("org/model", "tagged", "v2"), ("org/lora", "lora", None)
    )
    assert isinstance(first, dict)
    assert isinstance(other, dict)
    assert isinstance(lora, dict)
    assert (first["source"], first["revision"]) == (
        "https://huggingface.co/org/model",
        hub.commit("org/model", "main"),
    )
    assert other["revision"] == hub.commit("org/model", "v2")
    assert lora["base"] == "model@1"
    assert not {"pytorch_model.bin", "original/params.json", "consolidated.safetensors"} & set(hub.fetched)
    zoo = Zoo.open(tmp_path / "zoo")
    assert "additional_chat_templates/rag[1].jinja" in zoo.resolve("model").files
    hub.fetched.clear()
    (again,) = register(hub, tmp_path, ("org/model", "again", None))
    assert isinstance(again, dict)
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]
    # Without a connection the cache answers, with the commit that it has.
    (cached,) = register(hub, tmp_path, ("org/model", "cached", None), offline=True)
    assert isinstance(cached, dict)
    assert cached["revision"] == first["revision"]


def test_what_the_hub_does_not_give_is_a_sentence(hub: Hub, tmp_path: Path) -> None:
    pickled, empty = tmp_path / "pickled", tmp_path / "empty"
    for folder, name in ((pickled, "pytorch_model.bin"), (empty, "README.md")):
        folder.mkdir()
        (folder / name).write_text("x")
        (folder / "config.json").write_text("{}")
    model = write_checkpoint(tmp_path / "m")
    hub.models = {
        f"org/{name}": {"main": folder} for name, folder in (("m", model), ("p", pickled), ("e", empty))
    }
    hub.models["org/g"] = {"main": model}
    hub.gated = {"org/g"}
    cases = {
        "none": ("org/none", None, "HUB_MODEL_NOT_FOUND", "no folder org/none"),
        "gated": ("org/g", None, "HUB_MODEL_NOT_FOUND", "gated"),
        "revision": ("org/m", "v9", "HUB_MODEL_NOT_FOUND", "'v9'"),
        "pickles": ("org/p", None, "PICKLE_REFUSED", "pickles"),
        "empty": ("org/e", None, "INVALID_CHECKPOINT", "no weights"),
    }
    found = register(hub, tmp_path, *((repo, name, revision) for name, (repo, revision, *_) in cases.items()))
    for (name, (_, _, reason, words)), error in zip(cases.items(), found, strict=True):
        assert isinstance(error, list), name
        assert error[0] == reason, name
        assert words in error[1], name
        assert error[2], name
    (offline,) = register(hub, tmp_path, ("org/never-fetched", "x", None), offline=True)
    assert isinstance(offline, list)
    assert offline[0] == "HUB_UNREACHABLE"
    assert "not in the cache" in offline[1]


@pytest.mark.parametrize("text", ["org/model", "o/m.v1-2_3"])
def test_ids(text: str) -> None:
    assert is_hub_id(text)


@pytest.mark.parametrize(
    "text", ["model", "./org/model", "org/model/x", "/org/model", "org/", "o--x/y", "o/..", "o/m "]
)
def test_no_ids(text: str) -> None:
    assert not is_hub_id(text)


def test_a_folder_comes_before_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert find_folder("org/model").origin == {}
    with pytest.raises(CheckpointError):
        Zoo.open(tmp_path / "zoo", create=True).register("org/model", name="m")
