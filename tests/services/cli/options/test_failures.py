import errno
import os
import signal
import subprocess
import sys

import pytest

from blockserve.cli import main
from blockserve.cli.options import failures
from blockserve.common import errors as serve_errors
from blockserve.common.wire.errors import all_errors
from blockzoo import Zoo, errors
from support.folders import config, write_checkpoint


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.VariantNotFoundError("x"), 3),
        (errors.ZooNotFoundError("x"), 3),
        (errors.BlobNotFoundError("x"), 5),
        (errors.ManifestNotFoundError("x"), 5),
        (errors.CorruptBlobError("x"), 5),
        (errors.ConflictError("x"), 4),
        (errors.PickleRefusedError("x"), 1),
        (errors.StorageFullError("x"), 1),
        (serve_errors.ConfigurationError("x"), 2),
        (serve_errors.QueueFullError("x"), 1),
        (OSError(errno.EACCES, "no"), 1),
        (ZeroDivisionError(), 1),
    ],
)
def test_exit_codes(error, code):
    assert failures.exit_code(error) == code


def test_every_error_has_a_documented_exit_code():
    documented = {int(line.split()[0]) for line in failures.__doc__.splitlines() if line[:1].isdigit()}
    assert documented == {0, 1, 2, 3, 4, 5, 130}
    for cls in all_errors():
        error = cls.__new__(cls)
        assert failures.exit_code(error) in documented - {0, 130}


def test_an_error_is_a_sentence_and_a_hint(run, zoo):
    outcome = run("show", "bota")
    assert outcome.code == 3
    assert outcome.out == ""
    assert outcome.err == "Error: variant 'bota' is not registered\nDid you mean bot?\n"


def test_errors_as_json(run, zoo):
    outcome = run("show", "bota", "--json")
    assert outcome.out == ""
    assert outcome.error["reason"] == "VARIANT_NOT_FOUND"
    assert outcome.error["hint"] == "Did you mean bot?"
    assert outcome.error["metadata"] == {"variant": "bota"}


def test_markup_in_an_error_is_text(run, zoo):
    assert "[bold]x[/]" in run("show", "[bold]x[/]").err


@pytest.mark.parametrize(
    "words",
    [
        ("nonsense",),
        ("ls", "--nonsense"),
        ("show",),
        ("register", "x"),
        ("gc", "--grace", "soon"),
        ("diff", "a"),
    ],
)
def test_a_wrong_command_line_is_2(run, words):
    outcome = run(*words)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "--help" in outcome.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ls", "--sort", "x"), "--sort cannot be 'x': choose name, size, stored, age or base"),
        (("ls", "--limit", "0"), "--limit must be at least 1"),
        (("gc", "--grace", "soon"), "--grace must be a number"),
        (("rollback", "bot", "--to", "one"), "--to must be a whole number"),
        (("show",), "Missing argument 'VARIANT'"),
        (("ls", "--nonsense"), "No such option: --nonsense"),
        (("pull", "x"), "x is no id of a model at the hub: write ORG/NAME"),
        (
            ("register", "x", "-n", "y", "--jobs", "2"),
            "--jobs is for --all: one folder is registered by one process",
        ),
        (("status",), "--tls must be true or false"),
    ],
)
def test_a_wrong_command_line_is_a_sentence_or_json(run, words, message, monkeypatch):
    monkeypatch.setenv("BLOCKZOO_TLS", "maybe" if "--tls" in message else "false")
    hint = f"`blockzoo {words[0]} --help` explains the options."
    assert run(*words).err == f"Error: {message}\n{hint}\n"
    outcome = run(*words, "--json")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.error == {"reason": "USAGE", "message": message, "hint": hint, "metadata": {}}


def test_no_zoo(run, tmp_path):
    outcome = run("ls", "--zoo", tmp_path / "nowhere")
    assert outcome.code == 3
    assert "there is no zoo at" in outcome.err
    assert not (tmp_path / "nowhere").exists()


def test_a_refused_checkpoint(run, tmp_path):
    folder = write_checkpoint(tmp_path / "odd", config(architectures=["GPT2LMHeadModel"]), {})
    outcome = run("register", folder, "--name", "odd", "--zoo", tmp_path / "zoo", "--json")
    assert outcome.code == 1
    assert outcome.error["reason"] == "UNSUPPORTED_ARCHITECTURE"
    assert "LlamaForCausalLM" in outcome.error["hint"]


@pytest.mark.parametrize("name", ["../up", "a/b", "", "-rf"])
def test_names_with_tricks(run, zoo, folders, name):
    assert run("register", folders / "base", f"--name={name}").code == 1
    assert len(zoo.variants()) == 3


def test_an_os_error_is_a_sentence(run, monkeypatch):
    def fail(*args, **given):
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere")

    monkeypatch.setattr(Zoo, "open", fail)
    assert run("ls").err == "Error: /somewhere: Permission denied\n"


def test_a_fault_is_owned_up_to_and_debug_shows_it(run, monkeypatch):
    def fail(*args, **given):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(Zoo, "open", fail)
    outcome = run("ls")
    assert outcome.code == 1
    assert outcome.err.startswith("Error: internal error: ZeroDivisionError: by zero\n")
    assert "--debug" in outcome.err
    with pytest.raises(ZeroDivisionError):
        main(["ls", "--debug"])
    monkeypatch.setenv("BLOCKZOO_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["ls"])


def test_debug_after_two_dashes_is_an_argument():
    from blockserve.cli.main import _take_debug

    assert _take_debug(["generate", "m", "--", "--debug"]) == (["generate", "m", "--", "--debug"], False)
    assert _take_debug(["--debug", "ls"]) == (["ls"], True)


def test_ctrl_c_is_130_without_a_traceback(run, monkeypatch):
    def interrupted(*args, **given):
        raise KeyboardInterrupt

    monkeypatch.setattr(Zoo, "open", interrupted)
    outcome = run("ls")
    assert (outcome.code, outcome.err) == (130, "Interrupted.\n")


def test_ctrl_c_while_registering_leaves_the_zoo_as_it_was(zoo, folders, tmp_path):
    """A real signal to a real process that has stopped in the middle of writing."""
    script = (
        "import sys, time\n"
        "from blockserve.cli import main\n"
        "from blockzoo.registering.job import RegisterJob\n"
        "from blockzoo.storage.local import LocalStorage\n"
        "write = LocalStorage._stage\n"
        "def slow(self, data, *, durable):\n"
        "    if durable:\n"
        "        sys.stdout.write('writing\\n'); sys.stdout.flush()\n"
        "        time.sleep(1)\n"
        "    return write(self, data, durable=durable)\n"
        "LocalStorage._stage = slow\n"
        f"sys.exit(main(['register', {str(folders / 'other')!r}, '--name', 'other']))\n"
    )
    values = config(num_hidden_layers=2, hidden_size=32)
    write_checkpoint(folders / "other", values)
    before = [record.name for record in zoo.variants()]
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "writing\n"
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == "Interrupted.\n"
    assert [record.name for record in zoo.variants()] == before
    assert main(["verify"]) == 0
