import re
import shlex
import subprocess
import sys

import pytest
import typer

from blockserve.cli.app import build_app, reflow

VERBS = {
    "register", "pull", "ls", "show", "du", "diff", "export", "quantize", "rm", "rollback",
    "gc", "verify", "backup", "restore",
    "serve", "status", "trace", "load", "unload", "version", "generate", "chat",
    "up", "down", "drain", "pin", "place", "replicas", "evict", "worker", "router", "controller",
}  # fmt: skip
PROCESSES = {"serve", "worker", "router", "controller", "up"}
WITH_JSON = VERBS - PROCESSES - {"chat"}


def commands():
    return {command.name: command for command in build_app(sorted(PROCESSES)).registered_commands}


def test_every_verb_is_there():
    assert sorted(commands()) == sorted(VERBS)


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_teaches_with_examples_that_parse(run, verb):
    outcome = run(verb, "--help")
    assert outcome.code == 0
    assert outcome.err == ""
    _, found, after = outcome.out.partition("Examples:")
    assert found
    examples = [line.strip() for line in after.split("╭")[0].splitlines() if line.strip()]
    assert examples
    options = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", after.split("╭", 1)[1]))
    for example in examples:
        words = shlex.split(example, comments=True)
        start = words.index("blockzoo")
        assert words[start + 1] == verb
        words = words[start : words.index("|", start) if "|" in words[start:] else len(words)]
        assert {word for word in words if re.match(r"--?[a-z]", word)} <= options


@pytest.mark.parametrize("verb", sorted(WITH_JSON))
def test_verbs_that_print_data_know_json(run, verb):
    assert "--json" in run(verb, "--help").out


def test_the_list_of_verbs_groups_them(run):
    out = run("--help").out
    for panel in ("The zoo", "Care of the zoo", "A server", "A cluster", "Talking to a server", "Start here"):
        assert panel in out
    for verb in VERBS:
        assert re.search(rf"^│ {verb} ", out, re.MULTILINE)


@pytest.mark.parametrize("width", [60, 80, 100, 110, 120])
@pytest.mark.parametrize("verb", ["serve", "router"])
def test_no_name_of_an_option_is_cut(run, monkeypatch, verb, width):
    whole = re.findall(r"--[a-z][\w-]*", run(verb, "--help").out)
    monkeypatch.setenv("TERMINAL_WIDTH", str(width))
    monkeypatch.setenv("COLUMNS", str(width))
    out = run(verb, "--help").out
    assert set(re.findall(r"--[a-z][\w-]*", out)) == set(whole)
    assert not re.search(r"--[\w-]*…", out)
    for panel in ("Process", "Limits on requests"):
        assert panel in out


def test_no_verb_shows_the_help(run):
    outcome = run()
    assert "Usage: blockzoo" in outcome.out + outcome.err


def test_paragraphs_fill_the_terminal_and_examples_stay():
    doc = """One
    two.

    Three
    four.

    \b
    Examples:
      a  b
    """
    assert reflow(doc) == "One two.\n\nThree four.\n\n\b\nExamples:\n  a  b"


@pytest.mark.parametrize("words", [("--version",), ("version",)])
def test_version(run, words):
    outcome = run(*words)
    assert outcome.code == 0
    assert re.match(r"blockzoo \d+\.\d+\.\d+ \(Python 3\.\d+", outcome.out)


def test_version_as_json(run):
    assert set(run("version", "--json").json) == {"version", "python"}


def loaded_modules(*words):
    """Modules in a fresh interpreter after a command line."""
    code = (
        "import sys\n"
        "from blockserve.cli import main\n"
        f"main({list(words)!r})\n"
        "sys.stderr.write('\\n'.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_a_help_text_imports_nothing_heavy():
    heavy = {"torch", "numpy", "grpc", "pydantic_settings", "blockzoo", "obstore", "tokenizers", "jinja2"}
    assert not loaded_modules("--help") & heavy
    assert not loaded_modules("generate", "--help") & heavy


def test_listing_a_zoo_imports_no_serving(zoo):
    modules = loaded_modules("ls")
    assert not modules & {"torch", "grpc", "transformers", "tokenizers", "safetensors", "jinja2"}


def test_the_zoo_verbs_run_without_torch(zoo, folders, tmp_path):
    lines = [
        f"register {folders / 'tuned'} --name again --base base",
        "ls",
        "show again",
        "du",
        "diff base again",
        "verify",
        "rm again --yes",
        "gc --grace 0",
        f"export bot {tmp_path / 'out'}",
    ]
    script = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from blockserve.cli import main\n"
        f"for line in {lines!r}:\n"
        "    assert main(line.split()) == 0, line\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_verbs_are_typer_commands_with_a_first_sentence():
    for command in commands().values():
        assert isinstance(command, typer.models.CommandInfo)
        first = (command.help or "").split("\n\n")[0]
        assert first.endswith(".")
        assert len(first) < 110


@pytest.mark.parametrize(
    ("line", "offered"), [("serve --kv", "--kv-cache-bytes"), ("gen", "generate"), ("ls --j", "--json")]
)
def test_shells_complete_verbs_and_options(run, monkeypatch, line, offered):
    words = f"blockzoo {line}"
    monkeypatch.setenv("_BLOCKZOO_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert offered in run().out.split()
