"""What can be evaluated, what is refused, and what the numbers of simple cases must be."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from blockzoo import layout
from blockzoo.canonical import digest_bytes
from blockzoo.equivalence import Ledger
from blockzoo.errors import (
    CorruptBlobError,
    EvaluationError,
    IncompatibleBlocksError,
    InvalidInputError,
    NotFoundError,
    VariantNotFoundError,
)
from blockzoo.evaluation import measure
from blockzoo.evaluation.evaluate import evaluate
from blockzoo.evaluation.measure import kl_divergence
from blockzoo.evaluation.selection import select
from blockzoo.evaluation.tokens import MIN_TOKENS, decode_text, windows
from blockzoo.zoo import Zoo
from support.adapters import ADAPTERS, make_adapter
from support.edge import byte_level_tokenizer
from support.models import SENTENCES, SPECS, ModelSpec, edit_checkpoint, make_checkpoint, tune_layers

TEXT = " ".join(SENTENCES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("checkpoints")
    make_checkpoint(SPECS["llama-gqa"], place / "base")
    tune_layers(place / "base", place / "tuned", [1, 2])
    make_adapter(ADAPTERS["q-v"], place / "base", place / "adapter")
    return place


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """A zoo with a base, a fine-tune and an adapter; made once, because the tests are many."""
    zoo = Zoo.open(tmp_path_factory.mktemp("zoo"), create=True)
    zoo.register(folder / "base", name="base")
    zoo.register(folder / "tuned", name="tuned", base="base")
    zoo.register(folder / "adapter", name="adapted", base="base")
    return zoo


@pytest.fixture
def zoo(made):
    """The same, without what other tests have left in it."""
    for record in Ledger(made.store).ids():
        made.store.storage.delete(layout.equivalence_key(record))
    for variant in made.variants():
        if variant.name not in ("base", "tuned", "adapted"):
            made.rm(variant.name)
    return made


class Meter:
    def __init__(self):
        self.tasks, self.done = [], 0

    def start(self, task, total_bytes):
        self.tasks.append((task, total_bytes))

    def advance(self, num_bytes):
        self.done += num_bytes

    def finish(self):
        self.tasks.append("finished")


def add(zoo, folder, tmp_path, name, spec=None, **edits):
    """Register a copy of the base checkpoint with edits, or a checkpoint of another shape."""
    if spec is None:
        edit_checkpoint(folder / "base", tmp_path / name, **edits)
    else:
        make_checkpoint(spec, tmp_path / name)
    zoo.register(tmp_path / name, name=name)


# What it measures.


@pytest.mark.parametrize("run", ["0", "3", "1-5", "5", "0-6"])
def test_a_block_stands_in_for_itself(zoo, run):
    (record,) = evaluate(zoo, f"base:{run}", f"base:{run}", TEXT)
    assert (record.mean_kl, record.worst_kl, record.top1_agreement) == (0.0, 0.0, 1.0)
    assert record.weight_distance == 0.0
    assert record.result == zoo.resolve("base").chain


def test_the_record_says_what_was_done(zoo):
    meter = Meter()
    (record,) = evaluate(zoo, "base", "tuned", TEXT, max_tokens=100, window_tokens=32, progress=meter)
    assert record == Ledger(zoo.store).get(record.id)
    assert (record.original.variant, record.original.positions) == ("base@1", (2, 4))
    assert (record.substitute.variant, record.substitute.positions) == ("tuned@1", (2, 4))
    chain = zoo.chain(zoo.resolve("tuned").chain)
    assert record.substitute.links == chain.links[2:4]
    assert (record.num_tokens, record.window_tokens, record.dtype) == (100, 32, "float32")
    assert (record.text_digest, record.text_bytes) == (digest_bytes(TEXT.encode()), len(TEXT.encode()))
    assert record.tokenizer == zoo.resolve("base").files["tokenizer.json"].blob
    assert record.result == zoo.resolve("tuned").chain
    assert 0 < record.mean_kl < record.worst_kl
    assert meter.tasks == [("evaluating tuned@1:2-4 for base@1:2-4", 100), "finished"]
    assert meter.done == 100


def test_more_noise_diverges_more(zoo, folder, tmp_path):
    found = []
    for amount in (0.003, 0.03, 0.3):
        tune_layers(folder / "base", tmp_path / f"{amount}", [2], amount=amount)
        name = f"noise-{amount}"
        zoo.register(tmp_path / f"{amount}", name=name)
        found.extend(evaluate(zoo, "base", name, TEXT))
    kl = [record.mean_kl for record in found]
    assert 0 < kl[0] < kl[1] / 10 < kl[2] / 100
    assert found[0].top1_agreement > found[1].top1_agreement > found[2].top1_agreement
    distances = [record.weight_distance for record in found]
    assert distances == pytest.approx([0.003, 0.03, 0.3], rel=0.1)


def test_directions_are_records_of_their_own(zoo):
    (there,) = evaluate(zoo, "base", "tuned", TEXT)
    (back,) = evaluate(zoo, "tuned", "base", TEXT)
    assert there.mean_kl != back.mean_kl
    assert there.mean_kl == pytest.approx(back.mean_kl, rel=0.5)
    assert (there.original, there.substitute) == (back.substitute, back.original)


def test_numbers_do_not_depend_on_how_the_work_is_cut(zoo, monkeypatch):
    (whole,) = evaluate(zoo, "base", "tuned", TEXT, window_tokens=30)
    monkeypatch.setattr(measure, "BATCH_TOKENS", 1)
    monkeypatch.setattr(measure, "LOGIT_ROWS", 7)
    (cut,) = evaluate(zoo, "base", "tuned", TEXT, window_tokens=30)
    assert cut.mean_kl == pytest.approx(whole.mean_kl, rel=1e-4)
    assert cut.num_tokens == whole.num_tokens


def test_windows_are_kept_apart(zoo):
    """A token sees nothing of the window before its own, and all of its own before it."""
    ids = list(range(10))
    assert windows(ids, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    (short,) = evaluate(zoo, "base", "tuned", TEXT, window_tokens=2)
    (long,) = evaluate(zoo, "base", "tuned", TEXT)
    assert short.mean_kl != pytest.approx(long.mean_kl, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_types(zoo, dtype):
    (record,) = evaluate(zoo, "base", "tuned", TEXT, dtype=dtype)
    (exact,) = evaluate(zoo, "base", "tuned", TEXT)
    assert record.dtype == dtype
    assert record.mean_kl == pytest.approx(exact.mean_kl, rel=0.5)


def test_weight_distance_counts_adapters(zoo):
    (record,) = evaluate(zoo, "base", "adapted", TEXT)
    assert record.original.positions == (1, 5)
    assert 0 < record.weight_distance < 1
    assert [link.base for link in record.original.links] == [link.base for link in record.substitute.links]


def test_weight_distance_of_other_shapes_is_none(zoo, folder, tmp_path):
    add(zoo, folder, tmp_path, "wide", ModelSpec(options={"intermediate_size": 190}))
    (record,) = evaluate(zoo, "base:2", "wide:2", TEXT)
    assert record.weight_distance is None
    assert record.mean_kl > 0


def test_kl_is_what_it_says():
    p, q = torch.tensor([[0.0, 0.0], [3.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    (zero, other) = kl_divergence(p, q).tolist()
    share = 1 / (1 + torch.tensor(-2.0, dtype=torch.float64).exp().item())
    expected = share * torch.tensor(share / 0.5).log() + (1 - share) * torch.tensor((1 - share) / 0.5).log()
    assert zero == 0.0
    assert other == pytest.approx(float(expected), rel=1e-6)


def test_kl_of_extreme_logits_is_finite():
    p, q = torch.tensor([[3e38, -3e38, 0.0]]), torch.tensor([[-3e38, 3e38, 0.0]])
    assert kl_divergence(p, q).isfinite().all()


# What A and B may be.


def test_one_run_for_each_difference_and_one_for_all(zoo, folder, tmp_path):
    tune_layers(folder / "base", tmp_path / "apart", [0, 3])
    zoo.register(tmp_path / "apart", name="apart")
    found = evaluate(zoo, "base", "apart", TEXT)
    assert [record.original.positions for record in found] == [(1, 2), (4, 5), (1, 5)]
    assert found[2].result == zoo.resolve("apart").chain
    assert found[2].mean_kl > max(found[0].mean_kl, found[1].mean_kl)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("base:2", "tuned:3", ((2, 3), (3, 4))),
        ("base@1:1-3", "tuned@1:2-4", ((1, 3), (2, 4))),
        ("base:2", "tuned", ((2, 3), (2, 3))),
        ("base", "tuned:0-6", ((0, 6), (0, 6))),
    ],
)
def test_runs_by_position(zoo, a, b, expected):
    (pair,) = select(zoo, a, b)
    assert (pair.original.positions, pair.substitute.positions) == expected


def test_blocks_by_id(zoo):
    base, tuned = (zoo.chain(zoo.resolve(name).chain) for name in ("base", "tuned"))
    (pair,) = select(zoo, base.links[2].base, tuned.links[2].base)
    assert (str(pair.original), str(pair.substitute)) == ("base@1:2", "tuned@1:2")
    # `adapted` has the same base block, but a checkpoint comes before an adapter.
    (pair,) = select(zoo, base.links[1].base, "tuned:2")
    assert str(pair.original) == "base@1:1"
    with pytest.raises(NotFoundError, match="base of no link"):
        select(zoo, "0" * 64, "base")


@pytest.mark.parametrize("run", ["", "x", "1-", "3-3", "4-2", "-1", "1-2-3", "1" * 7, "1:2", "²"])
def test_runs_that_are_spelled_wrong(zoo, run):
    with pytest.raises(InvalidInputError):
        select(zoo, f"base:{run}", "tuned")


def test_positions_outside_the_chain(zoo):
    for a, b in (("base:6", "tuned"), ("base:0-7", "tuned"), ("base:1", "tuned:99")):
        with pytest.raises(InvalidInputError, match="positions 0 to 5"):
            select(zoo, a, b)


def test_unknown_variants(zoo):
    with pytest.raises(VariantNotFoundError) as caught:
        evaluate(zoo, "bas", "tuned", TEXT)
    assert "base" in caught.value.hint
    with pytest.raises(VariantNotFoundError):
        evaluate(zoo, "base", "tuned@2:3", TEXT)


def test_equal_variants_need_no_approval(zoo):
    with pytest.raises(InvalidInputError, match="the same links"):
        evaluate(zoo, "base", "base@1", TEXT)


# What cannot stand in.


@pytest.mark.parametrize(
    ("options", "run", "words"),
    [
        ({"hidden_size": 72}, "2", "hidden size differs"),
        ({"num_key_value_heads": 1}, "2", "key and value heads differs"),
        ({"head_dim": 16}, "2", "width of a head differs"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "2", "rotary positions differs"),
        ({"vocab_size": 600}, "2", "vocabularies differ"),
        ({"hidden_size": 72}, "0", "hidden size differs"),
        ({"hidden_size": 72}, "5", "hidden size differs"),
    ],
)
def test_other_shapes_are_refused(zoo, folder, tmp_path, options, run, words):
    add(zoo, folder, tmp_path, "other", ModelSpec(options=options))
    with pytest.raises(IncompatibleBlocksError, match=words):
        evaluate(zoo, f"base:{run}", f"other:{run}", TEXT)
    assert Ledger(zoo.store).ids() == []


def test_other_kinds_families_and_lengths_are_refused(zoo, folder, tmp_path):
    with pytest.raises(IncompatibleBlocksError, match="kind embedding, the other one of kind layer"):
        evaluate(zoo, "base:0", "base:1", TEXT)
    with pytest.raises(IncompatibleBlocksError, match="a run of 2 links"):
        evaluate(zoo, "base:1-3", "base:1", TEXT)
    add(zoo, folder, tmp_path, "qwen", SPECS["qwen3"])
    with pytest.raises(IncompatibleBlocksError, match="families differ"):
        evaluate(zoo, "base:2", "qwen:2", TEXT)
    add(zoo, folder, tmp_path, "deep", ModelSpec(options={"num_hidden_layers": 5}))
    with pytest.raises(IncompatibleBlocksError, match="6 links"):
        evaluate(zoo, "base", "deep", TEXT)


def test_other_tokens_are_refused(zoo, folder, tmp_path):
    edit_checkpoint(folder / "tuned", tmp_path / "bytes")
    (tmp_path / "bytes" / "tokenizer.json").write_text(byte_level_tokenizer().to_str())
    zoo.register(tmp_path / "bytes", name="bytes")
    edit_checkpoint(folder / "tuned", tmp_path / "none")
    (tmp_path / "none" / "tokenizer.json").unlink()
    zoo.register(tmp_path / "none", name="none")
    for name in ("bytes", "none"):
        with pytest.raises(IncompatibleBlocksError, match="tokenise this text differently"):
            evaluate(zoo, "base", name, TEXT)
    with pytest.raises(EvaluationError, match=r"no tokenizer\.json"):
        evaluate(zoo, "none", "base", TEXT)


def test_another_file_with_the_same_tokens_is_allowed(zoo, folder, tmp_path):
    edit_checkpoint(folder / "tuned", tmp_path / "spaced")
    path = tmp_path / "spaced" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    zoo.register(tmp_path / "spaced", name="spaced")
    (record,) = evaluate(zoo, "base", "spaced", TEXT)
    (same,) = evaluate(zoo, "base", "tuned", TEXT)
    assert record.mean_kl == same.mean_kl


def test_a_tokenizer_that_is_none(zoo, folder, tmp_path):
    edit_checkpoint(folder / "base", tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    zoo.register(tmp_path / "broken", name="broken")
    with pytest.raises(EvaluationError, match="cannot be used"):
        evaluate(zoo, "broken:1", "base:1", TEXT)


# What says nothing.


@pytest.mark.parametrize("text", ["", "Too short.", " "])
def test_a_text_that_is_too_short(zoo, text):
    with pytest.raises(EvaluationError, match=f"at least {MIN_TOKENS} are needed"):
        evaluate(zoo, "base", "tuned", text)
    assert Ledger(zoo.store).ids() == []


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 63},
        {"window_tokens": 0},
        {"window_tokens": 1},
        {"window_tokens": 513},
        {"dtype": "int8"},
        {"device": "abacus"},
    ],
)
def test_options_that_cannot_be(zoo, options):
    with pytest.raises(InvalidInputError):
        evaluate(zoo, "base", "tuned", TEXT, **options)


def test_text_that_is_not_text():
    assert decode_text("schön".encode()) == "schön"
    with pytest.raises(EvaluationError, match="not UTF-8"):
        decode_text(b"good \xff bad")
    with pytest.raises(EvaluationError, match="bytes"):
        decode_text(b"a" * ((16 << 20) + 1))


def test_logits_that_are_no_numbers(zoo, folder, tmp_path):
    def burst(name, value):
        return value * 1e30 if ".layers.1.mlp" in name else value

    add(zoo, folder, tmp_path, "burst", tensors=burst)
    with pytest.raises(EvaluationError, match="substituted chain computes NaN"):
        evaluate(zoo, "base", "burst", TEXT)
    with pytest.raises(EvaluationError, match="original chain computes NaN"):
        evaluate(zoo, "burst", "base", TEXT)
    assert Ledger(zoo.store).ids() == []


def test_a_damaged_blob(folder, tmp_path):
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    zoo.register(folder / "base", name="base")
    block = zoo.block(zoo.chain(zoo.resolve("base").chain).links[2].base)
    key = layout.blob_key(block.tensors["mlp.up_proj.weight"].blobs[0])
    data = bytearray(zoo.store.storage.get(key))
    data[-1] ^= 1
    zoo.store.storage.replace(key, [bytes(data)])
    with pytest.raises(CorruptBlobError):
        evaluate(zoo, "base:1", "base:1", TEXT)


def test_without_torch_it_says_what_is_missing(zoo):
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from blockzoo import Zoo\n"
        "from blockzoo.evaluation.evaluate import evaluate\n"
        "from blockzoo.errors import MissingPackageError\n"
        "try:\n"
        f"    evaluate(Zoo.open({zoo.url!r}), 'base', 'tuned', {TEXT!r})\n"
        "except MissingPackageError as error:\n"
        "    print(error, error.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs torch" in done.stdout
    assert "blockzoo[worker" in done.stdout


@pytest.mark.gpu
def test_another_device(zoo):
    (here,) = evaluate(zoo, "base", "tuned", TEXT)
    (there,) = evaluate(zoo, "base", "tuned", TEXT, device="cuda")
    assert there.mean_kl == pytest.approx(here.mean_kl, rel=1e-2)
