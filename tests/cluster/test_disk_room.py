"""What commands say of the room of a real cluster whose node keeps experts on its disk."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from moehive.client import Client, Status
from moehive.coordinator.checkpoints.opening import open_model
from moehive.coordinator.estimate.cluster import Tier, read_cluster
from moehive.coordinator.estimate.constants import NODE_BYTES

MEMORY_BYTES, DISK_BYTES = 2 << 20, 4 << 20


def mixtral(folder: Path, intermediate: int) -> Path:
    """A random one of 16 experts, each of 64 times `intermediate`, in f32."""
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=64, intermediate_size=intermediate, num_hidden_layers=2, num_local_experts=8,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, eos_token_id=None,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def measured(client: Client) -> Status:
    """The status once the node has said how fast it reads its disk; the test's own time limit ends it."""
    client.generate(token_ids=[1, 2, 3], max_tokens=4, temperature=0)
    while not (status := client.status()).nodes[0].disk_bandwidth:
        time.sleep(0.1)  # the next heartbeat says so
    return status


def test_a_disk_is_in_the_status_in_cluster_toml_and_among_what_models_fit_into(
    new_cluster: Callable[[], Any], ask: Any, tmp_path: Path
) -> None:
    shelf = tmp_path / "models"
    model = mixtral(shelf / "served", 320)
    mixtral(shelf / "larger", 2048)
    total = open_model(str(model)).manifest.total_bytes
    assert MEMORY_BYTES < total < MEMORY_BYTES + DISK_BYTES
    file = tmp_path / "cluster.toml"

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        environment = os.environ | {"HF_HOME": str(tmp_path / "hub"), "COLUMNS": "200", "NO_COLOR": "1"}
        command = [sys.executable, "-m", "moehive.coordinator.cli.main", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)

    async def main() -> None:
        cluster = new_cluster()
        cluster.room = ["--memory", str(MEMORY_BYTES), "--disk", str(DISK_BYTES)]
        async with cluster.coordinator(model, 1) as coordinator:
            status: Status = await ask(coordinator, measured)
            (node,) = status.nodes
            assert (node.ram_bytes, node.disk_bytes, node.vram_bytes) == (MEMORY_BYTES, DISK_BYTES, 0)
            address = ["--address", f"127.0.0.1:{coordinator.grpc_port}"]

            written = await asyncio.to_thread(run, "status", *address, "--cluster-file", str(file))
            assert written.returncode == 0, written.stderr
            assert f"{file} is written: 2 machines." in written.stderr and "was not measured" not in written.stderr
            own, other = read_cluster(file).machines
            assert (own.name, own.coordinator) == ("coordinator", True)
            # Most of this disk, which was measured now; the node's part of it is the node's.
            assert own.disk is not None and own.disk.bytes_per_s > 0
            assert 0 < own.disk.nbytes < shutil.disk_usage(tmp_path).total
            assert "could give" in written.stderr
            assert other.ram == Tier(MEMORY_BYTES + NODE_BYTES, node.read_bandwidth)
            assert other.disk == Tier(DISK_BYTES, node.disk_bandwidth)
            assert own.products_per_s is not None and other.products_per_s == node.products_per_s > 0
            assert own.token_products_per_s is not None
            assert other.token_products_per_s == node.token_products_per_s > 0

            listed = await asyncio.to_thread(run, "models", str(shelf), *address, "--json")
            assert listed.returncode == 0, listed.stderr
            found = json.loads(listed.stdout)
            assert (found["memory_bytes"], found["disk_bytes"], found["nodes"]) == (MEMORY_BYTES, DISK_BYTES, 1)
            fits = {Path(row["name"]).name: row["fits"] for row in found["models"]}
            assert fits == {"served": True, "larger": False}
            told = (await asyncio.to_thread(run, "models", str(shelf), *address)).stdout
            assert f"yes, {(total - MEMORY_BYTES) / 1e6:.1f} MB of it on disks" in told
            assert "more memory is needed" in told and "(1 nodes of the cluster)" in told

    asyncio.run(main())
