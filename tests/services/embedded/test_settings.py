"""Settings of the server: what is refused before anything is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockserve.common.errors import ConfigurationError
from blockserve.embedded.settings import EmbeddedSettings


def test_nobody_else_can_reach_a_server_that_nobody_configured() -> None:
    config = EmbeddedSettings.load()
    assert config.listen == "127.0.0.1:7450"
    assert not config.insecure
    assert config.serves_reflection


@pytest.mark.parametrize("listen", ["0.0.0.0:7450", "[::]:7450", "10.1.2.3:7450", "zoo.example:7450"])
def test_another_address_needs_tls_and_a_credential_or_a_clear_word(listen: str, tmp_path: Path) -> None:
    tls = {"tls_cert": tmp_path / "c.pem", "tls_key": tmp_path / "k.pem"}
    for settings in ({}, tls, {"token": "t"}):
        with pytest.raises(ConfigurationError, match="can be reached from other machines"):
            EmbeddedSettings.load(listen=listen, **settings)
    assert EmbeddedSettings.load(listen=listen, insecure=True).listen == listen
    assert EmbeddedSettings.load(listen=listen, token="t", **tls).has_credential
    config = EmbeddedSettings.load(listen=listen, tls_client_ca=tmp_path / "ca.pem", **tls)
    assert config.has_tls
    assert not config.serves_reflection
    assert EmbeddedSettings.load(listen=listen, token="t", reflection=True, **tls).serves_reflection


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tls_cert": "c.pem"}, "set together"),
        ({"tls_client_ca": "ca.pem"}, "tls_client_ca needs"),
        ({"token": "a", "token_file": "f"}, "not both"),
        ({"listen": "nonsense"}, "neither host:port"),
        ({"listen": "127.0.0.1:99999"}, "neither host:port"),
        ({"listen": "unix:"}, "needs a path"),
        ({"stall_seconds": 0}, "stall_seconds"),
        ({"log_level": "loud"}, "log_level"),
        ({"engine": {"kv_page_tokens": 0}}, "kv_page_tokens"),
        ({"router": {"max_requests": 0}}, "router.max_requests"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        EmbeddedSettings.load(**settings)


def test_sections_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKZOO_ENGINE_KV_CACHE_BYTES", "1048576")
    monkeypatch.setenv("BLOCKZOO_ENGINE_DTYPE", "float32")
    monkeypatch.setenv("BLOCKZOO_ROUTER_MAX_STOP_STRINGS", "3")
    monkeypatch.setenv("BLOCKZOO_MAX_MESSAGE_BYTES", "100000")
    monkeypatch.setenv("BLOCKZOO_PRELOAD", '["a", "b"]')
    config = EmbeddedSettings.load()
    assert (config.engine.kv_cache_bytes, config.engine.dtype) == (1 << 20, "float32")
    assert (config.router.max_stop_strings, config.max_message_bytes) == (3, 100_000)
    assert config.preload == ("a", "b")


def test_a_token_does_not_show_in_what_is_printed() -> None:
    assert "s3cret" not in repr(EmbeddedSettings.load(token="s3cret"))


@pytest.mark.parametrize("listen", ["off", "127.0.0.1:0", "localhost:7451", "[::1]:7451"])
def test_metrics_are_read_on_this_machine(listen: str) -> None:
    assert EmbeddedSettings.load(metrics_listen=listen).metrics_listen == listen


def test_metrics_for_other_machines_need_a_clear_word() -> None:
    with pytest.raises(ConfigurationError, match="metrics_public"):
        EmbeddedSettings.load(metrics_listen="0.0.0.0:7451")
    assert EmbeddedSettings.load(metrics_listen="0.0.0.0:7451", metrics_public=True).metrics_public
    for listen in ("7451", "unix:/tmp/x", "127.0.0.1:70000"):
        with pytest.raises(ConfigurationError, match="neither host:port nor off"):
            EmbeddedSettings.load(metrics_listen=listen)
