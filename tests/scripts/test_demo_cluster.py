"""The cluster demo, run as a newcomer would, and what its receipt promises."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.model
@pytest.mark.long  # as the other demo: a minute of both cores, and tests/e2e does the same to smaller models
def test_the_receipt_keeps_its_promises() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "demo_cluster.py"), "--tokens", "48"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    receipt = done.stdout.rpartition("Receipt")[2]
    assert re.search(r"tokens lost +0\n", receipt)
    assert re.search(r"tokens repeated +0\n", receipt)
    assert re.search(r"transcripts as undisturbed +12 of 12\n", receipt)
    assert int(re.search(r"answers on the killed worker +(\d+)", receipt)[1]) > 0  # type: ignore[index]
    assert float(re.search(r"register to first token +([\d.]+) s", receipt)[1]) > 0  # type: ignore[index]
