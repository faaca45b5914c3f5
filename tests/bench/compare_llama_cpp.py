#!/usr/bin/env python3
"""Moehive beside llama.cpp: the same GGUF file, the same cores, in one run.

    python tests/bench/compare_llama_cpp.py [--geometry qwen3.5-35b --experts 8 --format q4_0 | --model FILE.gguf]

llama.cpp (built by build_llama_cpp.py): local with all cores; its layers split over two RPC servers of one thread;
attention local with the experts of even and odd layers on those two servers. Moehive: two nodes of one thread, and
one. With --link everything that has a network is measured over a made-up link as well. Each round runs every way
once, each from its own start, so a noisy machine affects all alike; medians of the rounds count.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from build_llama_cpp import built, default_folder

from moehive.coordinator.bench.ports import free_ports
from moehive.coordinator.bench.random_file import random_file
from moehive.coordinator.bench.random_model import RandomModel
from moehive.coordinator.bench.slow_link import Cable, SlowLinks
from moehive.coordinator.cli.bench_decode import parse_link
from moehive.coordinator.settings import home
from moehive.kernels.machine import cores

START_SECONDS = 30.0  # for an RPC server to listen
RUN_SECONDS = 1800.0  # for one way in one round


@dataclass(slots=True)
class Row:
    """One way; tokens a second are medians over the rounds."""

    who: str
    way: str
    link: str
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    experts_ms: list[float] = field(default_factory=list)  # ours: the slowest node's computing for a token
    failed: str = ""

    def figures(self) -> dict[str, object]:
        """As printed."""
        kept = asdict(self)
        lists = {name: kept.pop(name) for name in ("prefill", "decode", "experts_ms")}
        middle = {name: statistics.median(values) if values else None for name, values in lists.items()}
        return {
            **kept,
            "prefill_tokens_per_s": middle["prefill"],
            "decode_tokens_per_s": middle["decode"],
            "experts_ms": middle["experts_ms"],
        }


class LlamaCpp:
    """Its programs, and two RPC servers of one thread until `stack` closes."""

    def __init__(self, programs: dict[str, Path], arguments: argparse.Namespace, stack: ExitStack) -> None:
        self._bench = programs["llama-bench"]
        self._arguments = arguments
        self._ports = free_ports(2)
        for port in self._ports:
            stack.enter_context(_server(programs["ggml-rpc-server"], port))
        self.addresses = {"loopback": [f"127.0.0.1:{port}" for port in self._ports]}
        if arguments.link is not None:
            cables = [Cable("client", f"server-{n}", port) for n, port in enumerate(self._ports)]
            ports = stack.enter_context(SlowLinks(cables, arguments.link)).ports
            self.addresses[str(arguments.link)] = [f"127.0.0.1:{port}" for port in ports]

    def local(self, row: Row) -> None:
        """Without a network."""
        self._run(row, ["-t", str(cores()), "-ngl", "0"])

    def layers(self, row: Row) -> None:
        """Half of the layers on each server."""
        self._run(row, ["-t", "1", "-ngl", "99", "--rpc", ",".join(self.addresses[row.link])])

    def experts(self, row: Row) -> None:
        """Experts of even layers on one server, of odd layers on the other; the rest local."""
        first, second = self.addresses[row.link]
        # Each server counts its own devices, so both are number 0.
        places = rf"blk\.\d*[02468]\.ffn_\w*_exps=RPC0[{first}];blk\.\d*[13579]\.ffn_\w*_exps=RPC0[{second}]"
        self._run(row, ["-t", "1", "-ngl", "0", "--rpc", f"{first},{second}", "-ot", places])

    def _run(self, row: Row, options: list[str]) -> None:
        asked = self._arguments
        command = [str(self._bench), "-m", str(asked.model), "-p", str(asked.prompt), "-n", str(asked.tokens)]
        output = _output([*command, "-r", "1", "-o", "json", *options], row)
        for test in json.loads(output) if output else []:
            (row.prefill if test["n_prompt"] else row.decode).append(test["avg_ts"])


def moehive(arguments: argparse.Namespace, nodes: int) -> Callable[[Row], None]:
    """Our own way with so many nodes of one thread."""

    def run(row: Row) -> None:
        command = [sys.executable, "-m", "moehive.coordinator.cli.main", "bench", "decode", "--json"]
        command += [
            "--model",
            str(arguments.model),
            "--nodes",
            str(nodes),
            "--threads-per-node",
            "1",
            "--rounds",
            "1",
        ]
        command += ["--prompt", str(arguments.prompt), "--tokens", str(arguments.tokens)]
        if arguments.trunk_threads is not None:
            command += ["--trunk-threads", str(arguments.trunk_threads)]
        if row.link != "loopback":
            command += ["--link", f"{arguments.link.delay_s * 1e3}ms,{arguments.link.bits_per_s / 1e9}gbit"]
        output = _output(command, row)
        if output:
            (found,) = json.loads(output)["rows"]
            row.prefill.append(found["prefill_tokens_per_s"])
            row.decode.append(found["decode_tokens_per_s"])
            row.experts_ms.append(found["experts_ms"])

    return run


def _output(command: list[str], row: Row) -> str:
    """What a program prints, or nothing and `row.failed`."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS)
    except subprocess.TimeoutExpired:
        row.failed = f"no end after {RUN_SECONDS:.0f} s"
        return ""
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        row.failed = f"status {done.returncode}: {lines[-1] if lines else 'no message'}"
        return ""
    return done.stdout


@contextmanager
def _server(program: Path, port: int) -> Iterator[None]:
    """An RPC server of one thread on loopback, without a cache on disk."""
    process = subprocess.Popen(
        [str(program), "-H", "127.0.0.1", "-p", str(port), "-t", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1.0).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{program} does not listen on port {port}.") from None
                time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait()


def compare(arguments: argparse.Namespace) -> list[Row]:
    """All rows after all rounds."""
    programs = built(arguments.llama_cpp)
    if programs is None:
        raise SystemExit(f"{arguments.llama_cpp} holds no llama.cpp; run tests/bench/build_llama_cpp.py first.")
    with ExitStack() as stack:
        llama = LlamaCpp(programs, arguments, stack)
        ways: list[tuple[Row, Callable[[Row], None]]] = [
            (Row("llama.cpp", f"local, {cores()} threads", "loopback"), llama.local)
        ]
        for link in llama.addresses:
            ways += [
                (Row("llama.cpp", "layers on two servers", link), llama.layers),
                (Row("llama.cpp", "experts on two servers", link), llama.experts),
                (Row("moehive", "two nodes", link), moehive(arguments, 2)),
                (Row("moehive", "one node", link), moehive(arguments, 1)),
            ]
        for number in range(arguments.rounds):
            for row, run in ways:
                print(f"round {number + 1}: {row.who}, {row.way}, {row.link}", file=sys.stderr)
                run(row)
        return [row for row, _ in ways]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures Moehive beside llama.cpp on the same GGUF file.")
    add = parser.add_argument
    add("--model", type=Path, help="a GGUF file, instead of a geometry")
    add("--geometry", default="qwen3.5-35b")
    add("--layers", type=int)
    add("--experts", type=int, default=8, help="in each layer; as many are used for a token")
    add("--format", default="q4_0")
    add("--link", type=parse_link, help="measure over this link as well, as 0.25ms,1gbit")
    add("--prompt", type=int, default=128)
    add("--tokens", type=int, default=64)
    add("--trunk-threads", type=int, help="of Moehive's coordinator")
    add("--rounds", type=int, default=3)
    add("--llama-cpp", type=Path, default=default_folder(), metavar="FOLDER")
    add("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.model is None:
        model = RandomModel(
            geometry=arguments.geometry, format=arguments.format, layers=arguments.layers, experts=arguments.experts
        )
        arguments.model = random_file(model, home() / "bench" / "models")
    return arguments


def main() -> None:
    """Prints a table, or JSON."""
    arguments = _arguments()
    rows = [row.figures() for row in compare(arguments)]
    if arguments.json:
        print(json.dumps({"model": arguments.model.name, "rows": rows}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("who", "way", "link", "prefill tokens/s", "decode tokens/s", "experts ms", "failed")
    for row in rows:
        cells = [f"{value:.2f}" if isinstance(value, float) else str(value or "") for value in row.values()]
        who, way, link, failed, *numbers = cells
        table.add_row(who, way, link, *numbers, failed)
    Console().print(table)


if __name__ == "__main__":
    main()
