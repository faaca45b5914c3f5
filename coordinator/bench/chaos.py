"""`moehive bench chaos`: a cluster of four nodes on this machine, four clients, and faults drawn from a seed.

Every answer is compared with that of a calm run (the cluster is deterministic), token by token. The verdict counts
answers that differ, requests that failed, the longest time without a token, and what was left behind.
"""

import asyncio
import gc
import logging
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from moehive.client import Client, MoehiveError

from ..cluster.records import readmit_node
from ..cluster.store import Store
from ..local_cluster import LocalCluster
from ..types import CoordinatorError
from .chaos_door import Door
from .chaos_node import LIES, PRELUDE
from .decode import free_ports

NODES, CLIENTS = 4, 4
PROMPTS, PROMPT_TOKENS, TOKENS = 8, 12, 32
CALM_SECONDS = (0.3, 1.5)  # between two faults
FAULT_SECONDS = (0.3, 6.0)  # how long a fault lasts that ends by itself
HEAL_SECONDS = 120.0  # for the cluster to be whole again at the end
AT_ONCE = 2  # faults, on different nodes
LEAK_BYTES = 256 << 20  # more memory than before is a leak; torch and gRPC keep some
LEAK_FILES = 16
KINDS = ("kill", "stop", "cut", "cut to", "cut from", "crawl", "loop", *LIES)


@dataclass(slots=True)
class ChaosReport:
    """The verdict."""

    seed: int
    minutes: float
    requests: int = 0
    faults: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    differ: int = 0  # answers with other tokens than the calm run's
    lost_or_repeated: int = 0  # answers with another number of tokens
    failed: int = 0
    longest_pause_s: float = 0.0  # without a token, over all clients
    pauses_s: dict[str, float] = field(default_factory=dict)  # the longest by kind of the latest fault before it
    errors: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong, lost or left behind."""
        return not (self.differ or self.lost_or_repeated or self.failed or self.leaks)

    def figures(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "seed": self.seed, "minutes": self.minutes, "requests": self.requests, "faults": self.faults,
            "by_kind": dict(sorted(self.by_kind.items())), "differ": self.differ,
            "lost_or_repeated": self.lost_or_repeated, "failed": self.failed,
            "longest_pause_s": round(self.longest_pause_s, 3),
            "pauses_s": {kind: round(seconds, 3) for kind, seconds in sorted(self.pauses_s.items())},
            "errors": self.errors[:10], "leaks": self.leaks, "passed": self.passed,
        }  # fmt: skip


def run_chaos(seed: int, minutes: float, told: Callable[[str], None] = lambda line: None) -> ChaosReport:
    """Runs it all; `told` gets a line for each fault. Raises CoordinatorError when the cluster does not start."""
    with tempfile.TemporaryDirectory(prefix="moehive-chaos-") as folder:
        return asyncio.run(_Chaos(Path(folder), seed, minutes, told).run())


class _Chaos:
    def __init__(self, folder: Path, seed: int, minutes: float, told: Callable[[str], None]) -> None:
        self._folder = folder
        self._random = random.Random(seed)
        self._told = told
        self._report = ChaosReport(seed, minutes)
        self._latest = ""  # kind of the latest fault
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._expected: list[list[int]] = []
        self._busy: set[str] = set()
        self._cluster: LocalCluster
        self._doors: dict[str, Door] = {}

    async def run(self) -> ChaosReport:
        logging.getLogger("moehive").setLevel(logging.CRITICAL)  # what goes wrong here is meant to
        model = await asyncio.to_thread(_tiny_model, self._folder / "model")
        ports = free_ports(2 * NODES)
        pairs = list(zip(ports[:NODES], ports[NODES:], strict=True))
        for number, (listen, advertise) in enumerate(pairs):
            self._doors[f"node-{number + 1}"] = door = Door(advertise, listen)
            await door.open()
        (self._folder / "cluster").mkdir()
        self._cluster = LocalCluster(
            str(model), self._folder / "cluster", NODES, grpc_port=0, http_port=0, threads=1, node_threads=1,
            doors=pairs, prelude=PRELUDE,
        )  # fmt: skip
        try:
            await self._cluster.start()
            await asyncio.to_thread(self._calm)
            process = psutil.Process()
            gc.collect()
            before = process.memory_info().rss, process.num_fds()
            await self._storm()
            await self._cluster.coordinator.wait_ready(HEAL_SECONDS)
            await asyncio.to_thread(self._calm)
            gc.collect()
            self._look_for_leaks(before, (process.memory_info().rss, process.num_fds()))
            pids = list(self._cluster.node_pids.values())
        finally:
            await self._cluster.stop()
            for door in self._doors.values():
                await door.close()
        self._report.leaks += [f"process {pid} is left" for pid in pids if psutil.pid_exists(pid)]
        return self._report

    async def _storm(self) -> None:
        clients = [threading.Thread(target=self._client, args=(n,), daemon=True) for n in range(CLIENTS)]
        for client in clients:
            client.start()
        faults: set[asyncio.Task[None]] = set()
        end = time.monotonic() + 60 * self._report.minutes
        kinds: list[str] = []
        while time.monotonic() < end:
            await asyncio.sleep(self._random.uniform(*CALM_SECONDS))
            calm_nodes = [name for name in self._doors if name not in self._busy]
            if len(faults) >= AT_ONCE or not calm_nodes:
                _, faults = await asyncio.wait(faults, return_when=asyncio.FIRST_COMPLETED)
                continue
            kinds = kinds or self._random.sample(KINDS, len(KINDS))  # each once, in an order of the seed's
            kind, node = kinds.pop(), self._random.choice(calm_nodes)
            seconds = self._random.uniform(*FAULT_SECONDS)
            self._report.faults += 1
            self._report.by_kind[kind] += 1
            self._latest = kind
            self._told(f"{kind} on {node}, {seconds:.1f} s")
            self._busy.add(node)
            task = asyncio.create_task(self._fault(kind, node, seconds))
            faults.add(task)
            faults = {task for task in faults if not task.done()} | {task}
        if faults:
            await asyncio.wait(faults)
        self._over.set()
        for client in clients:
            await asyncio.to_thread(client.join, HEAL_SECONDS)
            if client.is_alive():
                self._report.errors.append("A client waits for ever.")
                self._report.failed += 1

    async def _fault(self, kind: str, node: str, seconds: float) -> None:
        try:
            if kind == "kill":
                await self._kill(node)
            elif kind == "loop":
                for _ in range(3):
                    await self._kill(node)
            elif kind == "stop":
                pid = self._cluster.node_pids.get(node)
                if pid is not None:
                    os.kill(pid, signal.SIGSTOP)
                    await asyncio.sleep(seconds)
                    os.kill(pid, signal.SIGCONT)
            elif kind in LIES:
                await self._lie(kind, node, seconds)
            else:
                door = self._doors[node]
                cut = {"cut": ("to", "from"), "cut to": ("to",), "cut from": ("from",)}.get(kind, ())
                door.set(*cut, crawls=kind == "crawl")
                await asyncio.sleep(seconds)
                door.set()
        except ProcessLookupError:
            pass  # it has ended by itself meanwhile
        finally:
            self._busy.discard(node)

    async def _kill(self, node: str) -> None:
        """Kills a node's process and waits until it has been started again."""
        pid = self._cluster.node_pids.get(node)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        while self._cluster.node_pids.get(node) in (None, pid):  # noqa: ASYNC110 - there is nothing to await
            await asyncio.sleep(0.05)

    async def _lie(self, kind: str, node: str, seconds: float) -> None:
        """Has a node lie; a person finds out, mends it, and lets it in again if it was quarantined."""
        file = self._folder / "cluster" / "nodes" / node / "lie"
        await asyncio.to_thread(file.write_text, kind)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(file.unlink)
        await asyncio.sleep(0.1)  # it looks twenty times a second
        states = {status.name: status.state for status in self._cluster.coordinator.status().nodes}
        if states.get(node) == "quarantined":
            await asyncio.to_thread(self._readmit, node)
            await self._kill(node)  # so that it comes back at once

    def _readmit(self, node: str) -> None:
        store = Store(self._folder / "cluster" / "coordinator.sqlite")
        try:
            readmit_node(store, node)
        finally:
            store.close()

    def _calm(self) -> None:
        """The right answers; the second time they must be the same."""
        with Client(f"127.0.0.1:{self._cluster.coordinator.grpc_port}") as client:
            answers = [_ask(client, number, lambda seconds: None) for number in range(PROMPTS)]
        if not self._expected:
            self._expected = answers
        elif answers != self._expected:
            raise CoordinatorError("The calm cluster's answers have changed; this is a bug in Moehive.")

    def _client(self, number: int) -> None:
        choice = random.Random(self._report.seed * CLIENTS + number)
        with Client(f"127.0.0.1:{self._cluster.coordinator.grpc_port}") as client:
            while not self._over.is_set():
                prompt = choice.randrange(PROMPTS)
                try:
                    tokens: list[int] | None = _ask(client, prompt, self._paused)
                except MoehiveError as error:
                    tokens = None
                    self._report.errors.append(str(error))
                with self._lock:
                    self._report.requests += 1
                    if tokens is None:
                        self._report.failed += 1
                    elif len(tokens) != TOKENS:
                        self._report.lost_or_repeated += 1
                    elif tokens != self._expected[prompt]:
                        self._report.differ += 1

    def _paused(self, seconds: float) -> None:
        with self._lock:
            report = self._report
            report.longest_pause_s = max(report.longest_pause_s, seconds)
            report.pauses_s[self._latest] = max(report.pauses_s.get(self._latest, 0.0), seconds)

    def _look_for_leaks(self, before: tuple[int, int], after: tuple[int, int]) -> None:
        memory, files = after[0] - before[0], after[1] - before[1]
        if memory > LEAK_BYTES:
            self._report.leaks.append(f"memory grew by {memory / 1e6:.0f} MB")
        if files > LEAK_FILES:
            self._report.leaks.append(f"{files} more file handles")


def _ask(client: Client, number: int, paused: Callable[[float], None]) -> list[int]:
    """The tokens of one of PROMPTS prompts, half of them sampled; `paused` gets each wait for a token, seconds."""
    prompt = [3 + (number * 31 + i * 7) % 120 for i in range(PROMPT_TOKENS)]
    tokens: list[int] = []
    last = time.monotonic()
    for piece in client.stream(
        token_ids=prompt, max_tokens=TOKENS, temperature=0.0 if number % 2 else 0.8, seed=number, ignore_eos=True
    ):
        now = time.monotonic()
        paused(now - last)
        last = now
        tokens += piece.token_ids
    return tokens


def _tiny_model(folder: Path) -> Path:
    """A checkpoint of random weights, small enough that faults and not arithmetic take the time."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, moe_intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, num_experts=16,
        num_experts_per_tok=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder
