"""A node's resident memory: its experts once, and a bounded rest, while it loads, computes and after a restart."""

import asyncio
import signal
from pathlib import Path

import pytest
import torch

from moehive.coordinator.dispatch.link import Link
from moehive.coordinator.types import NodeName
from moehive.kernels.geometry import ExpertId, ExpertSpec, LayerGeometry, Manifest
from moehive.proto import experts_pb2 as pb
from moehive.proto.channel import node_dns_name
from moehive.proto.tensors import head_bytes, routing_bytes, write_head
from moehive.proto.wire.channel import Channel

A = NodeName("a")
# The rest of a node's memory is about as large as either slice: 24 experts of 9.4 MB, 6 of 24.8 MB. The second one's
# hidden states are wide, and a prompt's piece of 512 tokens is 15 MB of them: its sums must not be as many beside it.
USUAL = ExpertSpec(hidden_size=2048, intermediate_size=768, activation="silu", format="bf16"), 24, 256
WIDE = ExpertSpec(hidden_size=7168, intermediate_size=2048, activation="silu", format="q4_0"), 6, 512


def peak_bytes(pid: int) -> int:
    """The largest resident size so far (VmHWM)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(("spec", "experts", "tokens"), [USUAL, WIDE], ids=["usual", "wide"])
def test_peak_is_the_slice_and_200_mb(
    tmp_path, coordinator_class, authority, model_class, start_node, make_request, spec, experts, tokens
):
    bits = torch.randint(0, 64, (2 * spec.nbytes,), dtype=torch.uint8)  # of numbers below 1
    blobs = {ExpertId(0, e): bits[e * 4096 : e * 4096 + spec.nbytes] for e in range(experts)}
    model = model_class(Manifest("random", "a" * 64, (LayerGeometry(experts, 2, spec),)), blobs)
    limit = int(1.05 * model.manifest.total_bytes) + 200 * 10**6

    async def compute(coordinator):
        """As a coordinator asks for a prompt's piece: states are sent, and read, where they lie."""
        _, hidden, routing = make_request(spec.hidden_size, list(range(experts)), tokens=tokens)
        prompt = pb.ComputeRequest(epoch=coordinator.membership.state.epoch, reduction=pb.REDUCTION_PARTIAL_SUM)
        states = write_head(prompt, hidden)
        address = coordinator.membership.state.nodes[A].capacity.address
        channel = Channel(address, coordinator.server.identity(), node_dns_name(A))
        link = Link(A, address, channel, on_close=lambda: None)
        await link.open()
        pieces = head_bytes(prompt, len(states)), states, routing_bytes(routing)
        reply = await link.send(pieces, len(states))
        assert len(reply.values) == states.nbytes, reply.head.refusal
        await link.close("The test is over.")

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
