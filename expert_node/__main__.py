"""`python -m moehive.expert_node`: settings from flags, then the node. Exit code 1: failed, 2: settings."""

import argparse
import faulthandler
import logging
import os
import sys
from pathlib import Path

from moehive.kernels.light_torch import import_torch
from moehive.kernels.machine import cores
from moehive.proto.malloc import keep_freed_memory

from .footprint import share_one_heap
from .settings import Settings, default_state, parse_listen, parse_size, read_token
from .types import ConfigError, NodeError

DESCRIPTION = """\
Gives this machine's memory to a Moehive cluster: joins it with a token, holds a share of the model's experts in RAM
and computes them when the coordinator asks. The token is needed once; `moehive token` on the coordinator makes one.
"""
OTHERS = """\
On the coordinator's machine, `moehive node drain NAME` moves a node's experts to the others, `moehive node readmit
NAME` has a drained or a quarantined node take part again, and `moehive node revoke NAME` shuts out a lost machine.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moehive node", description=DESCRIPTION, epilog=OTHERS)
    add = parser.add_argument
    add(
        "--token", help="join token, for the first start (others on this machine can see it in the list of processes)"
    )
    add(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file with the join token; systemd's credential `token` is found",
    )
    add("--name", help="this node's name in the cluster: a-z, 0-9 and hyphens (default: the host's name)")
    add(
        "--listen",
        metavar="HOST:PORT",
        help="where the coordinator's requests come in; port 0 is any free one (default: the address that reaches "
        "the coordinator, a free port)",
    )
    add("--advertise", metavar="HOST:PORT", help="what the coordinator shall connect to, if it is not --listen")
    add(
        "--memory", metavar="SIZE", help="memory for experts, for example 12GiB (default: what is free, less a tenth)"
    )
    add(
        "--vram",
        metavar="SIZE",
        help="memory of a GPU for the experts that are used most; 0: do not use it (default: most of what is free)",
    )
    add(
        "--disk",
        metavar="SIZE",
        help="disk for experts when the cluster's memory is too small for the model, which is then slow; 0: none "
        "(default: most of what is free)",
    )
    add("--threads", type=int, default=cores(), help="threads that compute experts (default: %(default)s, all cores)")
    add(
        "--state-dir",
        type=Path,
        metavar="DIR",
        default=default_state(),
        help="certificate and disk cache of experts (default: %(default)s)",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs a node; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname).1s %(message)s")
    # A crash of native code leaves its place on stderr, and in the service's journal.
    faulthandler.enable(sys.__stderr__ or sys.stderr)
    try:
        settings = Settings(
            state=parsed.state_dir.expanduser().absolute(),
            token=read_token(parsed.token, parsed.token_file),
            name=parsed.name,
            listen=None if parsed.listen is None else parse_listen(parsed.listen),
            advertise=parsed.advertise,
            memory_bytes=None if parsed.memory is None else parse_size(parsed.memory),
            vram_bytes=None if parsed.vram is None else parse_size(parsed.vram),
            disk_bytes=None if parsed.disk is None else parse_size(parsed.disk),
            threads=parsed.threads,
        )
        # gRPC's event engine hands each message to another thread and back: half the cost of a hop. It reads this
        # when it is imported; a build that no longer knows the names ignores them.
        os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
        import uvloop

        keep_freed_memory()
        share_one_heap()
        import_torch()
        from .node import run

        uvloop.run(run(settings))
    except ConfigError as error:
        print(f"moehive node: {error}", file=sys.stderr)
        return 2
    except NodeError as error:
        print(f"moehive node: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
