"""Bars of bytes in terminals of any width."""

import io
import re

import pytest
from rich.console import Console

from moehive.coordinator.cli.progress import byte_bar, byte_bars

NAME = "UD-Q2_K_XL/Qwen3.5-397B-A17B-UD-Q2_K_XL-00001-of-00005.gguf"


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_long_name_leaves_room_for_the_numbers(width: int) -> None:
    bars = byte_bars()
    bars.update(bars.add_task(NAME, total=130_500_000_000), completed=34_100_000_000)
    terminal = Console(file=io.StringIO(), width=width)
    with terminal.capture() as shown:
        terminal.print(bars.get_renderable())
    (line,) = shown.get().splitlines()
    assert re.fullmatch(r"UD-Q2.* 34\.1/130\.5 GB \? -:--:-- *", line) and (NAME in line) == (width == 200)


@pytest.mark.parametrize("terminal", ["", "1"])
def test_nothing_is_left_of_what_never_began(
    terminal: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", terminal)
    with pytest.raises(FileNotFoundError), byte_bar("org/none", quiet=False) as bar:
        bar(0, None)
        raise FileNotFoundError
    shown = capsys.readouterr().err
    assert ("org/none" in shown) == bool(terminal)  # while it was waited for
    assert "org/none" not in re.split(r"\r|\n|\x1b\[2K", shown)[-1]
    with byte_bar("org/one", quiet=False) as bar:
        bar(0, None)
        bar(2_000_000, 2_000_000)
    assert re.search(r"org/one.*2\.0/2\.0.*MB", capsys.readouterr().err)
