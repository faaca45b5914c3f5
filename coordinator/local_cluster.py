"""A whole cluster on this machine: the coordinator in this process, each expert node a process of its own.

Nothing is special about it: nodes join with tokens, fetch their slices and are spoken to over mutual TLS, as on other
machines. A node that ends is started again. Layout of the cluster's folder:

    lock                held by the process that runs this cluster
    ca/, coordinator.sqlite
    nodes/node-1/       a node's own state directory; its identity is made anew at each start, because the ports may
                        have changed, while its cache of experts stays
    logs/node-1.log     of the latest start
"""

import asyncio
import contextlib
import fcntl
import hashlib
import importlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import monotonic
from typing import IO, TYPE_CHECKING, Any

from moehive.kernels.machine import available_memory, cores

from .cluster.trust import Authority
from .settings import CoordinatorSettings
from .types import CoordinatorError

if TYPE_CHECKING:
    from .app import Coordinator

log = logging.getLogger(__name__)

TOKEN_SECONDS = 600.0  # from a node's start to its joining; importing torch on a busy machine is slow
STOP_SECONDS = 3.0  # for a node to end by itself; it takes two
BACKOFF_SECONDS = (0.5, 10.0)  # before a node is started again: at first, and at most
STEADY_SECONDS = 30.0  # a node that has run so long starts again without delay
START_ATTEMPTS = 3  # a node that ends so often before the cluster is ready won't start
TAIL_LINES = 8  # of a node's log, in the error that says so
MEMORY_SHARE = 0.8  # of what is available, for all nodes together; the trunk and its caches need the rest
MAX_FOLDERS = 64

# What a child runs first; its arguments are this process's pid and its own. The kernel kills it when this process
# ends in whatever way (Linux only; elsewhere it stays); the parent may have gone before that was set up.
DIES_WITH_PARENT = """
import os, runpy, sys
parent, *arguments = sys.argv[1:]
if sys.platform == "linux":
    import ctypes, signal
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):
        sys.exit(1)
"""
# Then a node imports what takes long while the coordinator does the same, and becomes the node when its token comes.
_LAUNCHER = f"""{DIES_WITH_PARENT}
from moehive.kernels.light_torch import import_torch
import_torch()
token = sys.stdin.readline().strip()
if not token:
    sys.exit(1)
sys.argv = ["moehive node", "--token", token, *arguments]
{{prelude}}
runpy.run_module("moehive.expert_node", run_name="__main__")
"""


def folder_name(model: str, nodes: int) -> str:
    """The name of a model's cluster folder: for a person, then for certain. `nodes` count, as plans are kept."""
    path = Path(model).expanduser()
    known = str(path.resolve()) if path.exists() else model
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(known).name)[:40].strip("-.") or "model"
    return f"{name}-{hashlib.sha256(known.encode()).hexdigest()[:8]}-{nodes}"


@contextmanager
def own_folder(base: Path) -> Iterator[Path]:
    """The folder `base`, or `base-2`, `base-3`, … when other clusters run in those; ours until the block ends."""
    for number in range(1, MAX_FOLDERS + 1):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = (folder / "lock").open("w")
        except OSError as error:
            raise CoordinatorError(
                f"{folder} can't be used ({error.strerror}); check who owns it or name another --state-dir."
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield folder
            return
    raise CoordinatorError(f"{MAX_FOLDERS} clusters run in {base.parent} already; stop some of them.")


class LocalCluster:
    """`start`, then `stop`, on the event loop of one thread."""

    def __init__(
        self,
        model: str,
        folder: Path,
        nodes: int,
        *,
        grpc_port: int,
        http_port: int,
        deterministic: bool = True,
        threads: int | None = None,
        node_threads: int | None = None,
        doors: Sequence[tuple[int, int]] | None = None,
        prelude: str = "",
    ) -> None:
        """`folder` is from `own_folder`; a port may be 0, any free one.

        `deterministic`: see CoordinatorSettings; a row an expert costs little on loopback, and texts can be compared.
        `threads` of the trunk, by default all cores: it computes while the nodes wait, and they while it waits.
        `node_threads` of each node, by default its share of the cores. `doors`: for each node the port that it
        listens on and the one that leads there, when something stands between. `prelude`: Python that each node's
        process runs first.
        """
        self._settings = CoordinatorSettings(
            model=model,
            state_dir=folder,
            grpc_port=grpc_port,
            http_port=http_port,
            cluster_port=0,
            join_port=0,
            min_nodes=nodes,
            deterministic=deterministic,
            threads=threads or cores(),
        )
        memory = int(MEMORY_SHARE * available_memory() / nodes)
        node_threads = node_threads or max(1, cores() // nodes)
        self._issue: asyncio.Future[Callable[[], str]] = asyncio.Future()  # makes tokens, once nodes can join
        self._nodes = [
            _Node(f"node-{n + 1}", folder, memory, node_threads, doors[n] if doors else None, prelude, self._issue)
            for n in range(nodes)
        ]
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Lock()
        self.coordinator: Coordinator  # once started

    @property
    def node_pids(self) -> dict[str, int]:
        """The processes of the nodes that run, by name."""
        return {node.name: node.pid for node in self._nodes if node.pid is not None}

    async def start(self) -> None:
        """Returns when requests are answered. Raises CoordinatorError or OSError; nothing is left running then."""
        try:
            ca = self._settings.state_dir / "ca"
            if not ca.exists():
                Authority.create(ca)
            for node in self._nodes:
                node.prepare()
                self._tasks.append(asyncio.create_task(node.keep(), name=node.name))
            # Takes seconds, in which the nodes' processes import torch too, and the loop can still be told to stop.
            app = await asyncio.to_thread(importlib.import_module, ".app", __package__)
            self.coordinator = app.Coordinator(self._settings)
            starting = asyncio.create_task(self.coordinator.start())
            self._tasks.append(starting)
            await self._first(self.coordinator.cluster_open.wait())
            self._issue.set_result(partial(self.coordinator.issue_token, TOKEN_SECONDS))
            await self._first(self._wait_ready(starting))
        except BaseException:
            await self.stop()
            raise
        for node in self._nodes:
            node.may_fail = True

    async def stop(self) -> None:
        """Ends generations, then the coordinator, then the nodes: with no coordinator they leave at once."""
        async with self._stopping:  # a second caller waits for the first
            for task in self._tasks:
                task.cancel()  # no node is started again
            await asyncio.gather(*self._tasks, return_exceptions=True)
            try:
                if hasattr(self, "coordinator"):
                    await self.coordinator.stop()
            finally:
                await asyncio.gather(*(node.end() for node in self._nodes))

    async def _wait_ready(self, starting: "asyncio.Task[None]") -> None:
        await starting
        await self.coordinator.wait_ready()

    async def _first(self, wanted: Coroutine[Any, Any, Any]) -> None:
        """Waits for `wanted`; raises the error of any task of this cluster that fails before."""
        task = asyncio.create_task(wanted)
        try:
            pending: set[asyncio.Task[Any]] = {task, *self._tasks}
            while not task.done():
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for ended in done:
                    ended.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class _Node:
    """One node's process, started again whenever it ends."""

    def __init__(
        self,
        name: str,
        folder: Path,
        memory_bytes: int,
        threads: int,
        door: tuple[int, int] | None,
        prelude: str,
        issue: "asyncio.Future[Callable[[], str]]",
    ) -> None:
        self.name = name
        self.may_fail = False  # once the cluster is ready, a node that ends is only started again
        self._state = folder / "nodes" / name
        self._log = folder / "logs" / f"{name}.log"
        self._command = [
            sys.executable,
            "-c",
            _LAUNCHER.replace("{prelude}", prelude),
            str(os.getpid()),
            "--name",
            name,
        ]
        listen, advertise = door or (0, None)
        self._command += ["--listen", f"127.0.0.1:{listen}"]
        if advertise is not None:
            self._command += ["--advertise", f"127.0.0.1:{advertise}"]
        self._command += ["--state-dir", str(self._state), "--memory", str(memory_bytes), "--threads", str(threads)]
        self._command += ["--vram", "0"]  # each would take the one GPU, and texts would depend on what lies there
        self._issue = issue
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, unless there is none."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def prepare(self) -> None:
        """Makes the node's folders and forgets its former identity. Raises CoordinatorError."""
        try:
            self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._log.parent.mkdir(exist_ok=True)
            shutil.rmtree(self._state / "identity", ignore_errors=True)
            self._log.write_bytes(b"")
        except OSError as error:
            raise CoordinatorError(
                f"{error.filename} can't be written ({error.strerror}); free some space or name another --state-dir."
            ) from error

    async def keep(self) -> None:
        """Runs the process, again and again. Raises CoordinatorError when it can't be got to run."""
        first, longest = BACKOFF_SECONDS
        delay, failures = first, 0
        while True:
            started = monotonic()
            with self._log.open("ab") as output:
                code = await self._run(output)
            failures += 1
            if not self.may_fail and (failures >= START_ATTEMPTS or code == 2):
                raise CoordinatorError(
                    f"Expert {self.name} does not start (exit code {code}).{self._tail(TAIL_LINES)}"
                )
            delay = first if monotonic() - started > STEADY_SECONDS else min(2 * delay, longest)
            log.warning(
                "Expert %s has ended (exit code %d) and is started again in %.1f s.%s",
                self.name, code, delay, self._tail(1),
            )  # fmt: skip
            await asyncio.sleep(delay)

    async def end(self) -> None:
        """Has the process end, and makes sure of it."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _run(self, output: IO[bytes]) -> int:
        # A group of its own, so that Ctrl-C in a terminal reaches this process alone, which then ends the nodes.
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
        )
        assert self._process.stdin is not None
        issue = await asyncio.shield(self._issue)
        with contextlib.suppress(ConnectionError):  # it has ended already; its exit code says why
            # A new token each time: it is good for one use, and a node that is a member does not use it.
            self._process.stdin.write(f"{issue()}\n".encode())
            await self._process.stdin.drain()
        self._process.stdin.close()
        return await self._process.wait()

    def _tail(self, count: int) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-count:]
        return f" The end of {self._log}:\n  " + "\n  ".join(lines) if lines else ""
