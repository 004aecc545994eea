from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockzoo.canonical import canonical_json
from blockzoo.errors import CorruptManifestError
from blockzoo.manifest import (
    BlobId,
    BlockId,
    BlockManifest,
    ChainId,
    ChainManifest,
    DType,
    FileRef,
    JsonValue,
    Link,
    TensorRef,
    VariantName,
    VariantRecord,
)
from blockzoo.manifest_json import (
    block_bytes,
    block_from_json,
    block_to_json,
    chain_from_json,
    chain_to_json,
    is_safe_filename,
    variant_from_json,
    variant_to_json,
)

A, B, C = "a" * 64, "b" * 64, "c" * 64
BLOCK = BlockManifest(
    "embedding",
    "llama",
    {"hidden_size": 4, "vocab_size": 10},
    {
        "weight": TensorRef(DType.F16, (10, 4), (BlobId(A), BlobId(B), BlobId(C)), 4),
        "s": TensorRef(DType.F32, (), (BlobId(A),)),
    },
)
CHAIN = ChainManifest("llama", (Link(BlockId(A)), Link(BlockId(B), (BlockId(C),))), 2048, 10)
RECORD = VariantRecord(
    VariantName("bot"),
    3,
    ChainId(A),
    "adapter",
    {"sub/config.json": FileRef(BlobId(B), 17)},
    {"base": "smol"},
)


def test_round_trips():
    assert block_from_json(block_to_json(BLOCK)) == BLOCK
    assert chain_from_json(chain_to_json(CHAIN)) == CHAIN
    assert variant_from_json(variant_to_json(RECORD)) == RECORD


def test_tombstone():
    tombstone = VariantRecord(VariantName("bot"), 4, ChainId(""), "tombstone", deleted=True)
    assert variant_from_json(variant_to_json(tombstone)) == tombstone


def test_unknown_kinds_and_members_are_kept_readable():
    value = {**block_to_json(BLOCK), "kind": "stitch", "future": {"x": 1}}
    assert block_from_json(value).kind == "stitch"


def change(value, path, new):
    value = copy.deepcopy(value)
    target = value
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = new
    return value


WEIGHT = ("tensors", "weight")


@pytest.mark.parametrize(
    ("path", "new"),
    [
        (("kind",), 3),
        (("family",), None),
        (("config",), []),
        (("tensors",), None),
        (WEIGHT, "blob"),
        ((*WEIGHT, "dtype"), "F8"),
        ((*WEIGHT, "shape"), [10, -4]),
        ((*WEIGHT, "shape"), [10, True]),
        ((*WEIGHT, "shape"), [1] * 20),
        ((*WEIGHT, "shape"), []),
        ((*WEIGHT, "shape"), [10**12, 4]),
        ((*WEIGHT, "blobs"), [A, B]),
        ((*WEIGHT, "blobs"), [A, B, "../../etc/passwd"]),
        ((*WEIGHT, "blobs"), [A, B, C.upper()]),
        ((*WEIGHT, "chunk_rows"), -1),
        ((*WEIGHT, "chunk_rows"), 0),
    ],
)
def test_damaged_blocks(path, new):
    with pytest.raises(CorruptManifestError):
        block_from_json(change(block_to_json(BLOCK), path, new))


@pytest.mark.parametrize(
    ("path", "new"),
    [
        (("links",), {}),
        (("links", 0), A),
        (("links", 0, "base"), "x"),
        (("links", 1, "applied"), [1]),
        (("vocab_size",), "10"),
        (("context_length",), -1),
    ],
)
def test_damaged_chains(path, new):
    with pytest.raises(CorruptManifestError):
        chain_from_json(change(chain_to_json(CHAIN), path, new))


@pytest.mark.parametrize(
    ("path", "new"),
    [
        (("name",), "../bot"),
        (("version",), 0),
        (("version",), True),
        (("chain",), ""),
        (("deleted",), 1),
        (("provenance",), {"base": 1}),
        (("files",), {"../x": {"blob": A, "size": 1}}),
        (("files",), {"x": {"blob": A}}),
        (("files",), {"x": {"blob": "no", "size": 1}}),
    ],
)
def test_damaged_records(path, new):
    with pytest.raises(CorruptManifestError):
        variant_from_json(change(variant_to_json(RECORD), path, new))


@pytest.mark.parametrize("reader", [block_from_json, chain_from_json, variant_from_json])
@pytest.mark.parametrize("value", [None, 1, "x", [], {}])
def test_other_json(reader, value):
    with pytest.raises(CorruptManifestError):
        reader(value)


@pytest.mark.parametrize("name", ["config.json", "a/b/c.txt", ".hidden", "..a", "chat template.jinja"])
def test_safe_filenames(name):
    assert is_safe_filename(name)


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "../a", "a/../b", "./a", "a//b", "a\\b", "a\nb", "a\0", "x" * 256]
)
def test_unsafe_filenames(name):
    assert not is_safe_filename(name)


REFS = st.builds(
    TensorRef,
    st.sampled_from(DType),
    st.lists(st.integers(0, 1 << 40), max_size=3).map(tuple),
    st.lists(st.sampled_from(["a" * 64, "0" * 64, 'x"y', "é"]), max_size=3).map(tuple),
    st.integers(0, 9),
)


@given(
    st.dictionaries(
        st.sampled_from(["weight", "q_proj.lora_A", "B", "é", 'a"b', "\U00010000", "\uffff"]), REFS
    ),
    st.dictionaries(st.text(max_size=3), st.integers(-9, 9) | st.text(max_size=3), max_size=3),
)
def test_the_bytes_of_a_block_are_canonical(
    tensors: dict[str, TensorRef], config: dict[str, JsonValue]
) -> None:
    block = BlockManifest("layer", "llama", config, tensors)
    assert block_bytes(block) == canonical_json(block_to_json(block))
