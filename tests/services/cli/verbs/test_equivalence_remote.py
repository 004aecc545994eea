"""The verbs of equivalence against the zoo of a server: the same screens and JSON as at hand."""

from __future__ import annotations

import pytest

from blockzoo import layout
from support.equivalence import put
from support.network import zoo_server

REASON = ("--reason", "tried on tickets")


@pytest.fixture
def record(zoo):
    return put(zoo.store, "base", "tuned", at=3).id


@pytest.fixture
def at(zoo, record):
    with zoo_server(zoo) as server:
        yield ("--server", server.address)


def same(run, at, *words):
    """Both places print the same, as text and as JSON; the text."""
    here, there = run("equivalence", *words, "--json"), run("equivalence", *words, *at, "--json")
    assert (there.code, there.out) == (here.code, here.out)
    if here.err:  # the order of an error's metadata is not kept on the wire
        assert there.error == here.error
    here, there = run("equivalence", *words), run("equivalence", *words, *at)
    assert (there.code, there.out, there.err) == (here.code, here.out, here.err)
    return here


def test_a_record_s_life_at_a_server(run, zoo, record, at):
    assert record[:12] in same(run, at, "list").out
    assert same(run, at, "list", "--approved").out.startswith("Nothing is approved.")
    assert same(run, at, "show", record[:8]).code == 0
    words = ("equivalence", "approve", record[:12], "--max-kl", "0.5", "--min-agreement", "0.25", *REASON)
    approved = run(*words, "--for", "base", "--by", "ann", *at)
    assert approved.out.splitlines() == [
        "Approved: requests of base@1 may run tuned@1:3 in place of base@1:3.",
        f"To end it: blockzoo equivalence revoke {record[:12]}",
    ]
    decision = zoo.equivalence(record).decisions[0]
    assert (decision.max_kl, decision.min_agreement, decision.by) == (0.5, 0.25, "ann")
    assert "approved" in same(run, at, "list", "--approved").out
    assert "KL <= 0.5, top-1 >= 25.0%" in same(run, at, "show", record).out
    again = run(*words, "--by", "bob", "--json", *at).json
    assert (again["number"], again["variants"], again["forced"]) == (2, ["base@1"], False)
    revoked = run("equivalence", "revoke", record[:12], "--by", "bob", "--json", *at).json
    assert (revoked["action"], revoked["number"], revoked["max_kl"]) == ("revoke", 3, None)
    assert same(run, at, "show", record).out.startswith(f"{record}, revoked")
    assert zoo.equivalence(record).state == "revoked"


def test_errors_are_those_at_hand(run, record, at):
    for words, code in (
        (("show", "ffffffff"), 3),
        (("show", "ff"), 1),
        (("revoke", record), 1),
        (("approve", record, "--max-kl", "0", *REASON), 1),
        (("approve", record, "--max-kl", "9", *REASON, "--for", "bot"), 1),
        (("approve", record, "--max-kl", "9", *REASON, "--by", " "), 1),
        (("approve", record, "--max-kl", "9", *REASON, "--for", "nobody"), 3),
        (("approve", record, "--max-kl", "nan", *REASON), 1),
    ):
        assert same(run, at, *words).code == code
    refused = run("equivalence", "approve", record, "--max-kl", "0", *REASON, "--json", *at)
    assert refused.error["reason"] == "NOT_EQUIVALENT"
    forced = run("equivalence", "approve", record, "--max-kl", "0", *REASON, "--force", *at)
    assert forced.out.startswith("Approved, forced beyond the bounds: ")


def test_damage_is_told(run, zoo, record, at, tmp_path):
    path = tmp_path / "zoo" / layout.equivalence_key(record)
    path.chmod(0o644)
    path.write_text("{}")
    listed = same(run, at, "list")
    assert f"{record[:12]} cannot be read and counts as not approved" in listed.err
    assert same(run, at, "show", record).code == 5


def test_many_records_come_in_several_messages(run, zoo, record, at, monkeypatch):
    monkeypatch.setattr("blockserve.controller.servicer.EQUIVALENCE_BYTES", 1)
    for kl in (0.1, 0.2, 0.3):
        put(zoo.store, "base", "tuned", at=3, kl=kl)
    assert len(run("equivalence", "list", "--json", *at).json["records"]) == 4
    same(run, at, "list")


def test_the_environment_names_the_server(run, zoo, record, at, monkeypatch):
    monkeypatch.delenv("BLOCKZOO_ZOO")
    monkeypatch.setenv("BLOCKZOO_SERVER", at[1])
    assert [one["id"] for one in run("equivalence", "list", "--json").json["records"]] == [record]


def test_without_the_token_nothing_is_told_or_changed(run, zoo, record, tmp_path):
    token = tmp_path / "token"
    token.write_text("sesame\n")
    with zoo_server(zoo, token_file=token) as server:
        at = ("--server", server.address)
        for words in (
            ("list",),
            ("show", record),
            ("approve", record, "--max-kl", "9", *REASON),
            ("revoke", record),
        ):
            refused = run("equivalence", *words, *at, "--json")
            assert (refused.code, refused.error["reason"]) == (1, "UNAUTHENTICATED")
        assert run("equivalence", "list", *at, "--token-file", token).code == 0
    assert zoo.equivalence(record).decisions == ()
