"""docs/configuration.md says what the settings models say."""

from __future__ import annotations

import subprocess
import sys

import pytest

from blockserve.cli.options.service import Service
from blockserve.cli.options.settings import iterate_settings
from blockserve.cli.verbs.serve import CLUSTER, SERVE
from support.paths import ROOT


def test_the_page_is_up_to_date() -> None:
    script = ROOT / "scripts" / "config_docs.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("service", [SERVE, *CLUSTER], ids=lambda service: service.name)
def test_every_setting_is_explained(service: Service) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    for setting in iterate_settings(service.settings()):
        assert setting.meaning.endswith("."), setting.path
        assert f"### `{setting.path}`" in page
        assert f"`{setting.variable}`" in page
        # The engine's settings give their reasons inside the meaning.
        assert setting.reason or setting.section == "engine", setting.path
