import getpass
import io
import json
import re
import shlex
import subprocess
import sys

import pytest
import typer

from blockserve.cli.app import build_app
from blockserve.cli.views.progress import Lines
from blockzoo import Zoo, layout
from blockzoo.equivalence import Ledger
from support.edge import byte_level_tokenizer
from support.folders import config, tensors, write_adapter, write_checkpoint

VERBS = ("evaluate", "list", "show", "approve", "revoke")
TEXT = "The ferryman counts his passengers twice, once with his eyes and once with his ears. "
HEADER = ["ID", "A", "B", "IN", "ITS", "PLACE", "KL", "WORST", "TOP-1", "WEIGHTS", "TOKENS"]
REASON = ("--reason", "tried on tickets")


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A zoo whose variants can read: `base`, `tuned` (layers 0 and 2 differ) and the adapter `bot`."""
    monkeypatch.setenv("BLOCKZOO_ZOO", str(tmp_path / "zoo"))
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    values = config(vocab_size=300)
    items = tensors(values)
    other = tensors(values, seed=1)
    tuned = {key: other[key] if re.search(r"\.layers\.[02]\.", key) else item for key, item in items.items()}
    files = {"tokenizer.json": byte_level_tokenizer().to_str()}
    for name, weights in (("base", items), ("tuned", tuned)):
        write_checkpoint(tmp_path / name, values, weights, files=files)
        zoo.register(tmp_path / name, name=name)
    write_adapter(tmp_path / "adapter")
    zoo.register(tmp_path / "adapter", name="bot", base="base")
    return zoo


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "held-out.txt"
    path.write_text(TEXT * 3)
    return path


@pytest.fixture
def record(run, zoo, text):
    """The id of a record of base:2 with tuned:1 in its place."""
    outcome = run("equivalence", "evaluate", "base:2", "tuned:1", "--text", text, "--json")
    return outcome.json["records"][0]["id"]


def approve(run, record, *more):
    return run("equivalence", "approve", record[:12], "--max-kl", "9", *REASON, *more)


def test_evaluate_prints_a_row_for_each_run(run, zoo, text):
    outcome = run("equivalence", "evaluate", "base", "tuned", "--text", text, "--window", "50")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0].split() == HEADER
    assert [line.split()[1:3] for line in lines[1:4]] == [
        ["base@1:1", "tuned@1:1"],
        ["base@1:3", "tuned@1:3"],
        ["base@1:1-4", "tuned@1:1-4"],
    ]
    assert " tokens in windows of 50, float32." in lines[4]
    assert f"approve {lines[3].split()[0]} --max-kl" in lines[5]
    assert len(Ledger(zoo.store).ids()) == 3


def test_evaluate_as_json(run, zoo, text):
    outcome = run("equivalence", "evaluate", "base", "bot", "--text", text, "--max-tokens", "100", "--json")
    (found,) = outcome.json["records"]
    assert set(found) == {
        "id", "original", "substitute", "result", "mean_kl", "worst_kl", "top1_agreement", "weight_distance",
        "num_tokens", "window_tokens", "text_digest", "text_bytes", "tokenizer", "dtype", "created_at",
        "blockzoo_version", "state", "in_force", "decisions",
    }  # fmt: skip
    assert found["original"]["variant"] == "base@1"
    assert found["substitute"]["links"][0]["applied"]
    assert found["num_tokens"] == 100
    assert 0 < found["mean_kl"] <= found["worst_kl"]
    assert (found["state"], found["in_force"], found["decisions"]) == ("evaluated", False, [])


def test_text_from_standard_input(run, zoo, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode() * 2)))
    outcome = run("equivalence", "evaluate", "base:1", "tuned:1", "--text", "-", "--json")
    assert outcome.json["records"][0]["text_bytes"] == 2 * len(TEXT.encode())


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("base", "tunde"), 3, "Did you mean tuned?"),
        (("base:9", "tuned"), 1, "positions 0 to 4"),
        (("base:0", "tuned:1"), 1, "kind embedding, the other one of kind layer"),
        (("base", "base"), 1, "the same links"),
        (("base", "tuned", "--dtype", "int4"), 1, "Use float32"),
        (("base", "tuned", "--max-tokens", "3"), 1, "too few"),
        (("base", "tuned", "--window", "4096"), 1, "a model of 128"),
    ],
)
def test_what_cannot_be_evaluated(run, zoo, text, words, code, message):
    outcome = run("equivalence", "evaluate", *words, "--text", text)
    assert (outcome.code, outcome.out) == (code, "")
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_bad_texts(run, zoo, tmp_path):
    path = tmp_path / "text"
    for data, message in ((b"short", "are needed"), (b"\xff" * 900, "not UTF-8")):
        path.write_bytes(data)
        outcome = run("equivalence", "evaluate", "base", "tuned", "--text", path)
        assert outcome.code == 1
        assert message in outcome.err
    outcome = run("equivalence", "evaluate", "base", "tuned", "--text", tmp_path / "none", "--json")
    assert (outcome.code, outcome.error["reason"]) == (1, "OS")
    assert run("equivalence", "evaluate", "base", "tuned").code == 2


def test_a_record_s_life(run, zoo, record):
    assert run("equivalence", "list", "--approved").out.startswith("Nothing is approved.")
    approved = approve(run, record, "--by", "ann", "--min-agreement", "0")
    assert approved.out.splitlines() == [
        "Approved: requests of base@1 may run tuned@1:1 in place of base@1:2.",
        f"To end it: blockzoo equivalence revoke {record[:12]}",
    ]
    listed = run("equivalence", "list").out.splitlines()
    assert listed[0].split()[-2:] == ["STATE", "DATE"]
    assert listed[1].split()[0] == record[:12]
    assert listed[1].split()[-2] == "approved"
    assert [one["id"] for one in run("equivalence", "list", "--approved", "--json").json["records"]] == [
        record
    ]
    revoked = run("equivalence", "revoke", record, "--by", "bob")
    assert revoked.out.startswith(f"Revoked {record[:12]} at ")
    shown = run("equivalence", "show", record[:8])
    assert shown.out.startswith(f"{record}, revoked")
    decisions = [line.split() for line in shown.out.splitlines()[-2:]]
    assert [line[:2] for line in decisions] == [["1", "approve"], ["2", "revoke"]]
    assert "KL <= 9, top-1 >= 0.0%" in shown.out
    assert "for information only" in shown.out
    value = run("equivalence", "show", record, "--json").json
    assert [(one["action"], one["by"]) for one in value["decisions"]] == [
        ("approve", "ann"),
        ("revoke", "bob"),
    ]
    assert (value["state"], value["in_force"]) == ("revoked", False)


def test_decisions_as_json(run, zoo, record):
    value = approve(run, record, "--json").json
    assert value == {
        "record": record, "number": 1, "action": "approve", "variants": ["base@1"], "by": getpass.getuser(),
        "reason": REASON[1], "at": value["at"], "max_kl": 9.0, "min_agreement": None, "forced": False,
    }  # fmt: skip
    value = run("equivalence", "revoke", record, "--json").json
    assert (value["action"], value["number"], value["max_kl"]) == ("revoke", 2, None)


def test_beyond_the_bound_only_by_force(run, zoo, record):
    words = ("equivalence", "approve", record, "--max-kl", "0", *REASON)
    refused = run(*words, "--json")
    assert (refused.code, refused.error["reason"]) == (1, "NOT_EQUIVALENT")
    assert "--force" in refused.error["hint"]
    forced = run(*words, "--force")
    assert forced.out.startswith("Approved, forced beyond the bounds: ")
    assert "approve (forced)" in run("equivalence", "show", record).out


def test_for_other_variants(run, zoo, record):
    outcome = approve(run, record, "--for", "bot")
    assert outcome.code == 1
    assert "does not run the chain" in outcome.err
    assert approve(run, record, "--for", "base", "--json").json["variants"] == ["base@1"]


def test_an_approval_whose_variant_is_gone(run, zoo, record):
    approve(run, record)
    run("rm", "tuned", "--yes")
    assert "approved, variant gone" in run("equivalence", "list").out
    assert run("equivalence", "list", "--approved", "--json").json["records"] == []
    assert run("equivalence", "show", record).out.startswith(f"{record}, approved, variant gone")


def test_errors_of_ids(run, zoo, record):
    assert run("equivalence", "show", "ffffffff").code == 3
    assert "blockzoo equivalence list" in run("equivalence", "show", "ffffffff").err
    assert run("equivalence", "show", "ff").code == 1
    assert "is not approved" in run("equivalence", "revoke", record).err
    assert approve(run, record, "--by", " ").code == 1


def test_an_empty_list_says_how_to_begin(run, zoo):
    assert "blockzoo equivalence evaluate" in run("equivalence", "list").out
    assert run("equivalence", "list", "--json").json == {"records": [], "unreadable": {}}


def test_damage_is_told(run, zoo, record, tmp_path):
    path = tmp_path / "zoo" / layout.equivalence_key(record)
    path.chmod(0o644)
    path.write_text("{}")
    outcome = run("equivalence", "list")
    assert outcome.code == 0
    assert f"{record[:12]} cannot be read and counts as not approved" in outcome.err
    assert list(run("equivalence", "list", "--json").json["unreadable"]) == [record]
    assert run("equivalence", "show", record).code == 5
    assert run("verify").code == 5


def test_all_but_evaluate_run_without_torch(zoo, record, text):
    lines = [
        ["list"],
        ["show", record],
        ["approve", record, "--max-kl", "9", "--reason", "why"],
        ["revoke", record],
        ["list", "--json"],
    ]
    script = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['tokenizers'] = None\n"
        "from blockserve.cli import main\n"
        f"for line in {lines!r}:\n"
        "    assert main(['equivalence', *line]) == 0, line\n"
        f"sys.exit(main(['equivalence', 'evaluate', 'base', 'tuned', '--text', {str(text)!r}, '--json']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stderr.splitlines()[-1])["error"]["reason"] == "MISSING_PACKAGE"


def test_helping_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from blockserve.cli import main\n"
        "main(['equivalence', 'evaluate', '--help'])\n"
        "sys.exit(bool({'torch', 'numpy', 'grpc', 'blockzoo', 'tokenizers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_the_group_lists_its_verbs(run):
    out = run("equivalence", "--help").out
    for verb in VERBS:
        assert re.search(rf"^│ {verb} ", out, re.MULTILINE)
    assert re.search(r"^│ equivalence ", run("--help").out, re.MULTILINE)
    (group,) = build_app([]).registered_groups
    assert isinstance(group.typer_instance, typer.Typer)


@pytest.mark.parametrize("verb", VERBS)
def test_help_teaches_with_examples_that_parse(run, verb):
    outcome = run("equivalence", verb, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    _, found, after = outcome.out.partition("Examples:")
    assert found
    examples = [line.strip() for line in after.split("╭")[0].splitlines() if line.strip()]
    assert examples
    options = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", after.split("╭", 1)[1]))
    assert "--json" in options
    for example in examples:
        words = shlex.split(example)
        start = words.index("blockzoo")
        assert words[start + 1 : start + 3] == ["equivalence", verb]
        words = words[start : words.index("|", start) if "|" in words[start:] else len(words)]
        assert {word for word in words if re.match(r"--?[a-z]", word)} <= options


def test_progress_in_tokens():
    lines = Lines(first_after_s=60, unit="tokens")
    lines.start("evaluating", 4096)
    lines.advance(512)
    assert lines.describe().startswith("evaluating: 512 of 4096 tokens, ")
    lines.close()
