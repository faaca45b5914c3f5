"""A chain of real node processes: the star's sums, also while a node in its middle dies or hangs."""

import asyncio
import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from moehive.coordinator.bench.certificates import write_certificates
from moehive.coordinator.bench.peers import Peer
from moehive.coordinator.dispatch import chain
from moehive.coordinator.dispatch.dispatcher import Dispatcher
from moehive.coordinator.dispatch.link import Link
from moehive.coordinator.dispatch.speed import LinkSpeed
from moehive.coordinator.dispatch.speeds import NodeSpeed
from moehive.coordinator.types import NodeName, Plan
from moehive.kernels.geometry import ExpertSpec, LayerGeometry, Manifest
from moehive.kernels.ops import Reduction
from moehive.proto.channel import Identity, node_dns_name
from moehive.proto.wire.channel import Channel

EXPERTS, TOP_K, HIDDEN, CHUNK = 16, 8, 256, 512
LAYER = {"hidden_size": HIDDEN, "intermediate_size": 64, "activation": "silu", "format": "f32"}
MANIFEST = Manifest("bench", "0" * 64, (LayerGeometry(EXPERTS, TOP_K, ExpertSpec(**LAYER)),))  # type: ignore[arg-type]
NAMES = tuple(NodeName(f"n{i}") for i in range(4))


class SlowSpeed(LinkSpeed):
    """A slow link that keeps its bits, so that sums can be compared."""

    slow = True
    round_trip_s = 1e-5
    s_per_byte = 1e-7
    late_s = 0.0

    def eight_bit(self, nbytes: int) -> bool:
        return False


class Nodes:
    """Four processes, each with all experts."""

    def __init__(self, folder: Path) -> None:
        write_certificates(folder, len(NAMES))
        self.folder = folder

        def start(name: str) -> Peer:
            layer = {**LAYER, "experts": EXPERTS}
            config = {"layers": [layer], "held": list(range(EXPERTS)), "threads": 1, "tls": str(folder / name)}
            return Peer("moehive.expert_node.bench_node", json.dumps(config))

        with ThreadPoolExecutor() as pool:
            self.peers = dict(zip(NAMES, pool.map(start, NAMES), strict=True))

    async def dispatcher(self) -> Dispatcher:
        tls = self.folder / "coordinator"
        identity = Identity(*((tls / name).read_bytes() for name in ("key.pem", "chain.pem", "ca.pem")))
        dispatcher = Dispatcher(MANIFEST, None, Reduction.PARTIAL_SUM, wait_seconds=20)

        def lost(name: NodeName) -> None:
            link = dispatcher.link(name)
            assert link is not None
            dispatcher.disconnect(link)

        for name, peer in self.peers.items():
            address = f"127.0.0.1:{peer.greeting['tls']}"
            channel = Channel(address, identity, node_dns_name(name))
            link = Link(name, address, channel, on_close=lambda name=name: lost(name))
            link.speed = SlowSpeed(loopback=False)
            await link.open()
            dispatcher.connect(link)
        owners = tuple((NAMES[e % 4], NAMES[(e + 1) % 4]) for e in range(EXPERTS))
        dispatcher.follow(Plan(1, (owners,)))
        return dispatcher

    def signal(self, name: NodeName, number: int) -> None:
        self.peers[name]._process.send_signal(number)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path)
    yield made
    for name, peer in made.peers.items():
        made.signal(name, signal.SIGKILL)
        peer.end()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(CHUNK)])
    return torch.randn(CHUNK, HIDDEN, generator=generator), ids, torch.rand(CHUNK, TOP_K, generator=generator)


def test_a_chain_of_processes_and_what_breaks_it(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        dispatcher = await nodes.dispatcher()
        chains = dispatcher.chains
        chains.always = False
        # As quick as each other, whatever else the machine does: so each has a share of every piece, and nobody is
        # late before one hangs.
        monkeypatch.setattr(NodeSpeed, "read_s_per_byte", 1e-10)
        monkeypatch.setattr(chain, "FIRST_SECONDS", 60.0)
        monkeypatch.setattr(chain, "SLACK_SECONDS", 60.0)
        right = await dispatcher.submit(0, *inputs())
        requests = {name: dispatcher.counters[name].requests for name in NAMES}

        async def same() -> None:
            torch.testing.assert_close(await dispatcher.submit(0, *inputs()), right, rtol=1e-4, atol=1e-4)

        chains.always = True
        for _ in range(3):
            await same()
        assert not chains._rests  # it was a chain, and held
        pieces = dispatcher.counters[NAMES[3]].requests - requests[NAMES[3]]
        assert pieces > 3 * 3

        monkeypatch.setattr(chain, "SLACK_SECONDS", 0.3)
        nodes.signal(NAMES[1], signal.SIGSTOP)  # it hangs with the chunk in hand
        await same()
        assert chains._rests.keys() == set(NAMES)  # who of them it was, nobody has said
        monkeypatch.setattr(chain, "SLACK_SECONDS", 60.0)
        nodes.signal(NAMES[1], signal.SIGCONT)
        chains._rests.clear()
        while not dispatcher._routes.asking.live(False) >= set(NAMES):
            await dispatcher._routes.change()  # it answers its probe
        await same()
        assert not chains._rests

        nodes.signal(NAMES[2], signal.SIGSTOP)
        waiting = asyncio.ensure_future(same())
        await asyncio.sleep(0)  # its messages have left
        nodes.signal(NAMES[2], signal.SIGKILL)
        await waiting
        assert chains._rests.keys() == {NAMES[2]}  # the node before it has said so
        await same()
        for name in NAMES:
            if (link := dispatcher.link(name)) is not None:
                await link.close("The test is over.")

    asyncio.run(asyncio.wait_for(main(), 60))
