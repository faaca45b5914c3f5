"""What fetching is compared with: a bare gRPC stream of the same chunks, mutual TLS as everywhere, memory to memory.

There is no message to parse, no hash and no disk, so this is what gRPC, TLS and TCP take of both processes.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from moehive.proto.bounds import MAX_CHUNK_BYTES
from moehive.proto.channel import COORDINATOR_NAME, Identity, bind, open_channel, options, server_credentials

from ..cluster.trust import Authority
from .certificates import node_identity
from .peers import Peer

_STREAMS, _WINDOW_BYTES = 3, 1 << 20  # as a node that fetches
_SERVICE = "moehive.bench.Copy"


async def grpc_copy_rate(authority: Authority, nbytes: int) -> float:
    """Bytes a second of about `nbytes` from this process to another one. Raises CoordinatorError."""
    piece = os.urandom(MAX_CHUNK_BYTES)
    count = -(-nbytes // (_STREAMS * len(piece)))

    async def send(_: bytes, __: Any) -> AsyncIterator[bytes]:
        for _number in range(count):
            yield piece

    server = grpc.aio.server(options=options())
    handler = grpc.unary_stream_rpc_method_handler(send)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {"Get": handler}),))
    identity = authority.issue_coordinator()
    port = bind(server, "127.0.0.1", 0, server_credentials(lambda: identity))
    await server.start()
    try:
        seconds = await asyncio.to_thread(_receive_elsewhere, port, node_identity(authority, "copy"))
    finally:
        await server.stop(None)
    return count * _STREAMS * len(piece) / seconds


def _receive_elsewhere(port: int, identity: Identity) -> float:
    peer = Peer("moehive.coordinator.bench.grpc_copy")
    try:
        pems = [pem.decode() for pem in (identity.key_pem, identity.chain_pem, identity.ca_pem)]
        return float(peer.ask({"port": port, "identity": pems}))
    finally:
        peer.end()


async def _receive(port: int, identity: Identity) -> float:
    """Seconds from the first request to the last byte."""
    loop = asyncio.get_running_loop()
    async with open_channel(f"127.0.0.1:{port}", identity, COORDINATOR_NAME, _WINDOW_BYTES) as channel:
        await channel.channel_ready()
        get = channel.unary_stream(f"/{_SERVICE}/Get")

        async def drain() -> None:
            call = get(b"")
            while await call.read() is not grpc.aio.EOF:
                pass

        start = loop.time()
        await asyncio.gather(*(drain() for _ in range(_STREAMS)))
        return loop.time() - start


def main() -> None:
    """The receiving process: reads one line of JSON, answers with the seconds."""
    import uvloop

    print(json.dumps("ready"), flush=True)
    order = json.loads(sys.stdin.readline())
    identity = Identity(*(pem.encode() for pem in order["identity"]))
    print(json.dumps(uvloop.run(_receive(order["port"], identity))), flush=True)


if __name__ == "__main__":
    main()
