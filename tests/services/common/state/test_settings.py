"""Settings of the shared state: URLs and secrets."""

from __future__ import annotations

import pytest

from blockserve.common.errors import ConfigurationError
from blockserve.common.settings import Settings
from blockserve.common.state.settings import StateConfig
from blockserve.common.state.url import Kind, StateUrl, parse_url

SECRET = "h0p3-nobody-reads-it"


class Process(Settings):
    """Settings of a process that has a state."""

    state: StateConfig = StateConfig()


@pytest.mark.parametrize(
    ("text", "meaning", "shown"),
    [
        ("memory:", StateUrl(Kind.MEMORY, "memory"), "memory:"),
        ("redis://db", StateUrl(Kind.TCP, "redis", (("db", 6379),)), "redis://db:6379/0"),
        (
            f"rediss://me:{SECRET}%40@[::1]:7000/3",
            StateUrl(Kind.TCP, "rediss", (("::1", 7000),), True, "me", f"{SECRET}@", 3),
            "rediss://[::1]:7000/3",
        ),
        (
            f"unix://:{SECRET}@/run/a%20b.sock?db=2",
            StateUrl(Kind.UNIX, "unix", password=SECRET, database=2, path="/run/a b.sock"),
            "unix:///run/a b.sock?db=2",
        ),
        (
            f"redis+sentinel://:{SECRET}@a,b:1/zoo/1",
            StateUrl(
                Kind.SENTINEL,
                "redis+sentinel",
                (("a", 26379), ("b", 1)),
                password=SECRET,
                database=1,
                service="zoo",
            ),
            "redis+sentinel://a:26379,b:1/zoo/1",
        ),
        (
            "rediss+sentinel://a/zoo",
            StateUrl(Kind.SENTINEL, "rediss+sentinel", (("a", 26379),), True, service="zoo"),
            "rediss+sentinel://a:26379/zoo/0",
        ),
    ],
)
def test_urls(text: str, meaning: StateUrl, shown: str) -> None:
    assert parse_url(text) == meaning
    assert str(parse_url(text)) == shown
    assert SECRET not in repr(parse_url(text))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "begins"),
        (f"http://:{SECRET}@a", "begins"),
        (SECRET, "begins"),
        (f"redis://:{SECRET}@", "host"),
        (f"redis://:{SECRET}@a,b", "sentinels"),
        (f"redis://:{SECRET}@a:{SECRET}", "cannot be read"),
        (f"redis://a/{SECRET}", "cannot be read"),
        (f"redis://:{SECRET}@a/0/1", "too many"),
        (f"redis://a?password={SECRET}", "settings"),
        (f"redis://:[{SECRET}@a", "cannot be read"),
        (f"redis+sentinel://:{SECRET}@a", "service"),
        (f"unix://:{SECRET}@", "socket"),
    ],
)
def test_what_is_no_url_is_refused_without_repeating_it(text: str, why: str) -> None:
    with pytest.raises(ConfigurationError, match=why) as caught:
        parse_url(text)
    assert SECRET not in f"{caught.value!r} {caught.value.hint} {caught.value.__cause__!r}"
    assert "redis+sentinel://" in caught.value.hint
    with pytest.raises(ConfigurationError) as caught:
        Process.load(state={"url": text})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"url": f"redis://:{SECRET}@a", "password_file": "x"}, "not in both"),
        ({"url": "rediss://a", "cert_file": "x"}, "together"),
        ({"url": "redis://a", "ca_file": "x"}, "rediss"),
        ({"lease_seconds": 1.9}, "twice"),
        ({"timeout_seconds": 0}, "greater than 0"),
    ],
)
def test_settings_that_do_not_go_together(values: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why) as caught:
        Process.load(state=values)
    assert SECRET not in str(caught.value)


def test_the_environment_names_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKZOO_STATE_URL", f"redis://:{SECRET}@db:7")
    settings = Process.load()
    assert settings.state.place.hosts == (("db", 7),)
    assert SECRET not in f"{settings!r} {settings}"
