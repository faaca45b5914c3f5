"""The coordinator's side of a measured hop, in a process of its own: the dispatcher and its links, nothing made up.

Argument: JSON with `addresses` (by link, then by kind of door and node: host:port), `onward` (by link and node: where
the one before it in a chain finds it), `tls` (a folder with key.pem, chain.pem and ca.pem of a coordinator) and
`layers` as bench_node.py takes them. Each line of stdin is a measurement: `case` (hop_case.py) and `count`, of how
many exchanges.
"""

import asyncio
import json
import os
import sys
from typing import Any


async def _run(config: dict[str, Any]) -> None:
    from .hop_dispatchers import HopDispatchers  # with gRPC and torch, which are to find the process prepared

    dispatchers = HopDispatchers(config)
    print(json.dumps("ready"), flush=True)
    # The loop goes on meanwhile: nodes end a connection whose other side does not answer their pings.
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await dispatchers.measure(json.loads(line))), flush=True)
    os._exit(0)  # streams are still open, and nobody waits for them


def main() -> None:
    """The process; gRPC is set up as in a coordinator's."""
    from ..cli.process import prepare

    prepare(verbose=False)
    import uvloop

    uvloop.run(_run(json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
