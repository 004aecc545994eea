"""`scripts/environment.sh` with an interpreter that only pretends to install."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Stands in for python3: makes environments that contain itself, notes what pip is told, fails when asked to.
FAKE = """#!/bin/bash
case "$*" in
*version_info\\[:2\\]*) echo "${FAKE_VERSION:-3.11}" ;;
*"< (3, 11)"*) [ "${FAKE_VERSION:-3.11}" != 3.9 ] ;;
*ensurepip*) [ -z "${FAKE_NO_VENV:-}" ] ;;
*_base_executable*) echo "$FAKE_PYTHON" ;;
"-m venv "*)
    mkdir -p "$3/bin"
    touch "$3/pyvenv.cfg"
    cp "$FAKE_PYTHON" "$3/bin/python"
    echo venv >>"$FAKE_CALLS" ;;
"-m pip install"*--dry-run*)
    echo '{"install": [{"download_info": {"url": "'"${FAKE_TORCH:-torch+cpu.whl}"'"}}]}' ;;
"-m pip install"*)
    echo "pip ${!#}" >>"$FAKE_CALLS"
    echo "pip $*" >>"$FAKE_CALLS.full"
    if [ -n "${FAKE_GATE:-}" ]; then echo started >"$FAKE_GATE.started"; read -r _ <"$FAKE_GATE"; fi
    if [ -n "${FAKE_FAIL:-}" ]; then echo "ERROR: No matching distribution"; exit 1; fi
    echo "Collecting things" ;;
"-m pip --version") ;;
*) exec "$REAL_PYTHON" "$@" ;;
esac
"""


class Project:
    """A copy of what the script needs, and the way to run it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "scripts").mkdir(parents=True)
        for name in (
            "scripts/environment.sh",
            "scripts/pip_progress.py",
            "pyproject.toml",
            "constraints.txt",
        ):
            shutil.copy(ROOT / name, folder / name)
        fake = folder / "fake-python"
        fake.write_text(FAKE)
        fake.chmod(0o755)
        self.environment = {
            **os.environ,
            "PYTHON": str(fake),
            "FAKE_PYTHON": str(fake),
            "FAKE_CALLS": str(folder / "calls"),
            "REAL_PYTHON": sys.executable,
        }
        self.environment.pop("VENV", None)
        self.environment.pop("TORCH_INDEX", None)

    def start(self, extra: str = "dev", **settings: object) -> "subprocess.Popen[str]":
        """Begin a run."""
        return subprocess.Popen(
            ["scripts/environment.sh", extra],
            cwd=self.folder,
            env={**self.environment, **{name: str(value) for name, value in settings.items()}},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, extra: str = "dev", **settings: object) -> "subprocess.CompletedProcess[str]":
        """A whole run."""
        process = self.start(extra, **settings)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    @property
    def calls(self) -> list[str]:
        """What the interpreter was asked to make and install."""
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / "project")


def test_the_first_run_says_what_it_will_download_and_the_second_does_nothing(project):
    first = project.run()
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("Setting up .venv: up to 550 MB to download")
    assert project.calls == ["venv", "pip .[dev]"]
    assert "-c constraints.txt" in (project.folder / "calls.full").read_text()
    second = project.run()
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert len(project.calls) == 2


def test_dev_is_enough_for_the_demo_but_not_the_other_way_round(project):
    project.run("demo")
    project.run("demo")
    assert project.calls == ["venv", "pip .[demo]"]
    project.run("dev")
    project.run("demo")
    assert project.calls == ["venv", "pip .[demo]", "pip .[dev]"]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_installs_again_when_requirements_change(project, name):
    project.run()
    with (project.folder / name).open("a") as file:
        file.write("\n# changed\n")
    project.run()
    assert project.calls == ["venv", "pip .[dev]", "pip .[dev]"]


def test_another_index_installs_again(project):
    project.run()
    project.run(TORCH_INDEX="https://example.org/cpu")
    assert project.calls[-1] == "pip .[dev]"
    assert len(project.calls) == 3
    assert "--extra-index-url https://example.org/cpu" in (project.folder / "calls.full").read_text()


def test_a_moved_folder_makes_a_new_environment(project):
    project.run()
    moved = project.folder.with_name("moved")
    project.folder.rename(moved)
    project.folder = moved
    project.environment["PYTHON"] = project.environment["FAKE_PYTHON"] = str(moved / "fake-python")
    project.environment["FAKE_CALLS"] = str(moved / "calls")
    project.run()
    assert project.calls == ["venv", "pip .[dev]", "venv", "pip .[dev]"]


def test_a_failed_install_shows_the_error_and_the_next_run_starts_afresh(project):
    failed = project.run(FAKE_FAIL=1)
    assert failed.returncode == 1
    assert "ERROR: No matching distribution" in failed.stderr
    assert "see .cache/pip-dev.log" in failed.stderr
    assert project.run().returncode == 0
    assert project.calls == ["venv", "pip .[dev]", "venv", "pip .[dev]"]


def test_an_interrupted_install_starts_afresh(project):
    project.run()
    (project.folder / ".venv" / ".busy").touch()
    (project.folder / ".venv" / "half-written").touch()
    project.run()
    assert project.calls == ["venv", "pip .[dev]", "venv", "pip .[dev]"]
    assert not (project.folder / ".venv" / "half-written").exists()


def test_two_at_once_install_once(project):
    gate = project.folder / "gate"
    os.mkfifo(gate)
    started = Path(f"{gate}.started")
    os.mkfifo(started)
    first = project.start(FAKE_GATE=gate)
    assert started.read_text() == "started\n"
    second = project.start()
    assert (
        second.stderr.readline() == "blockzoo: another make is setting up the environment; waiting for it\n"
    )
    gate.write_text("go\n")
    for process in (first, second):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert project.calls == ["venv", "pip .[dev]"]


def test_a_sound_environment_made_otherwise_is_adopted(project):
    (project.folder / ".venv" / "bin").mkdir(parents=True)
    (project.folder / ".venv" / "pyvenv.cfg").touch()
    shutil.copy(project.environment["FAKE_PYTHON"], project.folder / ".venv" / "bin" / "python")
    (project.folder / ".venv" / "mine").touch()
    assert project.run().returncode == 0
    assert project.calls == ["pip .[dev]"]
    assert (project.folder / ".venv" / "mine").exists()


def few_megabytes(project):
    folder = project.folder / "bin"
    folder.mkdir()
    (folder / "df").write_text("#!/bin/bash\nprintf 'head\\n/dev/x 1 1 900 1%% /\\n'\n")
    (folder / "df").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"PYTHON": "/nowhere/python3"}, "/nowhere/python3 is not installed: install Python 3.11 or newer"),
        ({"FAKE_VERSION": "3.9"}, "is Python 3.9 and 3.11 is the oldest that works"),
        ({"FAKE_NO_VENV": "1"}, "ask for the package python3.11-venv"),
        (few_megabytes, "900 MB are free here and the environment needs 2300 MB"),
    ],
)
def test_an_obstacle_is_one_line_with_the_fix(project, settings, fix):
    given = settings(project) if callable(settings) else settings
    done = project.run(**given)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert fix in done.stderr
    assert project.calls == []
    assert not (project.folder / ".venv").exists()


def test_a_folder_that_is_no_environment_is_left_alone(project):
    (project.folder / "precious").mkdir()
    (project.folder / "precious" / "thesis.txt").write_text("x")
    done = project.run(VENV="precious")
    assert done.returncode == 1
    assert "is not a Python environment" in done.stderr
    assert (project.folder / "precious" / "thesis.txt").exists()


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="only there the default wheel carries CUDA")
def test_a_wheel_with_cuda_is_announced(project):
    done = project.run(FAKE_TORCH="https://example.org/torch-2.13.0-cp311.whl")
    assert done.returncode == 0
    assert "TORCH_INDEX=URL" in done.stderr
