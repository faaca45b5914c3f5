"""A node's resident memory: its experts once, and a bounded rest, while it loads, computes and after a restart."""

import asyncio
import signal
from pathlib import Path

import pytest
import torch

from moehive.coordinator.types import NodeName
from moehive.kernels.geometry import ExpertId, ExpertSpec, LayerGeometry, Manifest

A = NodeName("a")
SPEC = ExpertSpec(hidden_size=2048, intermediate_size=768, activation="silu", format="bf16")  # 9.4 MB
EXPERTS = 24  # 226 MB: the rest is the larger part


def peak_bytes(pid: int) -> int:
    """The largest resident size so far (VmHWM)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_peak_is_the_slice_and_200_mb(tmp_path, coordinator_class, authority, model_class, start_node, make_request):
    bits = torch.randint(0, 64, (2 * SPEC.nbytes,), dtype=torch.uint8)  # of numbers below 1
    blobs = {ExpertId(0, e): bits[e * 4096 : e * 4096 + SPEC.nbytes] for e in range(EXPERTS)}
    model = model_class(Manifest("random", "a" * 64, (LayerGeometry(EXPERTS, 2, SPEC),)), blobs)
    limit = int(1.05 * model.manifest.total_bytes) + 200 * 10**6

    async def compute(coordinator):
        prompt, _, _ = make_request(SPEC.hidden_size, list(range(EXPERTS)), tokens=256)
        prompt.epoch = coordinator.membership.state.epoch
        reply = await coordinator.compute(prompt)
        assert not reply.HasField("refusal"), reply.refusal

    async def main():
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority)
        node = start_node("--token", coordinator.token(), "--name", "a", "--memory", "500MiB")
        await coordinator.until_ready()
        await compute(coordinator)
        # What it says it holds is resident, so the bound is one on copies too.
        assert model.manifest.total_bytes < peak_bytes(node.pid) <= limit
        node.signal(signal.SIGKILL)
        await node.wait()
        await coordinator.until(lambda state: not state.nodes[A].present)
        again = start_node("--memory", "500MiB")
        await coordinator.until_ready()
        await compute(coordinator)
        assert model.manifest.total_bytes < peak_bytes(again.pid) <= limit
        await coordinator.stop()

    asyncio.run(main())
