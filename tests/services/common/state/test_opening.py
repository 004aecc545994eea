"""Opening the store that the settings name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from blockserve.common.errors import ConfigurationError, StateStoreError
from blockserve.common.state.memory import InProcessStore
from blockserve.common.state.opening import open_store, refuse_unfit
from blockserve.common.state.settings import StateConfig
from blockzoo.manifest import ChainId
from support.edge import async_test


def test_the_default_is_in_process() -> None:
    assert isinstance(open_store(StateConfig()), InProcessStore)


def test_a_state_that_nobody_else_finds_is_said(caplog: pytest.LogCaptureFixture) -> None:
    open_store(StateConfig())
    assert "which other processes cannot reach" in caplog.text


@pytest.mark.parametrize("name", ["password_file", "ca_file"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="nowhere"):
        open_store(StateConfig(url="rediss://a", **{name: tmp_path / "nowhere"}))


def run_without_redis(code: str) -> str:
    blocked = f"import sys; sys.modules['redis'] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_library_is_needed_by_servers_only() -> None:
    said = run_without_redis(
        "from blockserve.common.state.opening import open_store\n"
        "from blockserve.common.state.settings import StateConfig\n"
        "open_store(StateConfig())\n"
        "try:\n"
        "    open_store(StateConfig(url='redis://a'))\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error.hint)\n"
    )
    assert said == "ConfigurationError pip install 'blockzoo[cluster]'\n"


class Answering(InProcessStore):
    """A store whose first answer is an error."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    async def demand(self) -> dict[ChainId, float]:
        raise self._error


@async_test
async def test_only_a_store_that_can_never_hold_the_state_is_refused() -> None:
    await refuse_unfit(InProcessStore())
    await refuse_unfit(Answering(StateStoreError("no answer")))
    with pytest.raises(ConfigurationError, match="Cluster"):
        await refuse_unfit(Answering(ConfigurationError("a node of Redis Cluster")))
