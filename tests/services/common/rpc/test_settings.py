"""Settings of a process that listens: its token."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockserve.common.errors import ConfigurationError
from blockserve.common.rpc.settings import ServerSettings, read_token
from support.edge import async_test, serving


def test_a_token_is_read_from_the_setting_or_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("t0ken\n")
    assert read_token(ServerSettings()) is None
    assert read_token(ServerSettings.load(token="t0ken")) == "t0ken"
    assert read_token(ServerSettings(token_file=tmp_path / "token")) == "t0ken"
    with pytest.raises(ConfigurationError, match="none cannot be read"):
        read_token(ServerSettings(token_file=tmp_path / "none"))


@pytest.mark.parametrize("content", ["", " \n"])
@async_test
async def test_an_empty_token_is_no_token(tmp_path: Path, content: str) -> None:
    (tmp_path / "token").write_text(content)
    with pytest.raises(ConfigurationError, match="empty"):
        async with serving(token_file=tmp_path / "token"):
            pass
