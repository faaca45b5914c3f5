"""sd_notify over real datagram sockets, as systemd opens them."""

import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from moehive.proto.sd_notify import notify, watchdog_interval


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """The service manager's end of the socket; NOTIFY_SOCKET points to it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.settimeout(10)
        if request.param == "path":
            name = str(tmp_path / "notify")
            receiver.bind(name)
        else:
            name = f"@moehive-test-{os.getpid()}-{tmp_path.name}"
            receiver.bind("\0" + name[1:])
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield receiver


def test_each_message_arrives(manager: socket.socket) -> None:
    assert notify(ready=True, status="3 nodes,\nall experts held")
    assert manager.recv(4096) == b"READY=1\nSTATUS=3 nodes, all experts held"
    assert notify(watchdog=True)
    assert manager.recv(4096) == b"WATCHDOG=1"
    assert notify(stopping=True, status="draining")
    assert manager.recv(4096) == b"STOPPING=1\nSTATUS=draining"
    assert notify(status="Läuft")
    assert manager.recv(4096).decode() == "STATUS=Läuft"


def test_nothing_to_say_is_a_mistake(manager: socket.socket) -> None:
    with pytest.raises(ValueError, match="something to say"):
        notify()


def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify(ready=True)


@pytest.mark.parametrize("name", ["/nowhere/notify", "vsock:2:1234"])
def test_a_socket_that_is_not_there_is_logged(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    with caplog.at_level(logging.WARNING):
        assert not notify(ready=True)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("allowed", "watched", "seconds"),
    [
        ("30000000", "self", 15.0),
        ("500000", None, 0.25),
        ("30000000", "1", None),  # the watched process is another one
        ("0", "self", None),
        ("soon", "self", None),
        (None, "self", None),
    ],
)
def test_watchdog_interval(
    allowed: str | None, watched: str | None, seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WATCHDOG_USEC", allowed), ("WATCHDOG_PID", watched)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, str(os.getpid()) if value == "self" else value)
    assert watchdog_interval() == seconds
