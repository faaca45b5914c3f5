"""The bars of `moehive up` while nodes load their slices."""

import re
from concurrent.futures import Future
from threading import Event
from types import SimpleNamespace

import pytest

from moehive.coordinator.cli import loading


class Loading:
    """A cluster whose node has a third more of its slice whenever it is looked at; it has `started` with the last."""

    def __init__(self, started: "Future[None]") -> None:
        self.coordinator = self
        self.cluster_open = Event()
        self.cluster_open.set()
        self._started = started
        self._loaded = 0

    def status(self) -> SimpleNamespace:
        self._loaded += 3 * 10**9
        if self._loaded == 9 * 10**9:
            self._started.set_result(None)
            return SimpleNamespace(nodes=[])
        idle = SimpleNamespace(name="idle", load_bytes=0, load_total_bytes=0)
        busy = SimpleNamespace(name="busy", load_bytes=self._loaded, load_total_bytes=9 * 10**9)
        return SimpleNamespace(nodes=[idle, busy])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "POLL_SECONDS", 0.01)
    monkeypatch.setenv("COLUMNS", "120")


def test_a_terminal_shows_bytes_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    started: Future[None] = Future()
    loading.wait_started(started, Loading(started))  # type: ignore[arg-type]
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert re.search(r"busy +\S+ +6\.0/9\.0 GB +[\d.]+ [kMGTP]?B/s +\d:\d\d:\d\d", shown), shown
    assert "idle" not in shown


def test_what_ends_the_start_is_raised(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    started: Future[None] = Future()
    started.set_exception(TimeoutError("The nodes have not come."))
    for terminal in ("", "1"):
        monkeypatch.setenv("FORCE_COLOR", terminal)
        with pytest.raises(TimeoutError, match="have not come"):
            loading.wait_started(started, Loading(started))  # type: ignore[arg-type]
