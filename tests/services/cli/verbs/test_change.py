import json
from dataclasses import replace

import pytest

from blockserve.cli.options import questions
from blockserve.cli.views.reports import print_gc
from blockzoo import Zoo
from blockzoo.layout import blob_key, block_key, chain_key, ref_key
from blockzoo.storage import LocalStorage
from blockzoo.store.zoo_store import ZooStore
from support.zoo_faults import begin_first_format, flip, lose


def flip_a_byte(zoo, name, tensor="self_attn.q_proj.weight"):
    """Damage a tensor of the variant's last layer."""
    chain = zoo.chain(zoo.resolve(name).chain)
    blob = zoo.block(chain.links[-2].base).tensors[tensor].blobs[0]
    flip(zoo.store, blob_key(blob), -1)


def test_register_says_what_was_new(run, folders, tmp_path):
    place = tmp_path / "new" / "zoo"
    outcome = run("register", folders / "base", "--name", "base", "--zoo", place, "--json")
    assert outcome.code == 0
    assert {
        "name": "base",
        "version": 1,
        "kind": "checkpoint",
        "unchanged": False,
    }.items() <= outcome.json.items()
    assert outcome.json["num_new_blobs"] == outcome.json["num_blobs"]
    assert Zoo.open(place).resolve("base").chain == outcome.json["chain"]
    outcome = run("register", folders / "tuned", "-n", "tuned", "--base", "base", "--zoo", place)
    assert outcome.out.startswith("Registered tuned@1 (checkpoint) in ")
    assert "of it known" in outcome.out
    assert "exactly this content" in run("register", folders / "tuned", "-n", "tuned", "--zoo", place).out


def test_register_an_adapter(run, zoo, folders):
    outcome = run("register", folders / "adapter", "--name", "second", "--base", "base", "--json")
    assert outcome.json["kind"] == "adapter"


def test_ls(run, zoo):
    rows = run("ls", "--json").json
    assert rows["zoo"] == zoo.url
    assert [row["name"] for row in rows["variants"]] == ["base", "bot", "tuned"]
    lines = run("ls").out.splitlines()
    assert lines[0].split() == [
        "NAME",
        "VERSION",
        "KIND",
        "BASE",
        "CHECKPOINT",
        "PRIVATE",
        "STORED",
        "REGISTERED",
    ]
    assert lines[2].split()[:4] == ["bot", "1", "adapter", "base@1"]


def test_ls_of_an_empty_zoo_says_how_to_go_on(run, tmp_path):
    Zoo.open(tmp_path / "empty", create=True)
    assert "blockzoo register" in run("ls", "--zoo", tmp_path / "empty").out
    assert run("ls", "--zoo", tmp_path / "empty", "--json").json["variants"] == []


def test_rows_are_not_folded_in_a_pipe(run, zoo, folders, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    name = "a-name-that-is-long-" * 4
    run("register", folders / "base", "--name", name)
    assert any(line.startswith(f"{name} ") for line in run("ls").out.splitlines())


def names(outcome):
    return [line.split()[0] for line in outcome.out.splitlines()[1:]]


def test_ls_of_some(run, zoo, folders):
    run("register", folders / "adapter", "--name", "bot-2", "--base", "base")
    assert names(run("ls", "bo*")) == ["bot", "bot-2"]
    assert names(run("ls", "--base", "base")) == ["bot", "bot-2"]
    assert names(run("ls", "--base", "base@2")) == []
    assert names(run("ls", "--sort", "base"))[-2:] == ["bot", "bot-2"]
    assert set(names(run("ls", "--sort", "age"))) == {"base", "bot", "bot-2", "tuned"}
    listed = run("ls", "--limit", 1)
    assert names(listed) == ["base"]
    assert "3 more of 4 are not listed" in listed.err
    assert [row["name"] for row in run("ls", "*-2", "--json").json["variants"]] == ["bot-2"]
    stored = [row["private_stored_bytes"] for row in run("ls", "--sort", "stored", "--json").json["variants"]]
    assert stored == sorted(stored, reverse=True)
    assert len(set(stored)) > 1
    nothing = run("ls", "x*")
    assert (nothing.code, nothing.out) == (0, "")
    assert "None of the 4 variants" in nothing.err


def test_ls_sorts_equal_ones_by_name(run, zoo, folders, monkeypatch):
    rows = [replace(row, registered_at="2026-01-02", private_stored_bytes=7) for row in zoo.ls()]
    damaged = replace(rows[0], name="a-damaged-one", registered_at="", private_stored_bytes=0)
    monkeypatch.setattr(Zoo, "ls", lambda _: [damaged, *reversed(rows)])
    for order in ("age", "stored"):
        assert names(run("ls", "--sort", order)) == ["base", "bot", "tuned", "a-damaged-one"]


def test_ls_of_an_unknown_base(run, zoo, folders):
    outcome = run("ls", "--base", "bas")
    assert outcome.code == 3
    assert outcome.err == "Error: variant 'bas' is not registered\nDid you mean base?\n"
    assert run("ls", "--base", "tuned").code == 0
    run("rm", "base", "--yes")
    assert names(run("ls", "--base", "base")) == ["bot"]


def test_show(run, zoo):
    report = run("show", "tuned", "--json").json
    assert report["name"] == "tuned"
    assert [item["kind"] for item in report["runs"]] == ["embedding", "layer", "layer", "head"]
    out = run("show", "bot").out
    assert "embedding -> layers 0-1 + adapter -> layer 2 + adapter -> head" in out
    assert "rank 4 on" in out
    assert "layout" not in out


def test_du(run, zoo):
    report = run("du", "--json").json
    assert report["sharing_factor"] > 1
    assert {row["name"] for row in report["rows"]} == {"base", "bot", "tuned"}
    assert "checkpoints would take" in run("du").out


def test_diff_joins_links_that_differ_alike(run, zoo):
    report = run("diff", "base", "tuned", "--json").json
    assert (report["equal"], report["adapters"], report["different"]) == (4, 0, 1)
    assert "layer 2" in run("diff", "base", "tuned").out
    lines = run("diff", "base", "bot").out.splitlines()
    assert [line for line in lines if line.startswith("layers 0-2 ")]


def test_export_gives_the_bytes_back(run, zoo, folders, tmp_path):
    outcome = run("export", "tuned", tmp_path / "out", "--json")
    assert outcome.json["ref"] == "tuned@1"
    for name in outcome.json["files"]:
        assert (tmp_path / "out" / name).read_bytes() == (folders / "tuned" / name).read_bytes()
    assert run("export", "tuned", tmp_path / "out").code == 1


class Keyboard:
    """A terminal somebody types a line on."""

    def __init__(self, line):
        self.line = line

    def isatty(self):
        return True

    def readline(self):
        return self.line


@pytest.mark.parametrize(
    ("typed", "removed"), [("y\n", True), ("YES\n", True), ("n\n", False), ("\n", False), ("", False)]
)
def test_rm_asks(run, zoo, monkeypatch, typed, removed):
    monkeypatch.setattr(questions.sys, "stdin", Keyboard(typed))
    outcome = run("rm", "bot")
    assert "Remove bot with its one version? [y/N]" in outcome.err
    assert outcome.code == (0 if removed else 1)
    assert ("bot" in {record.name for record in zoo.variants()}) is not removed


def test_rm_where_nobody_can_answer_needs_yes(run, zoo):
    outcome = run("rm", "bot")
    assert outcome.code == 2
    assert "--yes" in outcome.err
    assert run("rm", "bot", "--json").error["reason"] == "USAGE"
    assert run("rm", "bot", "--yes", "--json").json == {
        "name": "bot",
        "removed": [1],
        "remaining": [],
        "dependants": [],
    }
    assert run("show", "bot").code == 3


def test_rm_of_a_base_names_what_was_registered_on_it(run, zoo, folders):
    told = run("rm", "base").err
    assert told.startswith(
        "Error: bot was registered on it and keeps working. Remove base with its one version? There"
    )
    for number in range(6):
        run("register", folders / "adapter", "--name", f"more-{number}", "--base", "base")
    removed = run("rm", "base", "--yes").out
    assert "bot, more-0, more-1, more-2, more-3 and 2 more still use its blocks, which stay." in removed
    assert run("gc", "--grace", 0).code == 0
    assert run("verify").code == 0
    assert run("show", "bot").code == 0


def lose_a_part(zoo, name, part):
    """Let one object of a variant go missing; `ref` is damaged in place of that."""
    record = zoo.resolve(name)
    chain = zoo.chain(record.chain)
    block = chain.links[-2].applied[0]
    if part == "ref":
        flip(zoo.store, ref_key(name, record.version))
        return
    lose(
        zoo.store,
        {
            "chain": chain_key(record.chain),
            "block": block_key(block),
            "blob": blob_key(next(iter(zoo.block(block).tensors.values())).blobs[0]),
        }[part],
    )


@pytest.mark.parametrize("part", ["ref", "chain", "block", "blob"])
def test_a_lost_variant_can_be_removed_and_gc_names_it(run, zoo, part):
    lose_a_part(zoo, "bot", part)
    stopped = run("gc", "--grace", 0)
    assert stopped.code == 5
    assert stopped.err.startswith("Error: bot@1 is damaged, so it is not known which objects it needs, and")
    assert "`blockzoo verify --repair BACKUP`" in stopped.err
    assert "gives up what is lost (bot)" in stopped.err
    assert run("rm", "bot").code == 2  # asks, and nobody can answer
    removed = run("rm", "bot", "--yes")
    assert (removed.code, removed.err) == (0, "")
    assert "Removed bot@1" in removed.out
    assert run("gc", "--grace", 0).code == 0
    assert run("verify").code == 0
    assert {record.name for record in zoo.variants()} == {"base", "tuned"}


@pytest.mark.parametrize("part", ["chain", "block", "blob"])
def test_du_and_show_name_what_is_lost(run, zoo, part):
    assert "damaged" not in run("du").out + run("show", "bot").out
    zoo.show("bot")
    lose_a_part(zoo, "bot", part)
    assert "\nbot@1 is damaged, so sizes may be too low: `blockzoo verify` says" in run("du").out
    assert run("du", "--json").json["damaged"] == ["bot@1"]
    shown = run("show", "bot")
    if part == "blob":
        assert "1 missing object, for example blobs/" in shown.out
    else:
        assert shown.code == 5
    # A server keeps manifests in memory; they are missing all the same.
    assert len(zoo.show("bot").missing) == 1
    assert zoo.du().damaged == ("bot@1",)
    assert zoo.show("base").missing == ()


def test_du_tells_that_a_zoo_is_of_format_1(run, tmp_path, folders):
    begin_first_format(LocalStorage(tmp_path / "old"))
    run("register", folders / "base", "--name", "base", "--zoo", tmp_path / "old")
    assert (
        "The zoo is of format 1, one file for each object. `blockzoo backup"
        in run("du", "--zoo", tmp_path / "old").out
    )
    run("backup", tmp_path / "new", "--zoo", tmp_path / "old")
    assert "format" not in run("du", "--zoo", tmp_path / "new").out


def test_verify_of_much_damage_is_bounded(run, zoo, tmp_path):
    run("backup", tmp_path / "backup")
    lost = [info.key for info in zoo.store.storage.list("blobs")]
    lose(zoo.store, *lost)
    text = run("verify").out.splitlines()
    assert len(text) == 1 + 1 + 20 + 3
    assert f"and {len(lost) - 20} more; --json has all of them." in text
    assert f"{len(lost)} problems, 0 repaired; 3 versions of variants are damaged." in text
    assert len(run("verify", "--json").json["problems"]) == len(lost)
    repaired = run("verify", "--repair", tmp_path / "backup")
    assert repaired.code == 0
    assert f"{len(lost)} problems, {len(lost)} repaired; 0 versions" in repaired.out


@pytest.mark.parametrize(("part", "lost"), [("chain", 1), ("block", 1), ("blob", 1)])
def test_register_says_what_it_restored(run, zoo, folders, part, lost):
    again = ("register", folders / "adapter", "--name", "bot", "--base", "base")
    assert "bot@1 has exactly this content already; nothing was written." in run(*again).out
    lose_a_part(zoo, "bot", part)
    healed = run(*again)
    assert healed.code == 0, healed.err
    assert f"{lost} object of it was missing in the zoo and stored again." in healed.out
    assert run("verify").code == 0
    assert run(*again, "--json").json["restored"] == 0


def test_of_two_equal_registrations_at_once_the_second_is_unchanged(run, zoo, folders, monkeypatch):
    register = ("register", folders / "adapter", "--base", "tuned", "--force-base", "--name", "new", "--json")
    add, others = ZooStore.add_unless_same, []

    def overtaken(store, draft):
        monkeypatch.setattr(ZooStore, "add_unless_same", add)
        others.append(Zoo.open(zoo.url).register(folders / "adapter", name="new", base="tuned"))
        return add(store, draft)

    monkeypatch.setattr(ZooStore, "add_unless_same", overtaken)
    second = run(*register).json
    assert not others[0].unchanged
    assert (second["version"], second["unchanged"], second["restored"]) == (1, True, 0)


def test_register_over_a_damaged_ref_makes_the_next_version(run, zoo, folders):
    lose_a_part(zoo, "bot", "ref")
    assert (
        run("register", folders / "adapter", "--name", "bot", "--base", "base", "--json").json["version"] == 2
    )


def test_a_lost_old_version_can_be_removed_alone(run, zoo, folders):
    zoo.register(folders / "base", name="bot")
    flip(zoo.store, ref_key("bot", 1))
    assert "gives up what is lost (bot@1)" in run("gc", "--grace", 0).err
    assert "Removed bot@1" in run("rm", "bot@1", "--yes").out
    assert run("gc", "--grace", 0).code == 0
    assert run("show", "bot@2").code == 0


def test_rm_of_a_version_and_rollback(run, zoo, folders):
    run("register", folders / "tuned", "--name", "base")
    assert run("rollback", "base", "--json").json["version"] == 3
    assert zoo.resolve("base").chain == zoo.resolve("base@1").chain
    assert "Removed base@2" in run("rm", "base@2", "-y").out
    outcome = run("rm", "base@3", "--yes")
    assert outcome.code == 1
    assert "is the current version" in outcome.err


def test_rollback_to_a_version(run, zoo, folders):
    run("register", folders / "tuned", "--name", "base")
    out = run("rollback", "base", "--to", 1).out
    assert out.splitlines() == [
        "base@3 is current now, and the same as base@1.",
        "  versions: 1, 2, 3 (= 1)",
        "  `blockzoo rollback base --to N` goes to any of them.",
    ]
    assert "base@1 is the oldest version" in run("rollback", "base").err
    assert run("rollback", "base", "--to", 9).code == 3
    assert run("rollback", "base", "--to", 0).code == 2


def test_gc(run, zoo):
    run("rm", "tuned", "--yes")
    planned = run("gc", "--dry-run", "--json").json
    assert planned["dry_run"]
    assert planned["deleted"] > 0
    done = run("gc", "--grace", "0", "--json").json
    assert (done["deleted"], done["freed_bytes"]) == (planned["deleted"], planned["freed_bytes"])
    assert "Deleted 0 objects" in run("gc", "--grace", 0).out
    assert run("gc", "--grace", -1).code == 2


def test_verify_finds_damage_names_who_is_hurt_and_repairs(run, zoo, tmp_path):
    assert run("backup", tmp_path / "backup").code == 0
    assert "Everything is as it should be." in run("verify").out
    flip_a_byte(zoo, "tuned")
    report = run("verify", "--json")
    assert report.code == 5
    assert report.json["ok"] is False
    assert report.json["problems"][0]["variants"] == ["tuned@1"]
    text = run("verify")
    assert text.code == 5
    assert "tuned@1" in text.out
    assert "--repair FROM" in text.out
    assert run("verify", "--repair", tmp_path / "backup").code == 0
    assert run("verify").code == 0


def test_the_hint_about_a_damaged_zoo_json_works(run, zoo, tmp_path):
    (tmp_path / "zoo" / "zoo.json").write_bytes(b"")
    stopped = run("ls")
    assert stopped.code == 5
    assert "zoo.json is damaged\n`blockzoo verify --repair BACKUP` writes it again" in stopped.err
    assert "zoo.json is damaged" in run("verify").out
    Zoo.open(tmp_path / "any", create=True)
    assert run("verify", "--repair", tmp_path / "any").code == 0
    assert names(run("ls")) == ["base", "bot", "tuned"]


def test_verify_that_cannot_repair_says_so(run, zoo, tmp_path):
    Zoo.open(tmp_path / "other", create=True)
    flip_a_byte(zoo, "tuned")
    outcome = run("verify", "--repair", tmp_path / "other")
    assert outcome.code == 5
    assert "no good copy" in outcome.out


def test_backup_and_restore(run, zoo, folders, tmp_path):
    report = run("backup", tmp_path / "backup", "--name", "bot", "--json").json
    assert report["added"] == ["bot@1"]
    run("rm", "bot", "--yes")
    skipped = run("restore", tmp_path / "backup")
    assert "bot@1 skipped" in skipped.out
    assert "`blockzoo restore SOURCE --revive` also brings back" in skipped.out
    revived = run("restore", tmp_path / "backup", "--revive")
    assert revived.code == 0
    assert "bot@3, which was bot@1 before it was removed" in revived.out
    assert "--revive" not in revived.out
    run("rm", "bot", "--yes")
    assert run("restore", tmp_path / "backup", "--revive", "--json").json["revived"] == {"bot@1": "bot@5"}
    assert zoo.resolve("bot").kind == "adapter"
    run("register", folders / "tuned", "--name", "bot", "--zoo", tmp_path / "another")
    conflict = run("restore", tmp_path / "backup", "--zoo", tmp_path / "another").out
    assert "`--zoo NEW_PLACE` restores into another zoo" in conflict
    fresh = run("restore", tmp_path / "backup", "--zoo", tmp_path / "fresh")
    assert "Restored 1 version:" in fresh.out


def test_reports_tell_rare_things(capsys):
    from blockzoo.care.gc import GcReport

    print_gc(GcReport(deleted=1, spared=2, temp_bytes=3, finished=False), dry_run=False)
    out = capsys.readouterr().out
    for words in ("Spared 2", "Removed 3 B", "run `blockzoo gc` again"):
        assert words in out


DOCUMENTED = {
    ("register", "{folders}/base", "--name", "base"): {
        "name", "version", "kind", "chain", "provenance", "unchanged", "num_bytes", "new_bytes",
        "stored_bytes", "num_blobs", "num_new_blobs", "ignored", "seconds",
    },
    ("ls",): {"zoo", "variants"},
    ("show", "bot"): {
        "name", "version", "current", "versions", "kind", "chain", "family", "context_length", "vocab_size",
        "runs", "checkpoint_bytes", "private_bytes", "stored_bytes", "files", "provenance",
    },
    ("du",): {
        "rows", "checkpoint_bytes", "distinct_bytes", "stored_bytes", "manifest_bytes", "unreachable_bytes",
        "sharing_factor",
    },
    ("diff", "base", "bot"): {"a", "b", "links", "files", "equal", "adapters", "different", "changed_bytes"},
    ("export", "bot", "{tmp}/out"): {"ref", "path", "files", "num_bytes"},
    ("rm", "bot", "--yes"): {"name", "removed", "remaining"},
    ("rollback", "base"): {"name", "version", "chain"},
    ("gc", "--dry-run"): {
        "dry_run", "deleted", "freed_bytes", "kept", "kept_bytes", "spared", "temp_bytes", "finished",
    },
    ("verify",): {"ok", "objects", "num_bytes", "problems", "strays"},
    ("backup", "{tmp}/backup"): {"copied", "copied_bytes", "present", "added", "skipped", "revived"},
}  # fmt: skip


@pytest.mark.parametrize("words", DOCUMENTED, ids=lambda words: words[0])
def test_json_keys_are_the_promised_ones(run, zoo, folders, tmp_path, words):
    run("register", folders / "tuned", "--name", "base")
    words = [word.format(folders=folders, tmp=tmp_path) for word in words]
    outcome = run(*words, "--json")
    assert outcome.code == 0, outcome.err
    assert set(outcome.json) >= DOCUMENTED[next(key for key in DOCUMENTED if key[0] == words[0])]
    assert outcome.err == ""
    assert json.dumps(outcome.json)


NEED_ZOO = [
    ("backup", "{tmp}/backup"),
    ("restore", "{tmp}/backup"),
    ("equivalence", "evaluate", "base", "tuned", "--text", "{tmp}/none"),
]


@pytest.mark.parametrize("words", NEED_ZOO, ids=lambda words: words[0])
def test_verbs_that_need_the_zoo_take_no_other_one_for_that_of_a_server(
    run, zoo, tmp_path, monkeypatch, words
):
    words = [word.format(tmp=tmp_path) for word in words]
    zoo.backup(tmp_path / "backup")
    works = int(words[0] == "equivalence")  # it gets as far as a text that is not there
    monkeypatch.setenv("BLOCKZOO_SERVER", "models.example:7450")
    assert run(*words).code == works  # BLOCKZOO_ZOO names the zoo
    monkeypatch.delenv("BLOCKZOO_ZOO")
    monkeypatch.setenv("HOME", str(tmp_path))
    refused = run(*words)
    assert refused.code == 2
    assert "BLOCKZOO_SERVER names models.example:7450" in refused.err
    assert not (tmp_path / ".blockzoo").exists()
    assert run(*words, "--zoo", zoo.url).code == works


@pytest.mark.parametrize("words", NEED_ZOO, ids=lambda words: words[0])
def test_verbs_that_need_the_zoo_say_so_when_a_server_is_given(run, zoo, tmp_path, words):
    words = [word.format(tmp=tmp_path) for word in words]
    verb = " ".join(words[: 1 + (words[0] == "equivalence")])
    for more in ((), ("--zoo", zoo.url), ("--token-file", tmp_path / "token", "--tls")):
        refused = run(*words, "--server", "models.example:7450", *more)
        assert (refused.code, refused.out) == (2, "")
        said = " ".join(refused.err.replace("│", " ").split())
        assert (
            f"--server names models.example:7450, but `{verb}` needs the zoo itself: run it where the zoo's "
            "folder or object store can be opened, and name that with --zoo" in said
        )
    assert "--token-file" not in run(*verb.split(), "--help").out


def test_an_adapter_that_names_another_base_is_warned_about(run, zoo, folders):
    words = ("register", folders / "adapter", "--base", "tuned")
    warned = run(*words, "--name", "one")
    assert warned.code == 0
    told = "the adapter says that it was trained on 'someone/base', and its base here is tuned@1"
    assert f"Warning: {told}" in warned.err
    assert "the variant base has that name" in warned.err
    assert run(*words, "--name", "two", "--force-base").err == ""
    assert "someone/base" in run(*words, "--name", "three", "--json").json["base_doubt"]
    assert run("register", folders / "adapter", "--base", "base", "--name", "four").err == ""
