"""The coordinator's side of a measured hop, in a process of its own: the dispatcher and its links, nothing made up.

Argument: JSON with `addresses` (by link kind, then by node: host:port), `onward` (by link kind and node: where the
one before it in a chain finds it), `tls` (a folder with key.pem, chain.pem and ca.pem of a coordinator, or none) and
`layers` as bench_node.py takes them. Each line of stdin is a measurement.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


async def _run(config: dict[str, Any]) -> None:
    import torch

    from moehive.kernels.geometry import ExpertSpec, LayerGeometry, Manifest
    from moehive.kernels.ops import Reduction
    from moehive.proto.channel import Identity, node_dns_name
    from moehive.proto.wire.channel import Channel

    from ..dispatch.dispatcher import Dispatcher
    from ..dispatch.link import Link
    from ..dispatch.speed import LinkSpeed
    from ..types import NodeName, Plan

    torch.set_num_threads(1)
    layers = []
    for layer in config["layers"]:
        experts = layer.pop("experts")
        layers.append(LayerGeometry(experts, 1, ExpertSpec(**layer)))
    manifest = Manifest("bench", "0" * 64, tuple(layers))
    folder = Path(config["tls"])
    identity = Identity(*((folder / name).read_bytes() for name in ("key.pem", "chain.pem", "ca.pem")))

    async def connect(kind: str, tls: bool, nodes: int, exact: bool) -> Dispatcher:
        # A token has one expert on each node here: both ways give as many rows, but only one may round them.
        reduction = Reduction.PER_EXPERT if exact else Reduction.PARTIAL_SUM
        dispatcher = Dispatcher(manifest, None, reduction)
        for number in range(nodes):
            name = NodeName(f"n{number}")
            address = config["addresses"][kind]["tls" if tls else "open"][number]
            channel = Channel(address, identity if tls else None, node_dns_name(name))
            link = Link(name, config["onward"][kind][number], channel, on_close=lambda: None)
            # Slow links are made by proxies on loopback, which is not what they stand for.
            link.speed = LinkSpeed(loopback=kind == "loopback")
            await link.open()
            dispatcher.connect(link)
        owners = tuple((NodeName(f"n{e % nodes}"),) for e in range(layers[0].experts))
        dispatcher.follow(Plan(1, (owners,) * len(layers)))
        return dispatcher

    dispatchers: dict[tuple[str, bool, int, bool], Dispatcher] = {}
    print(json.dumps("ready"), flush=True)
    while line := sys.stdin.readline():  # between measurements nothing needs the loop
        order = json.loads(line)
        key = order["kind"], order["tls"], order["nodes"], order["exact"]
        if key not in dispatchers:
            dispatchers[key] = await connect(*key)
        tokens, top_k = order["tokens"], order["nodes"]
        hidden = torch.randn(tokens, layers[0].spec.hidden_size).to(getattr(torch, order["dtype"]))
        ids = torch.arange(top_k)[None].expand(tokens, top_k)
        weights = torch.ones(tokens, top_k)
        dispatchers[key].chains.always = order["chain"]
        counters = dispatchers[key].counters
        times: list[tuple[float, float]] = []  # seconds, and the nodes' part of them: arithmetic, the slowest's
        for _ in range(order["count"]):
            before = {name: counter.compute_ns for name, counter in counters.items()}
            start = time.perf_counter()
            await dispatchers[key].submit(0, hidden, ids, weights)
            seconds = time.perf_counter() - start
            own = max(counter.compute_ns - before.get(name, 0) for name, counter in counters.items())
            times.append((seconds, own / 1e9))
        link = dispatchers[key].link(NodeName("n0"))
        assert link is not None
        eight_bit = not order["exact"] and link.speed.eight_bit(hidden.nbytes)
        print(json.dumps({"times": times, "eight_bit": eight_bit}), flush=True)
    os._exit(0)


def main() -> None:
    """The process; gRPC is set up as in a coordinator's."""
    from ..cli.process import prepare

    prepare(verbose=False)
    import uvloop

    uvloop.run(_run(json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
