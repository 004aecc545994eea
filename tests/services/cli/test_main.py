"""The command where packages that it needs are not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def command(arguments: list[str], *missing: str) -> subprocess.CompletedProcess[str]:
    """`blockzoo` in an interpreter without some packages."""
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({missing!r}))\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "from blockserve.cli import main\n"
        "sys.exit(main())"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_bare_install_says_in_one_sentence_what_to_install() -> None:
    done = command(["ls"], "typer", "rich", "click")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: the package typer is not installed: pip install 'blockzoo[zoo]' brings it\n"


def test_a_verb_names_the_extra_that_it_needs(tmp_path: Path) -> None:
    zoo = str(tmp_path / "zoo")
    done = command(["serve", "--zoo", zoo, "--create-zoo", "--listen", "127.0.0.1:0"], "torch")
    assert done.returncode == 1
    assert "pip install 'blockzoo[worker]'" in done.stderr
    assert "Traceback" not in done.stderr
