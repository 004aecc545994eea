"""What register says of a folder besides that it is registered."""

import pytest

from blockzoo import Zoo
from support.folders import adapter_config, config, tensors, write_adapter, write_checkpoint


@pytest.fixture
def zoo(tmp_path):
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    zoo.register(write_checkpoint(tmp_path / "SmolLM2-135M", config(), tensors(config())), name="small")
    return zoo


def adapter(tmp_path, base_model):
    return write_adapter(tmp_path / "lora", adapter_config(base_model_name_or_path=base_model))


def test_weights_in_other_forms_are_named_and_a_trainers_state_is_not(zoo, tmp_path):
    folder = write_checkpoint(tmp_path / "more")
    for name in ("pytorch_model.bin", "consolidated.00.pth", "optimizer.pt", "training_args.bin"):
        (folder / name).write_bytes(b"x")
    (remark,) = (one for one in zoo.register(folder, name="more").remarks if "not read" in one)
    assert remark.endswith("consolidated.00.pth, pytorch_model.bin")


def test_a_missing_tokenizer_is_told(zoo, tmp_path):
    folder = write_checkpoint(tmp_path / "plain")
    (folder / "tokenizer.json").unlink(missing_ok=True)
    told = " ".join(zoo.register(folder, name="plain").remarks)
    assert "there is no tokenizer.json: requests have to give token ids" in told
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" not in " ".join(zoo.register(folder, name="with").remarks)


def test_a_base_that_was_found_by_its_name_is_told(zoo, tmp_path):
    path = adapter(tmp_path, "somewhere/small")
    assert any("the base is small@1, by the name" in one for one in zoo.register(path, name="a").remarks)
    assert not any("by the name" in one for one in zoo.register(path, name="b", base="small").remarks)


@pytest.mark.parametrize(
    ("recorded", "doubted"),
    [
        ("HuggingFaceTB/SmolLM2-135M", False),
        ("/home/me/smollm2-135m/", False),
        ("org/small", False),
        ("", False),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("other", True),
    ],
)
def test_an_adapter_of_another_base_is_doubted(zoo, tmp_path, recorded, doubted):
    zoo.register(write_checkpoint(tmp_path / "x", config(), tensors(config(), seed=1)), name="other")
    doubt = zoo.register(adapter(tmp_path, recorded), name="bot", base="small").base_doubt
    assert bool(doubt) is doubted
    if doubted:
        assert repr(recorded) in doubt
        assert "small@1, registered from" in doubt
        assert ("; the variant other has that name" in doubt) is (recorded == "other")


COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40


@pytest.mark.parametrize(
    ("noted", "revision", "doubted"),
    [
        (COMMIT, OTHER, True),
        (COMMIT, COMMIT, False),
        (COMMIT, "main", False),  # moves
        (COMMIT, None, False),
        (COMMIT, 7, False),
        ("v1", OTHER, False),
    ],
)
def test_an_adapter_of_another_commit_of_its_base_is_doubted(zoo, tmp_path, noted, revision, doubted):
    """Equal names and shapes, other weights: the hub's commits tell where both sides have one."""
    cached = tmp_path / "models--org--tale" / "snapshots" / noted
    cached.parent.mkdir(parents=True)
    zoo.register(write_checkpoint(cached, config(), tensors(config(), seed=2)), name="base")
    values = adapter_config(base_model_name_or_path="org/tale", revision=revision)
    doubt = zoo.register(write_adapter(tmp_path / "lora", values), name="bot", base="base").base_doubt
    told = f"the adapter was trained on commit {OTHER} of 'org/tale', and its base base@1 is commit {COMMIT}"
    assert doubt == (told if doubted else "")
