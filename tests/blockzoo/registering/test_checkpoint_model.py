"""The real checkpoint: SmolLM2-135M-Instruct through the zoo and back."""

import filecmp
import os
from pathlib import Path

import pytest

from blockzoo.zoo import Zoo
from support.paths import ROOT

MODEL = Path(os.environ.get("BLOCKZOO_TEST_MODEL", ROOT / ".cache" / "smollm2"))

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="run `make model` first"),
]


def test_smollm2_through_the_zoo_and_back(tmp_path):
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    result = zoo.register(MODEL, name="smollm2")
    assert result.num_bytes == 269_030_016
    chain = zoo.chain(result.record.chain)
    assert (chain.family, len(chain.links), chain.context_length, chain.vocab_size) == (
        "llama",
        32,
        8192,
        49152,
    )
    assert zoo.block(chain.links[-1].base).config["tied"] is True
    assert zoo.block(chain.links[1].base).config["rope"] == {"type": "default", "theta": "100000.0"}
    assert zoo.register(MODEL, name="smollm2").unchanged
    zoo.export("smollm2", tmp_path / "out")
    names = [file.name for file in (tmp_path / "out").iterdir()]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(names)
    same, different, errors = filecmp.cmpfiles(MODEL, tmp_path / "out", names, shallow=False)
    assert (sorted(same), different, errors) == (sorted(names), [], [])
    # Everything once, beside the tokenizer: sharing starts with the second variant.
    assert zoo.du().stored_bytes < 1.02 * result.num_bytes
