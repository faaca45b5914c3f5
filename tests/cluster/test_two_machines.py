"""The README's commands on two hosts of one network: namespaces of this machine, joined by a cable."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MOEHIVE = [sys.executable, "-m", "moehive.coordinator.cli.main"]
COORDINATOR, NODE = "10.77.0.1", "10.77.0.2"
DEADLINE = 90.0  # seconds; only a broken cluster takes so long


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """The names of two namespaces, the coordinator's and the node's."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    names = tuple(f"moehive-{os.getpid()}-{side}" for side in ("c", "n"))
    made: list[str] = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr}")
        for name, address in zip(names, (COORDINATOR, NODE), strict=True):
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
        # As at home, where every machine has a way out: it is how one finds its own address.
        ip("-n", names[0], "route", "add", "default", "via", NODE)
        yield names[0], names[1]
    finally:
        for name in made:
            ip("netns", "del", name)


def test_init_coordinator_token_node_status(
    hosts: tuple[str, str], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    state = ["--state-dir", str(tmp_path / "c")]
    log = (tmp_path / "log").open("w+")

    def run(host: str, *arguments: str) -> str:
        command = ["ip", "netns", "exec", host, *MOEHIVE, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False).stdout

    def start(host: str, *arguments: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(["ip", "netns", "exec", host, *MOEHIVE, *arguments], stdout=log, stderr=log)

    def until(done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE
        while not done():
            assert time.monotonic() < deadline, f"{what}: {Path(log.name).read_text()}"

    run(hosts[0], "init", *state)
    model = str(checkpoint("mixtral"))
    coordinator = start(hosts[0], "coordinator", *state, "--model", model, "--cluster-host", "0.0.0.0")
    node = None
    try:
        until(lambda: "Clients:" in Path(log.name).read_text() or coordinator.poll() is not None, "no coordinator")
        token = run(hosts[0], "token", *state).strip()
        node = start(hosts[1], "node", "--token", token, "--name", "laptop", "--state-dir", str(tmp_path / "n"))
        until(lambda: '"ready": true' in run(hosts[0], "status", "--json"), "the node did not join")
        status = json.loads(run(hosts[0], "status", "--json"))
        (laptop,) = status["nodes"]
        assert (laptop["name"], laptop["state"]) == ("laptop", "ready")
        assert laptop["address"].startswith(f"{NODE}:") and laptop["experts_held"] > 0
    finally:
        codes = []
        for process in (node, coordinator):
            if process is not None:
                process.send_signal(signal.SIGTERM)
                codes.append(process.wait(DEADLINE))
    assert codes == [0, 0]
