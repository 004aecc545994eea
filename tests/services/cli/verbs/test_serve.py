import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from blockserve.cli.options.service import command
from blockserve.cli.options.settings import iterate_settings, option_type
from blockserve.cli.options.shared import DEFAULT_ZOO
from blockserve.cli.verbs.serve import CLUSTER, SERVE, _status_of
from blockzoo import Zoo

SERVICES = pytest.mark.parametrize("service", [SERVE, *CLUSTER], ids=lambda service: service.name)


def settings_of(service):
    return list(iterate_settings(service.settings()))


@SERVICES
def test_options_are_distinct(service):
    names = [setting.parameter for setting in settings_of(service)]
    assert len(names) == len(set(names))
    assert "config" not in names


@SERVICES
def test_every_setting_says_what_it_means(service):
    for setting in settings_of(service):
        assert setting.meaning.endswith("."), setting.path
        assert setting.meaning[0].isupper() or setting.meaning[0] in '"`', setting.path


@SERVICES
def test_every_setting_is_an_option_but_secrets(run, service):
    text = run(service.name, "--help").out
    for setting in settings_of(service):
        shown = re.search(rf"{setting.flag}\b", text)
        if setting.is_secret:
            assert not re.search(rf"{setting.flag} ", text)
        else:
            assert shown, setting.flag
    assert [setting.name for setting in settings_of(service) if setting.is_secret] == ["token"]


def test_the_command_that_is_named_at_the_start_finds_the_server():
    assert _status_of("127.0.0.1:7450") == "blockzoo status"
    assert _status_of("127.0.0.1:7999") == "blockzoo status --server 127.0.0.1:7999"
    assert _status_of("unix:/run/zoo.sock") == "blockzoo status --server unix:/run/zoo.sock"


@pytest.fixture
def started(monkeypatch):
    """The settings that `serve` would run with, instead of running."""
    seen = []
    monkeypatch.setattr("blockserve.embedded.run.run", lambda config, **given: seen.append(config))
    return seen


def test_options_become_settings(run, started, zoo):
    words = (
        "--listen unix:/x --preload a --preload b --device cuda --dtype float32 --kv-cache-bytes 123456 "
        "--max-output-tokens 7 --no-reflection --insecure --log-format json --drain-seconds 1.5"
    )
    assert run("serve", "--zoo", "here", *words.split()).code == 0
    (config,) = started
    assert (config.zoo, config.listen, config.preload) == ("here", "unix:/x", ("a", "b"))
    assert (config.engine.device, config.engine.dtype, config.engine.kv_cache_bytes) == (
        "cuda",
        "float32",
        123456,
    )
    assert config.router.max_output_tokens == 7
    assert (config.reflection, config.insecure, config.log_format, config.drain_seconds) == (
        False,
        True,
        "json",
        1.5,
    )


def test_what_is_not_said_comes_from_environment_file_and_defaults(run, started, tmp_path, monkeypatch):
    (tmp_path / "serve.yaml").write_text(
        yaml.safe_dump({"engine": {"kv_page_tokens": 16}, "drain_seconds": 3})
    )
    monkeypatch.setenv("BLOCKZOO_DRAIN_SECONDS", "4")
    assert run("serve", "--config", tmp_path / "serve.yaml", "--max-running-requests", 5).code == 0
    (config,) = started
    assert config.zoo == DEFAULT_ZOO
    assert config.drain_seconds == 4
    assert (config.engine.max_running_requests, config.engine.kv_page_tokens) == (5, 16)


@pytest.mark.parametrize("source", ["environment", "file"])
def test_the_zoo_of_environment_and_file_counts(run, started, tmp_path, monkeypatch, source):
    (tmp_path / "serve.yaml").write_text("zoo: elsewhere\n" if source == "file" else "{}\n")
    if source == "environment":
        monkeypatch.setenv("BLOCKZOO_ZOO", "elsewhere")
    run("serve", "--config", tmp_path / "serve.yaml")
    assert started[0].zoo == "elsewhere"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--listen", "0.0.0.0:7450"], "can be reached from other machines"),
        (["--config", "/nowhere.yaml"], "does not exist"),
        (["--kv-cache-bytes", "0"], "at least 1"),
        (["--device-of-dreams", "x"], "No such option"),
        (["--dtype", "int1"], "--dtype"),
    ],
)
def test_settings_that_cannot_be(run, started, words, message):
    outcome = run("serve", *words)
    assert outcome.code == 2
    assert message in outcome.err
    assert not started


def test_kinds_of_options():
    assert option_type(Path | None) == Path | None
    assert option_type(tuple[str, ...]) == list[str] | None
    assert option_type(dict[str, int]) is None
    assert command(SERVE, with_options=False).__signature__.parameters == {}


@pytest.fixture
def cluster_started(monkeypatch):
    """The settings that a process of a cluster would run with, instead of running."""
    seen = []
    monkeypatch.setattr(
        "blockserve.common.process.run.run", lambda settings, server, ready: seen.append(settings)
    )
    return seen


@pytest.mark.parametrize("service", CLUSTER, ids=lambda service: service.name)
def test_processes_of_a_cluster_take_options_environment_and_file(
    run, cluster_started, tmp_path, monkeypatch, service
):
    (tmp_path / "file.yaml").write_text(
        yaml.safe_dump({"state": {"lease_seconds": 9, "timeout_seconds": 8, "url": "redis://file"}})
    )
    monkeypatch.setenv("BLOCKZOO_STATE_URL", "redis://environment")
    monkeypatch.setenv("BLOCKZOO_STATE_LEASE_SECONDS", "7")
    words = ("--config", tmp_path / "file.yaml", "--state-lease-seconds", 6, "--listen", "127.0.0.1:0")
    assert run(service.name, *words).code == 0
    (settings,) = cluster_started
    state = settings.state
    assert (state.url, state.lease_seconds, state.timeout_seconds) == ("redis://environment", 6, 8)
    assert settings.listen == "127.0.0.1:0"


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        ("worker --name w --num-threads 3", ("engine", "num_threads"), 3),
        ("worker --window-bytes 70000", ("window_bytes",), 70000),
        ("router --failover-path-seconds 7", ("failover", "path_seconds"), 7),
        ("router --max-output-tokens 5", ("router", "max_output_tokens"), 5),
        ("router --no-adaptive-enabled", ("adaptive", "enabled"), False),
        ("controller --replicas 2", ("replicas",), 2),
        ("controller --max-pushes 3", ("controller", "max_pushes"), 3),
    ],
)
def test_parts_of_a_process_have_options(run, cluster_started, words, path, value):
    assert run(*words.split()).code == 0
    found = cluster_started[0]
    for name in path:
        found = getattr(found, name)
    assert found == value


def test_a_wrong_state_is_a_mistake_of_the_command_line(run, cluster_started):
    outcome = run("worker", "--state-url", "ftp://somewhere")
    assert outcome.code == 2
    assert "state" in outcome.err
    assert not cluster_started


def test_a_leader_that_looks_less_often_than_its_lease_lasts_is_none(run, cluster_started):
    outcome = run("controller", "--look-seconds", "2", "--state-lease-seconds", "3")
    assert outcome.code == 2
    assert "lease_seconds has to be at least twice look_seconds" in outcome.err
    assert not cluster_started


def test_no_zoo_to_serve(run, tmp_path):
    outcome = run("serve", "--zoo", tmp_path / "nowhere", "--listen", "127.0.0.1:0")
    assert outcome.code == 3
    assert "there is no zoo" in outcome.err


def test_serve_announces_itself_and_stops_on_ctrl_c(zoo):
    assert isinstance(zoo, Zoo)
    command = [sys.executable, "-m", "blockserve.cli", "serve", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        while not (lines and lines[-1].startswith("Serving ")):
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        assert re.search(r" on 127\.0\.0\.1:[1-9]\d+\.", lines[-1])
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait() == 0, rest
    assert "Traceback" not in rest


@pytest.mark.parametrize(
    "verb", [("serve", "--metrics-listen", "off"), ("up", "--workers", "1"), ("up", "--detach")], ids=" ".join
)
def test_a_port_that_is_taken_is_one_sentence(zoo, tmp_path, monkeypatch, verb):
    """Of a real process: gRPC writes past Python's standard error."""
    assert isinstance(zoo, Zoo)
    monkeypatch.setenv("BLOCKZOO_DIR", str(tmp_path / "cluster"))
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        command = [sys.executable, "-m", "blockserve.cli", *verb, "--listen", address]
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert outcome.returncode == 2
    assert outcome.stderr.splitlines() == [
        f"Error: another process listens on {address} already",
        "Stop it if it is yours. Choose another address with --listen.",
    ]
    assert outcome.stdout == ""


def test_a_server_shows_people_three_lines(zoo, monkeypatch):
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    command = [sys.executable, "-m", "blockserve.cli", "serve", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(
        [*command, "--metrics-listen", "off"], stderr=subprocess.PIPE, text=True
    ) as process:
        lines = [process.stderr.readline() for _ in range(3)]
        process.send_signal(signal.SIGINT)
        process.wait()
    assert " INFO embedded.server listening address=127.0.0.1:" in lines[0]
    assert re.search(r" INFO embedded\.server ready address=\S+$", lines[1])
    assert lines[2].startswith("Serving ")
