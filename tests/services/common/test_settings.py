"""Settings: where values come from, and what is said when one is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockserve.common.errors import ConfigurationError
from blockserve.common.settings import Section, Settings, setting


class Pool(Section):
    """A nested section with a two-word field."""

    max_pages: int = setting(10, "Pages.", reason="Ten fingers.", unit="pages", ge=1)


class Example(Settings):
    """Settings of nothing."""

    name: str = setting("plain", "A name.", reason="Any will do.")
    tags: tuple[str, ...] = setting((), "Tags.", reason="None needed.")
    pool: Pool = Pool()


def test_defaults_stand_beside_the_fields() -> None:
    settings = Example.load()
    assert (settings.name, settings.tags, settings.pool.max_pages) == ("plain", (), 10)


def test_argument_beats_environment_beats_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("name: from-file\npool: {max_pages: 3}\ntags: [file]\n")
    monkeypatch.setenv("BLOCKZOO_NAME", "from-environment")
    monkeypatch.setenv("BLOCKZOO_POOL_MAX_PAGES", "4")
    settings = Example.load(file)
    assert (settings.name, settings.pool.max_pages, settings.tags) == ("from-environment", 4, ("file",))
    assert Example.load(file, name="from-argument").name == "from-argument"
    assert Example.load(file, name=None).name == "from-environment"


def test_the_file_can_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("name: from-file\n")
    monkeypatch.setenv("BLOCKZOO_CONFIG", str(file))
    assert Example.load().name == "from-file"


def test_a_file_is_read_for_its_own_call_only(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("name: from-file\n")
    assert Example.load(file).name == "from-file"
    assert Example.load().name == "plain"


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Example.load().name = "other"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("nmae: typo\n", "nmae"),
        ("pool: {max_pages: 0}\n", "pool.max_pages"),
        ("pool: {max_page: 1}\n", "pool.max_page"),
        ("- a\n- list\n", ""),
        ("name: [unclosed\n", ""),
    ],
)
def test_a_wrong_file_names_the_field(tmp_path: Path, text: str, path: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        Example.load(file)
    assert path in str(caught.value)
    assert "configuration.md" in caught.value.hint


def test_a_missing_file_is_an_error_not_a_default(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none\.yaml"):
        Example.load(tmp_path / "none.yaml")


def test_values_are_not_echoed_because_one_may_be_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKZOO_POOL_MAX_PAGES", "hunter2")
    with pytest.raises(ConfigurationError) as caught:
        Example.load()
    assert "hunter2" not in str(caught.value)
