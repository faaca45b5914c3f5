"""A whole cluster on this machine, each part a process of its own that is started again when it ends.

It is `moehive coordinator` and `moehive node`, run as systemd runs them, on ports that stay the same. So any part may
be killed, the coordinator too; only the doors before the nodes (chaos_door.py) are in this process. Its folder:

    coordinator/                             the coordinator's state directory
    nodes/node-1/                            a node's
    logs/coordinator.log, logs/node-1.log    of all starts
"""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from moehive.client import Client, MoehiveError, Status

from ..cluster.store import Store
from ..cluster.tokens import create_token
from ..cluster.trust import Authority
from ..local_cluster import DIES_WITH_PARENT
from ..types import CoordinatorError
from .chaos_door import Door
from .ports import free_ports

START_SECONDS = 180.0  # for all of it to start, on a slow machine
RESTART_SECONDS = 0.2  # from a process's end to its next start; systemd's units wait longer
STOP_SECONDS = 30.0  # for a process to end that is told to, as in systemd's units
POLL_SECONDS = 0.1
LOG_CHARACTERS = 4000  # of a log, in the sentence that says how its process ended

_LAUNCHER = f"""{DIES_WITH_PARENT}
module, *arguments = arguments
sys.argv = [module, *arguments]
{{prelude}}
runpy.run_module(module, run_name="__main__")
"""


class Supervised:
    """One process, run again and again from `start` to `stop`."""

    def __init__(
        self, name: str, arguments: Sequence[str], log: Path, *, first: Sequence[str] = (), prelude: str = ""
    ) -> None:
        """`arguments`: a module's name and the program's own; `first`: more of them, for the first start only.

        `prelude`: Python that the process runs before the module.
        """
        self.name = name
        self.process: asyncio.subprocess.Process | None = None  # the one that runs, if any
        self.kills = 0
        self.may_end = False  # a process that ends by itself has not crashed
        self.crashes: list[str] = []  # in words: ends that nobody asked for
        launcher = _LAUNCHER.replace("{prelude}", prelude)
        self._command = [sys.executable, "-c", launcher, str(os.getpid()), *arguments]
        self._first = first
        self._log = log
        self._begun = 0  # where the log of the latest start begins
        self._killed: asyncio.subprocess.Process | None = None
        self._keeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to keep a process running."""
        self._keeping = asyncio.create_task(self._keep(), name=self.name)

    def kill(self) -> None:
        """Ends the process that runs, if any, without a warning; it is started again."""
        if self.process is not None:
            self.kills += 1
            self._killed = self.process
            _send(self.process, signal.SIGKILL)

    async def restart(self) -> None:
        """Kills the process and returns once the next one has been started."""
        former = self.process
        self.kill()
        while self.process is None or self.process is former:  # noqa: ASYNC110 - there is nothing to await
            await asyncio.sleep(POLL_SECONDS)

    async def pause(self, seconds: float) -> None:
        """Has the process hang for so long."""
        process = self.process
        if process is None:
            return
        _send(process, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            _send(process, signal.SIGCONT)

    async def stop(self) -> None:
        """Tells the process to end, for good, and sees to it that it does; an end that is not clean is a crash."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        process = self.process
        if process is None:
            return
        _send(process, signal.SIGTERM)
        try:
            code = await asyncio.wait_for(process.wait(), STOP_SECONDS)
            if code not in (0, -signal.SIGTERM):  # the latter before it has begun to listen
                self._crashed(f"ended by itself, with exit code {code}")
        except TimeoutError:
            _send(process, signal.SIGABRT)  # it says where each of its threads is
            await process.wait()
            self._crashed(f"did not end within {STOP_SECONDS:.0f} s of being told to")
        self.process = None

    async def _keep(self) -> None:
        first = self._first
        while True:
            with self._log.open("ab") as output:
                self._begun = output.tell()
                # A group of its own, so that Ctrl-C in a terminal reaches this process alone, which then ends it.
                process = self.process = await asyncio.create_subprocess_exec(
                    *self._command, *first, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
                    start_new_session=True,
                )  # fmt: skip
            first = ()
            code = await process.wait()
            if not self.may_end and not (process is self._killed and code == -signal.SIGKILL):
                self._crashed(f"ended by itself, with exit code {code}")
            self.process = None
            await asyncio.sleep(RESTART_SECONDS)

    def _crashed(self, how: str) -> None:
        with self._log.open("rb") as file:
            file.seek(self._begun)
            said = file.read().decode(errors="replace")
        at = max(said.rfind("Fatal Python error"), said.rfind("Timeout ("))  # before where each thread is
        part = said[-LOG_CHARACTERS:] if at < 0 else said[at : at + LOG_CHARACTERS]
        self.crashes.append(f"{self.name} {how}. Its log: {part.strip()}")


class ProcessCluster:
    """`start`, then `stop`, on one event loop. A coordinator, and nodes named node-1, node-2, … behind doors."""

    def __init__(self, model: Path, folder: Path, nodes: int, *, prelude: str = "") -> None:
        """`folder` exists and is empty. `prelude`: Python that each node's process runs first."""
        grpc, http, cluster, join, *ports = free_ports(4 + 2 * nodes)
        self.state = folder / "coordinator"
        self.address = f"127.0.0.1:{grpc}"
        self.doors: dict[str, Door] = {}
        self.nodes: dict[str, Supervised] = {}
        self._join = join
        logs = folder / "logs"
        for path in (self.state, folder / "nodes", logs):
            path.mkdir(mode=0o700)
        arguments = ["moehive.coordinator.cli.main", "coordinator", "--deterministic", "--threads", "1"]
        arguments += ["--model", str(model), "--state-dir", str(self.state), "--min-nodes", str(nodes)]
        arguments += ["--port", str(grpc), "--http-port", str(http), "--cluster-port", str(cluster)]
        arguments += ["--join-port", str(join), "--kv-memory", "256MiB"]
        self.coordinator = Supervised("coordinator", arguments, logs / "coordinator.log")
        authority, store = Authority.create(self.state / "ca"), Store(self.state / "coordinator.sqlite")
        try:
            for number in range(nodes):
                name, listen, door = f"node-{number + 1}", ports[2 * number], ports[2 * number + 1]
                arguments = ["moehive.expert_node", "--name", name, "--state-dir", str(self.node_state(name))]
                arguments += ["--listen", f"127.0.0.1:{listen}", "--advertise", f"127.0.0.1:{door}"]
                arguments += ["--memory", "1GiB", "--threads", "1"]
                token = str(create_token(store, f"127.0.0.1:{join}", authority.fingerprint))
                self.doors[name] = Door(door, listen)
                self.nodes[name] = Supervised(
                    name, arguments, logs / f"{name}.log", first=("--token", token), prelude=prelude
                )
        finally:
            store.close()

    @property
    def crashes(self) -> list[str]:
        """Ends of processes that nobody asked for, in words."""
        return [crash for part in (self.coordinator, *self.nodes.values()) for crash in part.crashes]

    def node_state(self, name: str) -> Path:
        """A node's state directory."""
        return self.state.with_name("nodes") / name

    async def start(self) -> None:
        """Returns when requests are answered. Raises CoordinatorError, also when a process ends; call `stop` then."""
        for door in self.doors.values():
            await door.open()
        self.coordinator.start()
        await self._wait(self._no_joining, START_SECONDS, starting=True)
        for node in self.nodes.values():
            node.start()
        await self._wait(self._not_ready, START_SECONDS, starting=True)

    async def stop(self) -> None:
        """Ends the coordinator, then the nodes: with no coordinator they leave at once."""
        await self.coordinator.stop()
        await asyncio.gather(*(node.stop() for node in self.nodes.values()))
        for door in self.doors.values():
            await door.close()

    async def wait_answering(self, seconds: float) -> None:
        """Returns once the coordinator answers clients. Raises CoordinatorError after so long."""
        await self._wait(self._no_answer, seconds)

    async def wait_ready(self, seconds: float) -> None:
        """Returns once each expert has a node that is there. Raises CoordinatorError after so long."""
        await self._wait(self._not_ready, seconds)

    async def _wait(self, why_not: Callable[[], str], seconds: float, starting: bool = False) -> None:
        """Asks `why_not` in threads until it returns nothing. `starting`: nothing may crash meanwhile."""
        reason = ""
        try:
            async with asyncio.timeout(seconds):
                while reason := await asyncio.to_thread(why_not):
                    if starting and self.crashes:
                        raise CoordinatorError(self.crashes[0])
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            raise CoordinatorError(f"The cluster was not ready after {seconds:.0f} s. {reason}") from None

    def _no_joining(self) -> str:
        try:
            socket.create_connection(("127.0.0.1", self._join), 1.0).close()
        except OSError:
            return "The coordinator lets no nodes in."
        return ""

    def _status(self) -> Status:
        # A new connection each time: one that was refused is tried again late, and only while somebody waits for it.
        with Client(self.address) as client:
            return client.status()

    def _no_answer(self) -> str:
        try:
            self._status()
        except MoehiveError as error:
            return str(error)
        return ""

    def _not_ready(self) -> str:
        try:
            status = self._status()
        except MoehiveError as error:
            return str(error)
        return "" if status.ready else status.reason or "It gives no reason."


def _send(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    # Not by the process's own method: that may take the exit code away from asyncio.
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)
