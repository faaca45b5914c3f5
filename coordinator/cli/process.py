"""What a process that runs a coordinator sets up before anything heavy is imported."""

import logging
import os
import sys

from moehive.proto.malloc import keep_freed_memory


def prepare(verbose: bool, hop: bool = True) -> None:
    """Environment of the libraries, and the log on stderr (`verbose`: more than warnings).

    `hop`: the process exchanges messages with nodes, which the allocator is tuned for; larger blocks suffer from it.
    """
    for name, value in (
        # gRPC's event engine hands each message to another thread and back: half the cost of a hop.
        ("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener"),
        ("GRPC_VERBOSITY", "ERROR"),  # errors come as exceptions
        # Idle OpenMP threads must sleep: spinning, they take the cores from nodes on the same machine.
        ("OMP_WAIT_POLICY", "PASSIVE"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TRANSFORMERS_VERBOSITY", "error"),
    ):
        os.environ.setdefault(name, value)
    if hop:
        keep_freed_memory()
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO if verbose else logging.WARNING, format="%(levelname).1s %(message)s"
    )
