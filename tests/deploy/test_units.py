"""The systemd units: accepted by systemd without a word, hardened, and pointing at what there is."""

import configparser
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from moehive.coordinator.settings import CoordinatorSettings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
UNITS = ("moehive-coordinator.service", "moehive-node.service")
INSTALLED = "/opt/moehive/.venv/bin/moehive"
MAX_EXPOSURE = 2.0  # of 10, as `systemd-analyze security` counts

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60)


def copied(name: str, gpu: bool, folder: Path) -> Path:
    """A unit, with what it needs for a GPU if asked."""
    unit = folder / name
    unit.write_text((DEPLOY / name).read_text() + ((DEPLOY / "gpu.conf").read_text() if gpu else ""))
    return unit


@needs_systemd
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("name", UNITS)
def test_verify_has_nothing_to_say(name: str, gpu: bool, tmp_path: Path) -> None:
    # verify wants the programs to be there, so the copy names one of this machine.
    unit = copied(name, gpu, tmp_path)
    text = unit.read_text()
    assert INSTALLED in text
    for program in (INSTALLED, "/usr/bin/nvidia-modprobe"):
        text = text.replace(program, str(shutil.which("true")))
    unit.write_text(text)
    found = analyze("verify", str(unit))
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


@needs_systemd
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("name", UNITS)
def test_exposure(name: str, gpu: bool, tmp_path: Path) -> None:
    found = analyze("security", "--offline=true", "--no-pager", str(copied(name, gpu, tmp_path)))
    level = re.search(r"Overall exposure level for \S+: ([\d.]+)", found.stdout)
    assert level is not None, found.stdout + found.stderr
    assert float(level[1]) <= MAX_EXPOSURE, found.stdout


@needs_systemd
@pytest.mark.parametrize("name", UNITS)
def test_threads_may_be_bound_and_a_node_may_wait_for_its_turn(name: str) -> None:
    allowed: set[str] = set()
    for line in (DEPLOY / name).read_text().splitlines():  # one after the other, as systemd takes them
        if not line.startswith("SystemCallFilter="):
            continue
        words = line.removeprefix("SystemCallFilter=")
        calls = {call for word in words.lstrip("~").split() for call in system_calls(word)}
        allowed = allowed - calls if words.startswith("~") else allowed | calls
    wanted = {"sched_setaffinity"} | ({"sched_setscheduler"} if "node" in name else set())
    assert allowed & system_calls("@resources") == wanted
    assert {"read", "sched_yield", "futex"} <= allowed and "mount" not in allowed


def system_calls(word: str) -> set[str]:
    """What a word of a filter stands for; groups name other groups."""
    if not word.startswith("@"):
        return {word}
    listed = analyze("syscall-filter", word).stdout.splitlines()[1:]
    words = [line.strip() for line in listed if line.startswith(" ") and not line.strip().startswith("#")]
    return {call for one in words for call in system_calls(one)}


@pytest.mark.parametrize("name", UNITS)
def test_what_a_supervised_service_needs(name: str) -> None:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((DEPLOY / name).read_text())
    service = parser["Service"]
    assert service["Type"] == "notify" and service["NotifyAccess"] == "main"
    assert int(service["WatchdogSec"]) >= 10
    assert service["Restart"] == "on-failure" and "StartLimitBurst" in parser["Unit"]
    # What a GPU's kernels are compiled into must be writable, whatever home the user has.
    environment = re.findall(r"^Environment=TRITON_CACHE_DIR=%C/(\w+)/", (DEPLOY / name).read_text(), re.MULTILINE)
    assert environment == [service["CacheDirectory"]]
    state = service["StateDirectory"]
    assert f"--state-dir %S/{state}" in service["ExecStart"].split(" $")[0]
    if "node" in name:
        assert service["LoadCredential"].startswith("token:/")


def test_the_settings_that_the_document_names_are_there() -> None:
    document = (ROOT / "docs" / "systemd.md").read_text()
    names = {name.lower() for name in re.findall(r"MOEHIVE_COORDINATOR_([A-Z_]+)", document)}
    assert {"model", "cluster_host"} <= names <= {field.name for field in fields(CoordinatorSettings)}
    options = re.search(r"MOEHIVE_NODE_OPTIONS=(.*)", document)
    assert options is not None
    command = [sys.executable, "-m", "moehive.expert_node", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/").stdout
    assert set(re.findall(r"--[a-z-]+", options[1])) <= set(re.findall(r"--[a-z-]+", shown))
