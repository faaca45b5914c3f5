"""A real tokenizer, a fake trunk, and both doors over them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from by_path import load
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moehive.coordinator.engine.engine import Engine
from moehive.coordinator.serving.generation import GenerationService
from moehive.coordinator.serving.status import ClusterStatus, ModelInfo, NodeStatus
from moehive.coordinator.serving.text import Text

settings.register_profile("no-deadline", deadline=None)  # two shared cores say nothing about time
settings.load_profile("no-deadline")

CORPUS = [
    "The capital of France is Paris. The capital of Spain is Madrid.",
    "Größe, naïve façade, 東京は日本の首都です。 Привет, мир! 🙂🙃 👩‍👩‍👧",
    "def step(self): return self.trunk.forward(tokens)",
] * 4
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no such role: ' + m['role']) }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def fakes() -> ModuleType:
    """The fake trunk of the engine's tests."""
    return load(Path(__file__).parents[1] / "engine" / "fakes.py")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", bos_token="<|endoftext|>", chat_template=TEMPLATE
    )


class Served:
    """A service and what a test wants to look at."""

    def __init__(self, fakes: ModuleType, text: Text, trunk: Any, kv_limit_bytes: int = 10_000_000) -> None:
        self.trunk = trunk
        self.experts = fakes.FakeExperts()
        self.engine = Engine(self.trunk, self.experts, kv_limit_bytes, max_waiting=2)
        self.status = ClusterStatus(
            ready=True, epoch=3, nodes=(NodeStatus(name="a", state="ready", experts_held=7),), uptime_seconds=1.5
        )
        model = ModelInfo(
            id="fake-moe",
            family="fake",
            context_length=trunk.context_length,
            vocabulary=trunk.vocab_size,
            moe_layers=3,
            experts_per_layer=8,
            expert_bytes=1234,
        )
        self.service = GenerationService(self.engine, text, model, lambda: self.status)


@pytest.fixture
def serve(fakes: ModuleType, tokenizer: PreTrainedTokenizerFast) -> Iterator[Callable[..., Served]]:
    """serve(says=…, **trunk options): a service; `says` is the text that the trunk answers to any prompt."""

    def make(says: str | None = None, kv_limit_bytes: int = 10_000_000, **options: Any) -> Served:
        options.setdefault("vocab_size", len(tokenizer))
        options.setdefault("context_length", 4096)
        if says is not None:
            script = [*tokenizer.encode(says, add_special_tokens=False), tokenizer.eos_token_id]

            def choose(history: Any) -> int:
                if history.prompt is None:
                    history.prompt = len(history)
                return script[min(len(history) - history.prompt, len(script) - 1)]

            options["prefill_chunk"] = options["context_length"]  # so that the first choice comes after the prompt
            options["choose"] = choose
        text = Text(tokenizer, frozenset({tokenizer.eos_token_id}))
        return Served(fakes, text, fakes.FakeTrunk(**options), kv_limit_bytes)

    yield make
