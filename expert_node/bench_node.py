"""A node's service alone, for `moehive bench`: made-up experts, no cluster.

`python -m moehive.expert_node.bench_node CONFIG`, with CONFIG in JSON: `layers` (each an ExpertSpec's fields and
`experts`, how many), `held` (the experts to hold, of every layer), `threads`, `tls` (a folder with key.pem, chain.pem
and ca.pem), and `host`, where it listens, if not on loopback. With mutual TLS it is the service as every node runs
it; it opens a port without as well, for the difference, which no other program of ours does. Prints both ports, and
ends when its stdin does.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any


async def _serve(config: dict[str, Any]) -> None:
    import grpc
    import torch

    from moehive.kernels.blob import build_blob
    from moehive.kernels.geometry import ExpertId, ExpertSpec, LayerGeometry, Manifest
    from moehive.kernels.ops import ExpertOps, load_expert
    from moehive.proto import experts_pb2_grpc
    from moehive.proto.channel import Identity
    from moehive.proto.interceptor import CallGuard
    from moehive.proto.tensors import WireError
    from moehive.proto.wire.server import Server
    from moehive.proto.wire.tls import server_context

    from .chain import Onward
    from .courtesy import give_way
    from .executor import Executor
    from .service import ExpertsService
    from .store import ExpertStore

    give_way("127.0.0.1:1")  # where whoever measures is, too

    class OpenService(ExpertsService):
        def may_ask(self, context: Any) -> bool:
            return True

    geometry = []
    for layer in config["layers"]:
        experts = layer.pop("experts")
        geometry.append(LayerGeometry(experts, 1, ExpertSpec(**layer)))
    manifest = Manifest("bench", "0" * 64, tuple(geometry))
    store = ExpertStore(manifest.total_bytes)
    store.use(manifest, 1)
    torch.set_num_threads(config["threads"])
    for number, layer_geometry in enumerate(geometry):
        spec = layer_geometry.spec
        for expert in config["held"]:
            generator = torch.Generator().manual_seed(number << 16 | expert)
            tensors = {t.name: torch.randn(t.shape, generator=generator) / t.shape[-1] ** 0.5 for t in spec.tensors}
            store.add(ExpertId(number, expert), load_expert(spec, build_blob(spec, tensors)))
    executor = Executor(store, ExpertOps(config["threads"]))
    folder = Path(config["tls"])
    identity = Identity(*((folder / name).read_bytes() for name in ("key.pem", "chain.pem", "ca.pem")))
    onward = Onward(lambda: identity)
    ports, servers = [], []
    for kind, context in ((ExpertsService, server_context(lambda: identity)), (OpenService, None)):
        server = Server(CallGuard({WireError: grpc.StatusCode.INVALID_ARGUMENT}))
        experts_pb2_grpc.add_ExpertsServicer_to_server(kind(executor, onward), server)
        ports.append(await server.listen(config.get("host", "127.0.0.1"), 0, context))
        servers.append(server)  # one that nobody holds would end
    print(json.dumps({"tls": ports[0], "open": ports[1]}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    os._exit(0)  # streams are still open, and nobody waits for them


def main() -> None:
    """The process, set up as a node's is."""
    import uvloop

    from moehive.proto.malloc import keep_freed_memory

    keep_freed_memory()
    uvloop.run(_serve(json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
