"""The verbs of the zoo against the zoo of a server."""

from __future__ import annotations

import pytest

from blockserve.client.zoo_calls import Calls
from blockzoo import Zoo
from blockzoo.layout import blob_key
from support.network import zoo_server
from support.zoo_faults import flip


@pytest.fixture
def far(tmp_path):
    """A server whose zoo is empty."""
    with zoo_server(tmp_path / "far") as server:
        yield server


def test_registering_at_a_server(run, far, folders, tmp_path):
    at = ("--server", far.address)
    first = run("register", folders / "base", "--name", "base", *at, "--json")
    assert first.code == 0
    assert first.json["num_new_blobs"] == first.json["num_blobs"]
    assert run("register", folders / "adapter", "-n", "bot", "--base", "base", *at).out.startswith(
        "Registered bot@1 (adapter) in "
    )
    again = run("register", folders / "base", "-n", "base", *at)
    assert "has exactly this content already" in again.out
    zoo = Zoo.open(tmp_path / "far")
    assert zoo.resolve("base").chain == first.json["chain"]
    assert not (tmp_path / "home").exists()


def test_verbs_print_the_same_at_hand_and_over_the_network(run, zoo):
    with zoo_server(zoo) as server:
        for words in (
            ["ls"],
            ["show", "bot"],
            ["du"],
            ["diff", "base", "tuned"],
            ["verify"],
            ["gc", "--dry-run"],
        ):
            here = run(*words, "--json")
            there = run(*words, "--server", server.address, "--json")
            assert here.code == there.code == 0
            assert there.json == here.json
            assert run(*words, "--server", server.address).out == run(*words).out


def test_removing_and_rolling_back_at_a_server(run, zoo, folders):
    with zoo_server(zoo) as server:
        at = ("--server", server.address)
        run("register", folders / "tuned", "--name", "base", *at)
        assert run("rollback", "base", *at, "--json").json["version"] == 3
        assert run("rm", "base@2", "--yes", *at, "--json").json["remaining"] == [1, 3]
        assert run("rm", "bot", *at).code == 2
        assert "its one version" in run("rm", "bot", *at).err
        assert run("rm", "bot", "--yes", *at).code == 0
        assert run("gc", "--grace", "0", *at, "--json").json["deleted"] > 0
        assert run("show", "bot", *at).code == 3
    assert zoo.verify().ok


def test_damage_at_a_server_ends_with_its_exit_code(run, zoo, tmp_path):
    blob = (
        zoo.block(zoo.chain(zoo.resolve("tuned").chain).links[-2].base).tensors["mlp.up_proj.weight"].blobs[0]
    )
    flip(zoo.store, blob_key(blob), -1)
    with zoo_server(zoo) as server:
        outcome = run("verify", "--server", server.address)
        assert outcome.code == 5
        assert "tuned@1" in outcome.out
        outcome = run("verify", "--repair", tmp_path, "--server", server.address)
        assert outcome.code == 2
        assert "`verify --repair` needs the zoo itself" in outcome.err
        assert "name that with --zoo" in outcome.err


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_export_writes_here_what_is_there(run, zoo, folders, tmp_path, monkeypatch):
    with zoo_server(zoo) as server:
        at = ("--server", server.address)
        for name, folder in {"base": "base", "tuned": "tuned", "bot": "adapter"}.items():
            here = run("export", name, tmp_path / "here" / name, "--json")
            there = run("export", name, tmp_path / "there" / name, *at, "--json")
            assert there.code == here.code == 0
            assert there.json == {**here.json, "path": str(tmp_path / "there" / name)}
            assert contents(tmp_path / "there" / name) == contents(folders / folder)
        said = run("export", "bot@1", tmp_path / "once", *at)
        assert said.out.startswith(f"Wrote bot@1 to {tmp_path / 'once'}: ")
        monkeypatch.delenv("BLOCKZOO_ZOO")
        monkeypatch.setenv("BLOCKZOO_SERVER", server.address)
        assert run("export", "bot", tmp_path / "twice").code == 0


def test_what_cannot_be_exported_from_a_server(run, zoo, tmp_path):
    blob = next(iter(zoo.block(zoo.chain(zoo.resolve("tuned").chain).links[-2].base).tensors.values())).blobs[
        0
    ]
    flip(zoo.store, blob_key(blob), -1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    with zoo_server(zoo, controller={"max_exports": 1}) as server:
        before = sorted(tmp_path.iterdir())
        for ref, folder, code, message in (
            ("tuned", "out", 5, "is damaged"),
            ("bass", "out", 3, "Did you mean base?"),
            ("base@9", "out", 3, "base@9"),
            ("base", "full", 1, "not an empty folder"),
        ):
            refused = run("export", ref, tmp_path / folder, "--server", server.address)
            assert (refused.code, refused.out) == (code, "")
            assert message in refused.err
        assert sorted(tmp_path.iterdir()) == before
        assert contents(tmp_path / "full") == {"mine.txt": b"precious"}


def test_an_export_that_is_interrupted_leaves_nothing(run, zoo, tmp_path, monkeypatch):
    stream = Calls.stream

    def press_ctrl_c(self, method, request, **options):
        for number, message in enumerate(stream(self, method, request, **options)):
            if method == "DownloadBlobs" and number:
                raise KeyboardInterrupt
            yield message

    monkeypatch.setattr(Calls, "stream", press_ctrl_c)
    before = sorted(tmp_path.iterdir())
    with zoo_server(zoo, controller={"max_piece_bytes": 256}) as server:
        assert run("export", "base", tmp_path / "out", "--server", server.address).code == 130
    assert sorted(tmp_path.iterdir()) == before


def names(outcome):
    return [row["name"] for row in outcome.json["variants"]]


def test_which_zoo_is_meant(run, zoo, far, folders, monkeypatch, tmp_path):
    """The command line counts more than the environment, and a zoo that is named more than a server."""
    at = ("--server", far.address)
    assert run("register", folders / "base", "--name", "there", *at).code == 0
    assert names(run("ls", "--json")) == ["base", "bot", "tuned"]
    assert names(run("ls", "--json", *at)) == ["there"]
    monkeypatch.setenv("BLOCKZOO_SERVER", far.address)
    assert names(run("ls", "--json")) == ["base", "bot", "tuned"]
    monkeypatch.delenv("BLOCKZOO_ZOO")
    assert names(run("ls", "--json")) == ["there"]
    assert names(run("ls", "--json", "--zoo", tmp_path / "zoo")) == ["base", "bot", "tuned"]
    outcome = run("ls", "--zoo", tmp_path / "zoo", *at)
    assert outcome.code == 2
    assert "give one of the two" in outcome.err


def test_no_server_is_one_sentence(run, folders):
    outcome = run("ls", "--server", "127.0.0.1:1")
    assert outcome.code == 1
    assert "no server answers at 127.0.0.1:1" in outcome.err
    outcome = run("register", folders / "base", "--name", "x", "--server", "127.0.0.1:1")
    assert outcome.code == 1
    assert "no server answers at 127.0.0.1:1" in outcome.err


def test_the_token_comes_from_a_file(run, folders, tmp_path):
    token = tmp_path / "token"
    token.write_text("sesame\n")
    with zoo_server(tmp_path / "far", token_file=token) as server:
        at = ("--server", server.address)
        assert "UNAUTHENTICATED" in run("ls", *at, "--json").err
        register = ("register", folders / "base", "--name", "base", *at)
        assert run(*register).code == 1
        assert run(*register, "--token-file", token).code == 0
        export = ("export", "base", tmp_path / "out", *at)
        assert "UNAUTHENTICATED" in run(*export, "--json").err
        assert not (tmp_path / "out").exists()
        assert run(*export, "--token-file", token).code == 0
