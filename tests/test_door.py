"""`./run` and `./test`: what is missing is one sentence; set-up happens once, and never twice at the same time."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import IO

import pytest
from by_path import load

ROOT = Path(__file__).resolve().parent.parent
PYTHON = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what set-up reads, without a .venv, in a folder whose name has a space."""
    root = tmp_path / "a checkout"
    for folder in ("deploy", "kernels"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run", "test", "pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A PATH of its own: what the scripts need and nothing else, neither Python nor a compiler."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("dirname", "readlink"):
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    return folder


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def start(
    door: Path, tools: Path, *arguments: str, cwd: Path = Path("/"), **environment: str
) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a door."""
    done = subprocess.run(
        [str(door), *arguments],
        env={"PATH": str(tools), "HOME": "/nowhere", **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def one_sentence(result: tuple[int, str, str]) -> str:
    status, out, complaint = result
    assert (status, out) == (1, "")
    assert complaint.count("\n") == 1 and "Traceback" not in complaint, complaint
    return complaint.strip()


def patched_python(tools: Path, code: str) -> None:
    """A python3 that runs `code` before anything else."""
    (tools / "sitecustomize.py").write_text(code)
    script(tools / "python3", f"PYTHONPATH='{tools}' exec '{PYTHON}' \"$@\"")


@pytest.mark.parametrize("door", ["run", "test"])
def test_no_python(checkout: Path, tools: Path, door: str) -> None:
    assert "Python 3.11 or newer" in one_sentence(start(checkout / door, tools))


def test_only_an_old_python(checkout: Path, tools: Path) -> None:
    script(tools / "python3", "exit 1")  # what the version check of an older Python answers
    assert "Python 3.11 or newer" in one_sentence(start(checkout / "run", tools))


def test_a_python_that_is_not_called_python3(checkout: Path, tools: Path) -> None:
    script(tools / "python3", "exit 1")
    script(tools / f"python3.{sys.version_info.minor}", f"exec '{PYTHON}' \"$@\"")
    assert "C++ compiler" in one_sentence(start(checkout / "run", tools))


def test_no_venv_module(checkout: Path, tools: Path) -> None:
    # Debian's python3 without python3-venv has no ensurepip.
    patched_python(tools, "import sys\nsys.modules['ensurepip'] = None\nsys.path_importer_cache.clear()\n")
    script(tools / "c++", "exit 0")
    assert f"apt install python3.{sys.version_info.minor}-venv" in one_sentence(start(checkout / "run", tools))


def test_no_compiler(checkout: Path, tools: Path) -> None:
    script(tools / "python3", f"exec '{PYTHON}' \"$@\"")
    assert "needs a C++ compiler" in one_sentence(start(checkout / "test", tools))
    script(tools / "g++", "exit 0")
    assert "CXX names (icpx)" in one_sentence(start(checkout / "test", tools, CXX="icpx -O2"))


def test_not_enough_disk_space(checkout: Path, tools: Path) -> None:
    patched_python(tools, "import shutil\nshutil.disk_usage = lambda p: type('Usage', (), {'free': 1_200_000_000})\n")
    script(tools / "c++", "exit 0")
    sentence = one_sentence(start(checkout / "run", tools))
    assert "1.2 GB of free disk space" in sentence and "needs about 4.7 GB" in sentence


def test_no_registry(checkout: Path, tools: Path) -> None:
    script(tools / "python3", f"exec '{PYTHON}' \"$@\"")
    script(tools / "c++", "exit 0")
    nowhere = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
    status, out, complaint = start(checkout / "run", tools, cwd=Path("/"), **nowhere)
    assert (status, out) == (1, "")
    assert "The package registry cannot be reached" in complaint.splitlines()[-1]
    assert "Traceback" not in complaint


@pytest.fixture
def set_up(checkout: Path) -> ModuleType:
    """deploy/set_up.py of the copy, as a module."""
    return load(checkout / "deploy" / "set_up.py")


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "is full"),
        ("CMake Error at CMakeLists.txt:2 (project):\n  No CMAKE_CXX_COMPILER could be found.", "did not compile"),
        ("WARNING: Retrying … NewConnectionError\nERROR: No matching distribution found for x", "cannot be reached"),
        ("ERROR: No matching distribution found for torch==2.13.0", "has no torch of the version"),
        (
            "ERROR: Cannot install cmake because these package versions have conflicting",
            "has no cmake of the version",
        ),
        ("Killed", "pip failed: "),
    ],
)
def test_why_pip_failed(set_up: ModuleType, log: str, sentence: str) -> None:
    assert sentence in set_up.explain(log, Path("/checkout"))


class Installer:
    """Stands for the minutes of pip: leaves a .venv that looks whole, counts, can wait and can fail."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[str] = []
        self.found_whole: list[bool] = []
        self.meanwhile: Callable[[], object] = lambda: None

    def __call__(self, root: Path, extra: str, log: IO[str]) -> None:
        binaries = root / ".venv" / "bin"
        self.calls.append(extra)
        self.found_whole.append(binaries.exists())
        binaries.mkdir(parents=True, exist_ok=True)
        if not (binaries / "python").exists():
            (binaries / "python").symlink_to(PYTHON)
        (binaries / "pip").write_text(f"#!{binaries}/python\n")
        self.meanwhile()


@pytest.fixture
def installer(set_up: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Installer:
    made = Installer(checkout)
    monkeypatch.setattr(set_up, "install", made)
    monkeypatch.setattr(set_up, "check_machine", lambda root: None)
    return made


def test_the_second_time_does_nothing(set_up: ModuleType, installer: Installer) -> None:
    set_up.set_up(installer.root, "coordinator")
    set_up.set_up(installer.root, "coordinator")
    assert installer.calls == ["coordinator"]
    set_up.set_up(installer.root, "dev")
    set_up.set_up(installer.root, "dev")
    assert installer.calls == ["coordinator", "dev"]
    set_up.set_up(installer.root, "coordinator")  # dev includes it
    assert installer.calls == ["coordinator", "dev"]


@pytest.mark.parametrize(
    "changed", ["pyproject.toml", "deploy/constraints.txt", "CMakeLists.txt", "kernels/cpu/expert_mlp.cc"]
)
def test_a_change_sets_up_again_in_place(set_up: ModuleType, installer: Installer, changed: str) -> None:
    set_up.set_up(installer.root, "dev")
    with (installer.root / changed).open("a") as file:
        file.write("\n")
    set_up.set_up(installer.root, "dev")
    assert installer.found_whole == [False, True]


def test_an_interrupted_set_up_begins_anew(set_up: ModuleType, installer: Installer) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    installer.meanwhile = interrupt
    with pytest.raises(KeyboardInterrupt):
        set_up.set_up(installer.root, "coordinator")
    installer.meanwhile = lambda: None
    set_up.set_up(installer.root, "coordinator")
    set_up.set_up(installer.root, "coordinator")
    assert installer.found_whole == [False, False]


def test_a_moved_checkout_sets_up_again(set_up: ModuleType, installer: Installer) -> None:
    set_up.set_up(installer.root, "coordinator")
    moved = installer.root.rename(installer.root.with_name("elsewhere"))
    set_up.set_up(moved, "coordinator")
    assert installer.calls == ["coordinator"] * 2


def test_two_at_the_same_time_set_up_once(
    set_up: ModuleType, installer: Installer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = threading.Event()
    real_say = set_up.say

    def say(text: str) -> None:
        real_say(text)
        if "waiting for it" in text:
            waits.set()

    monkeypatch.setattr(set_up, "say", say)
    second = threading.Thread(target=set_up.set_up, args=(installer.root, "coordinator"))

    def other_one_comes() -> None:
        second.start()
        assert waits.wait(30)  # it has found the lock taken

    installer.meanwhile = other_one_comes
    set_up.set_up(installer.root, "coordinator")
    second.join(30)
    assert not second.is_alive()
    assert installer.calls == ["coordinator"]


def test_arguments_and_folder_reach_the_command(
    set_up: ModuleType, installer: Installer, checkout: Path, tools: Path, tmp_path: Path
) -> None:
    set_up.set_up(checkout, "dev")
    script(tools / "python3", f"exec '{PYTHON}' \"$@\"")
    tell = 'printf "%s|" "$PWD" "$@"'
    script(checkout / ".venv" / "bin" / "moehive", tell)
    (checkout / ".venv" / "bin" / "python").unlink()
    script(checkout / ".venv" / "bin" / "python", tell)
    link = tmp_path / "moehive"
    link.symlink_to(checkout / "run")
    for door in (checkout / "run", link):
        answer = start(door, tools, "chat", "two words", "", cwd=tmp_path)
        assert answer == (0, f"{tmp_path}|chat|two words||", "")
    answer = start(checkout / "test", tools, "-k", "a or b", cwd=tmp_path)
    assert answer == (0, f"{checkout}|-m|pytest|-k|a or b|", "")
