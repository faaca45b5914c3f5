"""Every command that README.md and docs/models.md show exists, with these options."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from moehive.coordinator.cli.main import app

ROOT = Path(__file__).resolve().parents[2]


def commands(document: str) -> list[list[str]]:
    """The words after `moehive`, of each line of the shell's blocks."""
    text = (ROOT / document).read_text()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    found = [shlex.split(line, comments=True) for line in lines if line.startswith(("moehive ", "./run "))]
    return [words[1:] for words in found]


@pytest.mark.parametrize("document", ["README.md", "docs/models.md"])
def test_documented_commands_exist(document: str) -> None:
    shown = commands(document)
    assert shown
    for words in shown:
        command, options = typer.main.get_command(app), [w.partition("=")[0] for w in words if w.startswith("-")]
        for word in words:
            inner = getattr(command, "commands", None)
            if inner is None:
                break
            assert word in inner, f"moehive {' '.join(words)}"
            command = inner[word]
        if command.name == "node":  # passes its options on
            called = [sys.executable, "-m", "moehive.expert_node", "--help"]
            known = set(re.findall(r"--[a-z-]+", subprocess.run(called, capture_output=True, text=True).stdout))
        else:
            known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert set(options) <= known, f"moehive {' '.join(words)}"
