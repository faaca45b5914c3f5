"""The real command in processes of its own, and small checkpoints to give to it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers

COMMAND = [sys.executable, "-m", "moehive.coordinator.cli.main"]
DEADLINE = 120.0  # seconds for a command to end; only a broken one takes so long


@dataclass(frozen=True)
class Result:
    """How a command ended. `sentence` is its stderr."""

    code: int
    stdout: str
    sentence: str


Moehive = Callable[..., Result]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The state directory of `moehive`; not there yet."""
    return tmp_path / "home"


@pytest.fixture
def environment(home: Path) -> dict[str, str]:
    """Of a command whose state is in `home`."""
    return _environment(home)


def _environment(home: Path) -> dict[str, str]:
    """Without a person's own settings; wide, so that help is not wrapped in the middle of what is looked for."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MOEHIVE_")}
    return kept | {"MOEHIVE_HOME": str(home), "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}


@pytest.fixture
def moehive(environment: dict[str, str]) -> Moehive:
    """Runs `moehive ARGUMENTS` to its end; no traceback may come out."""

    def run(*arguments: str, **more: str) -> Result:
        done = subprocess.run(
            [*COMMAND, *arguments],
            capture_output=True,
            text=True,
            env=environment | more,
            stdin=subprocess.DEVNULL,
            timeout=DEADLINE,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Result(done.returncode, done.stdout, done.stderr)

    return run


class Running:
    """`moehive up --json` that said that it is ready."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, stdin=subprocess.DEVNULL, text=True, env=environment
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, log.read_text()
        self.ready: dict[str, Any] = json.loads(line)
        self.address = f"127.0.0.1:{self.ready['grpc_port']}"
        self.nodes = psutil.Process(self.process.pid).children(recursive=True)

    def nodes_left(self, seconds: float) -> list[psutil.Process]:
        """The node processes that still run after at most `seconds`."""
        left: list[psutil.Process] = psutil.wait_procs(self.nodes, timeout=seconds)[1]
        return left


@pytest.fixture
def up(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts `moehive up --json ARGUMENTS` and waits until it is ready."""
    started: list[Running] = []

    def start(*arguments: str) -> Running:
        running = Running([*COMMAND, "up", "--json", *arguments], environment, tmp_path / "up.log")
        started.append(running)
        return running

    yield start
    _end(started)


@pytest.fixture(scope="module")
def up_together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, Running]]]:
    """Starts `moehive up --json` by name with each one's arguments, three at a time, each with a state of its own."""
    started: dict[str, Running] = {}

    def start(arguments: dict[str, list[str]]) -> dict[str, Running]:
        def one(name: str) -> None:
            folder = tmp_path_factory.mktemp(name)
            command = [*COMMAND, "up", "--json", *arguments[name]]
            started[name] = Running(command, _environment(folder / "home"), folder / "up.log")

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(one, arguments))
        return started

    yield start
    _end(started.values())


def _end(started: Iterable[Running]) -> None:
    for running in started:
        running.process.kill()
    for running in started:
        running.process.wait()
        running.nodes_left(10)


def _save(config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral without a tokenizer."""
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, eos_token_id=None)
    return _save(config, tmp_path_factory.mktemp("moe") / "tiny-mixtral")


@pytest.fixture(scope="session")
def tiny_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama: not a mixture of experts."""
    return _save(transformers.LlamaConfig(**SIZES), tmp_path_factory.mktemp("dense") / "tiny-llama")
