"""`moehive up`: one process that answers clients, real nodes beside it, and nothing left when it ends."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil

from moehive.client import Client
from moehive.coordinator.local_cluster import folder_name, own_folder

PROMPT = [3, 1, 4, 1, 5]


def test_a_cluster_is_killed_then_started_again_then_ended(up: Any, moehive: Any, tiny_moe: Path, home: Path) -> None:
    arguments = ["--model", str(tiny_moe), "--nodes", "2", "--port", "0", "--http-port", "0"]
    running = up(*arguments)
    assert running.ready["pid"] == running.process.pid
    assert len(running.nodes) == 2
    # On the coordinator's machine nodes wait for their turn.
    assert [os.sched_getscheduler(node.pid) for node in running.nodes] == [os.SCHED_BATCH] * 2
    with Client(running.address) as client:
        wanted = client.generate(token_ids=PROMPT, max_tokens=8, temperature=0).token_ids
    assert len(wanted) == 8
    running.process.kill()
    assert running.nodes_left(20) == []

    running = up(*arguments)  # nodes join anew and find their experts in their caches
    (folder,) = (home / "up").iterdir()
    assert "from the disk cache" in (folder / "logs" / "node-1.log").read_text()
    status = json.loads(moehive("status", "--address", running.address, "--json").stdout)
    assert status["ready"] and [node["name"] for node in status["nodes"]] == ["node-1", "node-2"]
    assert "node-2" in moehive("status", "--address", running.address).stdout
    with Client(running.address) as client:
        assert client.generate(token_ids=PROMPT, max_tokens=8, temperature=0).token_ids == wanted
        running.nodes[0].kill()
        psutil.wait_procs(running.nodes[:1])
        wait_for_ready(client, False)
        wait_for_ready(client, True)  # the node was started again
        assert client.generate(token_ids=PROMPT, max_tokens=8, temperature=0).token_ids == wanted
    running.nodes = psutil.Process(running.process.pid).children(recursive=True)
    assert len(running.nodes) == 2
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(timeout=20) == 0
    assert running.nodes_left(0) == []


def wait_for_ready(client: Client, ready: bool) -> None:
    """Asks until the cluster is ready, or is not; the test's own time limit ends it."""
    while client.status().ready is not ready:
        time.sleep(0.1)  # so as not to take the cores from the node that starts


def test_each_running_cluster_has_a_folder_of_its_own(tmp_path: Path) -> None:
    base = tmp_path / "up" / folder_name("org/model", 3)
    with own_folder(base) as first, own_folder(base) as second:
        assert (first.name, second.name) == (base.name, f"{base.name}-2")
    with own_folder(base) as again:
        assert again == first


def test_folder_names_tell_models_and_node_counts_apart(tmp_path: Path) -> None:
    names = {folder_name(model, nodes) for model in ("a/model", "b/model", str(tmp_path)) for nodes in (1, 2)}
    assert len(names) == 6
    assert all(name.replace("-", "").replace("_", "").replace(".", "").isalnum() for name in names)
