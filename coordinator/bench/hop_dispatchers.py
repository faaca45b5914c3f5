"""The coordinator's real dispatchers to a measurement's nodes, and the time that a layer takes by each."""

from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

from moehive.kernels.geometry import ExpertSpec, LayerGeometry, Manifest
from moehive.kernels.ops import Reduction
from moehive.proto.channel import Identity, node_dns_name
from moehive.proto.wire.channel import Channel

from ..dispatch.dispatcher import Dispatcher
from ..dispatch.link import Link
from ..dispatch.speed import LinkSpeed
from ..types import NodeName, Plan
from .hop_case import LOOPBACK, HopCase


class _Way(NamedTuple):
    """What takes a dispatcher of its own; `exact` as in HopCase."""

    link: str
    tls: bool
    nodes: int
    exact: bool


class HopDispatchers:
    """One for each way that was asked for."""

    def __init__(self, config: dict[str, Any]) -> None:
        """`config` as hop_client.py describes it."""
        torch.set_num_threads(1)
        self._addresses: dict[str, dict[str, list[str]]] = config["addresses"]
        self._onward: dict[str, list[str]] = config["onward"]
        self._manifest = Manifest("bench", "0" * 64, tuple(map(_geometry, config["layers"])))
        folder = Path(config["tls"])
        self._identity = Identity(*((folder / name).read_bytes() for name in ("key.pem", "chain.pem", "ca.pem")))
        self._dispatchers: dict[_Way, Dispatcher] = {}

    async def measure(self, order: dict[str, Any]) -> dict[str, Any]:
        """`times`: of each exchange its seconds, and the slowest node's arithmetic in them; `eight_bit` as in HopRow.

        `order`: `case` and `count`.
        """
        case = HopCase(**order["case"])
        way = _Way(case.link, case.tls, case.nodes, case.exact)
        if way not in self._dispatchers:
            self._dispatchers[way] = await self._connected(way)
        dispatcher = self._dispatchers[way]
        dispatcher.chains.always = case.chain
        hidden_size = self._manifest.layers[0].spec.hidden_size
        hidden = torch.randn(case.tokens, hidden_size).to(getattr(torch, case.dtype))
        ids = torch.arange(case.nodes)[None].expand(case.tokens, case.nodes)  # an expert on each node
        weights = torch.ones(case.tokens, case.nodes)
        times = [await _exchange(dispatcher, hidden, ids, weights) for _ in range(order["count"])]
        link = dispatcher.link(NodeName("n0"))
        assert link is not None
        return {"times": times, "eight_bit": not case.exact and link.speed.eight_bit(hidden.nbytes)}

    async def _connected(self, way: _Way) -> Dispatcher:
        # A token has one expert on each node here: both ways give as many rows, but only one may round them.
        dispatcher = Dispatcher(self._manifest, None, Reduction.PER_EXPERT if way.exact else Reduction.PARTIAL_SUM)
        for number in range(way.nodes):
            name = NodeName(f"n{number}")
            address = self._addresses[way.link]["tls" if way.tls else "open"][number]
            channel = Channel(address, self._identity if way.tls else None, node_dns_name(name))
            link = Link(name, self._onward[way.link][number], channel, on_close=lambda: None)
            # Slow links are made by proxies on loopback, which is not what they stand for.
            link.speed = LinkSpeed(loopback=way.link == LOOPBACK)
            await link.open()
            dispatcher.connect(link)
        layers = self._manifest.layers
        owners = tuple((NodeName(f"n{expert % way.nodes}"),) for expert in range(layers[0].experts))
        dispatcher.follow(Plan(1, (owners,) * len(layers)))
        return dispatcher


def _geometry(layer: dict[str, Any]) -> LayerGeometry:
    spec = {name: value for name, value in layer.items() if name != "experts"}
    return LayerGeometry(layer["experts"], 1, ExpertSpec(**spec))


async def _exchange(
    dispatcher: Dispatcher, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[float, float]:
    """One layer's way there and back: seconds, and of these the slowest node's arithmetic."""
    counters = dispatcher.counters
    before = {name: counter.compute_ns for name, counter in counters.items()}
    start = perf_counter()
    await dispatcher.submit(0, hidden, ids, weights)
    seconds = perf_counter() - start
    slowest = max(counter.compute_ns - before.get(name, 0) for name, counter in counters.items())
    return seconds, slowest / 1e9
