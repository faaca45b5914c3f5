"""The coordinator is killed in the middle of a text: nodes stay, it starts again, and the client gets the rest."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moehive.client import Client, MoehiveError
from moehive.coordinator.bench.ports import free_ports

DEADLINE = 120.0
OPTIONS: dict[str, Any] = {"token_ids": [3, 17, 5, 99, 42], "max_tokens": 300, "ignore_eos": True}
OPTIONS |= {"temperature": 0.9, "seed": 4}  # sampled: the random numbers go on where they were, too


@contextmanager
def coordinator(made: Any, model: Path, ports: list[int], nodes: int) -> Iterator[subprocess.Popen[bytes]]:
    """`moehive coordinator` as a process of its own; killed at the end."""
    names = ("--port", "--http-port", "--cluster-port", "--join-port")
    command = [sys.executable, "-m", "moehive.coordinator.cli.main", "coordinator", "--deterministic"]
    command += ["--model", str(model), "--state-dir", str(made.state), "--min-nodes", str(nodes), "--threads", "1"]
    command += [word for name, port in zip(names, ports, strict=True) for word in (name, str(port))]
    with (made.folder / "coordinator.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)


def wait_ready(port: int) -> None:
    end = time.monotonic() + DEADLINE
    while True:
        try:
            with Client(f"127.0.0.1:{port}") as client:
                if client.status().ready:
                    return
        except MoehiveError:
            pass
        assert time.monotonic() < end, "The coordinator did not get ready."
        threading.Event().wait(0.2)


def test_the_rest_of_the_same_text_comes_from_the_next_process(
    new_cluster: Callable[[], Any], checkpoint: Callable[[str], Path]
) -> None:
    made, model, ports = new_cluster(), checkpoint("qwen3_moe"), free_ports(4)
    made._ports = (ports[2], ports[3])
    tokens: list[int] = []
    with coordinator(made, model, ports, 2) as first, Client(f"127.0.0.1:{ports[0]}") as client:
        end = time.monotonic() + DEADLINE
        while True:  # until nodes can be let in
            try:
                client.status()
                break
            except MoehiveError:
                assert time.monotonic() < end and first.poll() is None
                threading.Event().wait(0.2)
        nodes = [made.start_node(f"node-{n}") for n in range(2)]
        wait_ready(ports[0])
        calm = client.generate(**OPTIONS).token_ids
        stream = client.stream(**OPTIONS)
        while len(tokens) < 20:
            tokens += next(stream).token_ids
        first.send_signal(signal.SIGKILL)
        first.wait(30)
        with coordinator(made, model, ports, 2):
            for piece in stream:
                tokens += piece.token_ids
        assert [node.process.poll() for node in nodes] == [None, None]  # they stayed and came back by themselves
    assert len(calm) == OPTIONS["max_tokens"]
    assert tokens == calm
