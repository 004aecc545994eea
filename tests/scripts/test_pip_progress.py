import importlib.util
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "pip_progress.py"

OUTPUT = """\
Obtaining file:///somewhere
Collecting torch==2.13.0
  Downloading torch-2.13.0.metadata (12 kB)
  Downloading torch-2.13.0.whl (191.8 MB)
     ━━━━━━━━ 191.8/191.8 MB
Collecting blake3
  Using cached blake3-1.0.11.whl (385 kB)
Installing collected packages: blake3, torch
"""


def load():
    spec = importlib.util.spec_from_file_location("pip_progress", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["pip_progress"] = module
    spec.loader.exec_module(module)
    return module


def test_counts_packages_and_bytes():
    state = load().State(started=100.0)
    described = []
    for line in OUTPUT.splitlines():
        state.read(line)
        described.append(state.describe(112.0))
    assert described[1].endswith("0 packages, 0 MB fetched, fetching torch==2.13.0")
    assert described[-1] == "    12 s  2 packages, 192 MB fetched, unpacking"
    assert state.errors == []


def test_keeps_everything_in_the_log_and_prints_errors_only(tmp_path):
    text = OUTPUT + "WARNING: noise\nERROR: Could not find a version\n"
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "log"], input=text, capture_output=True, text=True, check=True
    )
    assert (tmp_path / "log").read_text() == text
    assert done.stderr == "ERROR: Could not find a version\n"
    assert done.stdout == ""
