"""docs/configuration.md says what the settings models say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from blockserve.cli.settings_options import iterate_settings
from blockserve.embedded.config import ServeConfig

ROOT = Path(__file__).parents[3]


def test_the_page_is_up_to_date() -> None:
    script = ROOT / "scripts" / "config_docs.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_setting_is_explained() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    for setting in iterate_settings(ServeConfig):
        assert setting.meaning.endswith("."), setting.path
        assert f"### `{setting.path}`" in page
        assert f"`{setting.variable}`" in page
        # The engine's settings give their reasons inside the meaning.
        assert setting.reason or setting.section == "engine", setting.path
