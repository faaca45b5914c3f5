"""Every command that README.md and docs/ show exists, with these options, and so does every file that they name."""

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from moehive.coordinator.cli.main import app
from moehive.coordinator.cli.serve import NODE_COMMANDS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]
OTHERS = {"convert_hf_to_gguf.py"}  # llama.cpp's
BLOCK = re.compile(r"```.*?```", re.DOTALL)


def commands(document: str) -> list[list[str]]:
    """The words after `moehive`, of each line of the shell's blocks and of what stands within a sentence."""
    text = (ROOT / document).read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"`(moehive\s[^`]+)`", BLOCK.sub("", text))]
    found = [shlex.split(line, comments=True) for line in lines if line.startswith(("moehive ", "./run "))]
    return [[word.strip("[]") for word in words[1:] if word != "…"] for words in found]


@functools.cache
def node_options() -> set[str]:
    """Of `moehive node`, which passes its options on."""
    called = [sys.executable, "-m", "moehive.expert_node", "--help"]
    return set(re.findall(r"--[a-z-]+", subprocess.run(called, capture_output=True, text=True, check=True).stdout))


def test_commands_are_found() -> None:
    assert sum(len(commands(document)) for document in DOCUMENTS) > 100


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documented_commands_exist(document: str) -> None:
    for words in commands(document):
        command, options = typer.main.get_command(app), [w.partition("=")[0] for w in words if w.startswith("-")]
        for word in words:
            inner = getattr(command, "commands", None)
            if inner is None or word == "--help":
                break
            assert word in inner, f"moehive {' '.join(words)}"
            command = inner[word]
        if command.name == "node" and len(words) > 1 and not words[1].startswith("-"):
            assert words[1] in NODE_COMMANDS, f"moehive {' '.join(words)}"
            known = {"--state-dir"}
        elif command.name == "node":
            known = node_options()
        else:
            known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert set(options) <= known, f"moehive {' '.join(words)}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document: str) -> None:
    folders = ("coordinator", "expert_node", "kernels", "proto", "tests", "deploy", "docs")
    files = ["/" + file.relative_to(ROOT).as_posix() for folder in folders for file in (ROOT / folder).rglob("*")]
    for named in re.findall(r"`([\w./-]+\.(?:py|h|cc|proto|md|svg)|\w+/[\w/]+/)`", (ROOT / document).read_text()):
        assert named in OTHERS or any(file.endswith("/" + named.rstrip("/")) for file in files), named
