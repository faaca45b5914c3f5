"""Settings from flags, files and systemd; what the machine gives by default; how a start fails."""

import json
import socket

import pytest

from moehive.expert_node import measure
from moehive.expert_node.__main__ import main
from moehive.expert_node.settings import Settings, default_name, default_state, parse_listen, parse_size, read_token
from moehive.expert_node.types import ConfigError
from moehive.kernels.library import NativeLibraryError
from moehive.proto.bounds import node_name
from moehive.proto.join_token import JoinToken

TOKEN = JoinToken("127.0.0.1:4711", bytes(range(16)), "ab" * 32)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("12GiB", 12 << 30), ("800M", 800_000_000), (" 1.5 TB", 1_500_000_000_000), ("7", 7), ("64 mib", 64 << 20)],
)
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1G", "1e9", "12 parsecs", "1.2.3G", "nan", "9" * 400, "9" * 20 + "T", "2000000T"]
)
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


def test_listen():
    assert parse_listen("10.0.0.2:0") == ("10.0.0.2", 0)
    assert parse_listen("[::1]:7000") == ("::1", 7000)
    for text in ("7000", "host:", "host:x", "host:70000", ":7000"):
        with pytest.raises(ConfigError):
            parse_listen(text)


@pytest.mark.parametrize(
    "wrong", [{"threads": 0}, {"memory_bytes": 0}, {"name": "No Such"}, {"advertise": "nowhere"}, {"threads": 10_000}]
)
def test_settings_are_checked(tmp_path, wrong):
    with pytest.raises(ConfigError):
        Settings(**{"state": tmp_path, "threads": 1, **wrong})


def test_token_sources(tmp_path, monkeypatch):
    assert read_token(None, None) is None
    file = tmp_path / "word"
    file.write_text(f" {TOKEN}\n")
    assert read_token(None, file) == TOKEN
    assert read_token(str(TOKEN), tmp_path / "missing") == TOKEN
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(None, tmp_path / "missing")
    with pytest.raises(ConfigError, match="not a join token"):
        read_token("hello", None)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert read_token(None, None) is None
    (tmp_path / "token").write_text(str(TOKEN))
    assert read_token(None, None) == TOKEN


def test_defaults(monkeypatch, tmp_path):
    for host, name in (("Box.lan", "box"), ("--_Ä9_--", "9"), ("___", "node"), ("a" * 80, "a" * 63)):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        assert default_name() == node_name(name)
    monkeypatch.setenv("STATE_DIRECTORY", f"{tmp_path}:/elsewhere")
    assert default_state() == tmp_path
    monkeypatch.delenv("STATE_DIRECTORY")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_state() == tmp_path / ".local/state/moehive/node"


def test_speed_is_measured_once(tmp_path, monkeypatch):
    speeds = iter([measure.Speed(n * 1e9, n * 1e10, n * 2e10) for n in (5, 6, 7)])
    monkeypatch.setattr(measure, "_measure", lambda threads: next(speeds))
    assert [measure.speed(tmp_path, 2) for _ in range(2)] == [(5e9, 5e10, 1e11)] * 2
    assert measure.speed(tmp_path, 4) == (6e9, 6e10, 1.2e11)  # other threads
    file = tmp_path / "speed.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"measured": kept["measured"] - measure.KEPT_SECONDS - 1}))
    assert measure.speed(tmp_path, 4) == (7e9, 7e10, 1.4e11)  # too old
    without = [json.dumps({key: kept[key] for key in kept if key != name}) for name in measure.Speed._fields]
    for damaged in ("", "[]", "{}", '{"processor": 1}', "\x00", *without):
        file.write_text(damaged)
        speeds = iter([measure.Speed(9e9, 9e10, 9e11)])
        assert measure.speed(tmp_path, 4) == (9e9, 9e10, 9e11)


def test_without_the_native_library_memory_alone_is_measured(monkeypatch):
    def missing(threads):
        raise NativeLibraryError("There is none.")

    monkeypatch.setattr(measure, "reading", missing)
    found = measure._measure(1)
    assert found.products_per_s == found.token_products_per_s == 0 < found.read_bandwidth < 1e13


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    monkeypatch.setenv("GRPC_EXPERIMENTS", "")  # main sets it if nobody has, and tests share this process


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        ([], 1, "`moehive token`"),
        (["--token", "nonsense"], 2, "not a join token"),
        (["--memory", "much"], 2, "not a size"),
        (["--listen", "here"], 2, "not an address"),
        (["--token-file", "/nowhere/token"], 2, "cannot be read"),
    ],
)
def test_a_failed_start_is_one_sentence(tmp_path, capsys, flags, code, sentence):
    assert main(["--state-dir", str(tmp_path / "s"), *flags]) == code
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error and len(error.strip().splitlines()) == 1


def test_state_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--state-dir", str(tmp_path / "file")]) == 1
    assert "--state-dir" in capsys.readouterr().err


def test_one_node_for_each_state_folder(tmp_path, capsys):
    from moehive.expert_node.files import lock_folder

    with lock_folder(tmp_path):
        assert main(["--state-dir", str(tmp_path)]) == 1
    assert "Another node runs" in capsys.readouterr().err
