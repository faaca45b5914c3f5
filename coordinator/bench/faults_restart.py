"""The coordinator is killed, then everything: how long after the new start the first token comes.

Here the coordinator is `moehive coordinator`, a process like its nodes, as systemd would run them.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import TypeVar

import psutil

from moehive.client import Client, MoehiveError

from ..cluster.store import Store
from ..cluster.tokens import create_token
from ..cluster.trust import Authority
from ..types import CoordinatorError
from .faults_reader import PROMPT
from .faults_report import FaultRow, FaultsReport
from .ports import free_ports

NODES = 2
TOKENS = 24
WARM_SECONDS = 10.0  # the goal for a coordinator whose nodes are up
START_SECONDS = 120.0  # a start that takes longer has failed
ASK_SECONDS = 0.05  # between two attempts
MEMORY = "2GiB"  # of each node

T = TypeVar("T")


def measure_restarts(model: Path, folder: Path, report: FaultsReport, times: int) -> None:
    """Adds two rows: of the coordinator, and of everything. Raises CoordinatorError when nothing starts."""
    running = _Processes(model, folder)
    try:
        running.start_coordinator()
        running.ask(Client.status)  # nodes can join
        for number in range(NODES):
            running.start_node(number, running.token())
        running.ask(_whole)
        expected = _text(running)[1]

        def measure(what: str, begin: Callable[[], None], goals: Sequence[float] = ()) -> None:
            spent, busy = [], []
            for _ in range(times):
                start = perf_counter()
                begin()
                first, tokens = _text(running)
                spent.append(first - start)
                busy.append(running.processor_seconds())
                report.texts += 1
                report.differ += tokens != expected
                running.ask(_whole)
            note = f"{median(busy):.1f} s of processor time in the coordinator"
            report.rows.append(FaultRow(what=f"{what}: first token", values=spent, goals=goals, note=note))

        def coordinator() -> None:
            running.kill(coordinator_only=True)
            running.start_coordinator()

        def everything() -> None:
            running.kill()
            running.start_coordinator()
            for number in range(NODES):
                running.start_node(number)

        measure("coordinator killed and started again, nodes up", coordinator, [WARM_SECONDS] * times)
        measure("everything killed and started again (power cut)", everything)
    finally:
        running.kill()


class _Processes:
    def __init__(self, model: Path, folder: Path) -> None:
        self._folder = folder
        self._state = folder / "coordinator"
        self._state.mkdir(parents=True)
        self._authority = Authority.create(self._state / "ca")
        self._ports = free_ports(4 + NODES)
        names = ("--port", "--http-port", "--cluster-port", "--join-port")
        self._command = ["moehive.coordinator.cli.main", "coordinator", "--deterministic", "--model", str(model)]
        self._command += ["--state-dir", str(self._state), "--min-nodes", str(NODES), "--threads", "1"]
        self._command += [word for name, port in zip(names, self._ports, strict=False) for word in (name, str(port))]
        self._coordinator: subprocess.Popen[bytes] | None = None
        self._nodes: list[subprocess.Popen[bytes]] = []

    def start_coordinator(self) -> None:
        self._coordinator = self._start(self._command, "coordinator")

    def start_node(self, number: int, token: str | None = None) -> None:
        name, address = f"node-{number}", f"127.0.0.1:{self._ports[4 + number]}"
        command = ["moehive.expert_node", "--name", name, "--listen", address, "--memory", MEMORY, "--threads", "1"]
        command += ["--state-dir", str(self._folder / name)]
        self._nodes.append(self._start(command + (["--token", token] if token else []), name))

    def token(self) -> str:
        """A join token, as `moehive token` makes it."""
        store = Store(self._state / "coordinator.sqlite")
        try:
            return str(create_token(store, f"127.0.0.1:{self._ports[3]}", self._authority.fingerprint))
        finally:
            store.close()

    def ask(self, call: Callable[[Client], T | None]) -> T:
        """What `call` gives, as soon as it raises no MoehiveError and gives something. Raises CoordinatorError."""
        end, why = perf_counter() + START_SECONDS, "It is not whole."
        while perf_counter() < end and self._coordinator is not None and self._coordinator.poll() is None:
            try:
                with Client(f"127.0.0.1:{self._ports[0]}") as client:
                    answer = call(client)
                if answer is not None:
                    return answer
            except MoehiveError as error:
                why = str(error)
            sleep(ASK_SECONDS)
        raise CoordinatorError(f"The cluster of the benchmark does not serve. {why}")

    def processor_seconds(self) -> float:
        """That the coordinator's process has used."""
        assert self._coordinator is not None
        used = psutil.Process(self._coordinator.pid).cpu_times()
        return float(used.user + used.system)

    def kill(self, coordinator_only: bool = False) -> None:
        """As a power cut ends processes."""
        ending: Sequence[subprocess.Popen[bytes]] = [] if coordinator_only else self._nodes
        for process in (*ending, *([self._coordinator] if self._coordinator else [])):
            process.kill()
            process.wait()
        self._coordinator = None
        if not coordinator_only:
            self._nodes = []

    def _start(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", *command], stdout=log, stderr=log)


def _whole(client: Client) -> bool | None:
    return client.status().ready or None


def _text(running: _Processes) -> tuple[float, list[int]]:
    """When (perf_counter) the first token of a text came, and all of them."""

    def read(client: Client) -> tuple[float, list[int]]:
        first = 0.0
        tokens: list[int] = []
        for piece in client.stream(token_ids=PROMPT, max_tokens=TOKENS, temperature=0, ignore_eos=True):
            if piece.token_ids and not tokens:
                first = perf_counter()
            tokens += piece.token_ids
        return first, tokens

    return running.ask(read)
