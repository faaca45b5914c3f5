"""A coordinator's gRPC door over a fake trunk, on a loop of its own."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from by_path import load
from loops import LoopInAThread, loop_in_a_thread

from moehive.coordinator.engine.engine import Engine
from moehive.coordinator.serving.generation import GenerationService
from moehive.coordinator.serving.grpc_api import serve_grpc
from moehive.coordinator.serving.status import ClusterStatus, ModelInfo, NodeStatus
from moehive.coordinator.serving.text import Text


class Letters:
    """A tokenizer of one letter a token: id 0 ends a text, 1 to 26 are a to z."""

    chat_template = "letters"

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) - 96 for letter in text] for text in texts]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "".join(message["role"] + message["content"] for message in messages)

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(96 + token) for token in ids if token)

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.decode([token])


class Door:
    """What a test wants to look at."""

    def __init__(self, fakes: ModuleType, loop: LoopInAThread) -> None:
        self.fakes = fakes
        self.loop = loop.loop
        self.run = loop.run
        self.experts = fakes.FakeExperts()
        trunk = fakes.FakeTrunk(vocab_size=27, context_length=1024)
        self.engine = Engine(trunk, self.experts, 10_000_000)
        model = ModelInfo(
            id="letters",
            family="fake",
            context_length=1024,
            vocabulary=27,
            moe_layers=3,
            experts_per_layer=4,
            expert_bytes=5,
        )
        node = NodeStatus(name="a", state="ready", address="h:1", experts_held=12, read_bandwidth=1e9)
        status = ClusterStatus(ready=True, epoch=2, nodes=(node,), uptime_seconds=2.0)
        self.service = GenerationService(self.engine, Text(Letters(), frozenset({0})), model, lambda: status)

    def serve(self, port: int = 0, **options: Any) -> Any:
        return self.run(serve_grpc("127.0.0.1", port, self.service, **options))


@pytest.fixture
def door() -> Iterator[Door]:
    """A service on a running loop; `door.serve()` opens it."""
    fakes = load(Path(__file__).parents[1] / "engine" / "fakes.py")
    with loop_in_a_thread() as loop:
        yield Door(fakes, loop)
