"""The greenlet bridge and the trunk: passes that take turns, are cancelled or fail; and what is refused."""

import asyncio
import gc
import json
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, LlamaConfig, LlamaForCausalLM

from moehive.coordinator.checkpoints.checkpoint import Checkpoint
from moehive.coordinator.models import bridge
from moehive.coordinator.models.base import SequenceInput
from moehive.coordinator.models.generic import GenericTrunk
from moehive.coordinator.types import CoordinatorError, NodeUnavailable

DEADLINE = 20  # seconds for anything that must not hang
MakeTrunk = Callable[[Checkpoint], GenericTrunk]


def prompt(seed: int, length: int) -> torch.Tensor:
    return torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(seed))


async def generate(trunk: GenericTrunk, backend: Any, tokens: torch.Tensor, steps: int) -> torch.Tensor:
    cache = trunk.new_cache()
    logits = await trunk.forward([SequenceInput(tokens, cache)], backend)
    for _ in range(steps):
        logits += await trunk.forward([SequenceInput(logits[-1].argmax()[None], cache)], backend)
    return torch.stack(logits)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_5_moe_text"])
def test_interleaved_sequences_equal_each_alone(
    family: str, tiny_moe: Callable[[str], Path], reference_backend: Any, make_trunk: MakeTrunk
) -> None:
    checkpoint = Checkpoint.open(tiny_moe(family))
    trunk = make_trunk(checkpoint)
    work = [(prompt(seed, length), steps) for seed, length, steps in ((1, 3, 9), (2, 17, 4), (3, 8, 12))]

    class Counting(reference_backend):  # type: ignore[misc]
        """Notes in which order sequences ask, to see that they did take turns."""

        def __init__(self, sequence: int) -> None:
            super().__init__(checkpoint)
            self.sequence = sequence

        def submit(self, *arguments: Any) -> Awaitable[torch.Tensor]:
            order.append(self.sequence)
            return super().submit(*arguments)  # type: ignore[no-any-return]

    order: list[int] = []
    alone = [asyncio.run(generate(trunk, Counting(0), *item)) for item in work]

    async def together() -> list[torch.Tensor]:
        order.clear()
        return await asyncio.gather(*(generate(trunk, Counting(n), *item) for n, item in enumerate(work)))

    mixed = asyncio.run(together())
    assert order[:6] == [0, 1, 2, 0, 1, 2]
    for one, other in zip(alone, mixed, strict=True):
        assert torch.equal(one, other)


def test_cancellation_unwinds_the_pass_and_leaks_nothing(
    tiny_moe: Callable[[str], Path], reference_backend: Any, make_trunk: MakeTrunk
) -> None:
    checkpoint = Checkpoint.open(tiny_moe("mixtral"))
    trunk = make_trunk(checkpoint)
    passes: list[weakref.ref[bridge.Forward]] = []

    async def main() -> None:
        waiting = asyncio.Event()

        class Hanging:
            async def submit(self, *_: Any) -> torch.Tensor:
                waiting.set()
                await asyncio.Event().wait()
                raise AssertionError("never reached")

        class Watching:
            """Keeps a weak reference to the greenlet that is given to each call."""

            def submit(self, *arguments: Any) -> Any:
                passes.append(weakref.ref(bridge.current()))
                return Hanging().submit(*arguments)

        task = asyncio.create_task(trunk.forward([SequenceInput(prompt(1, 4), trunk.new_cache())], Watching()))
        await asyncio.wait_for(waiting.wait(), DEADLINE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, DEADLINE)

    asyncio.run(main())
    gc.collect()
    assert len(passes) == 1
    assert passes[0]() is None, "the cancelled pass is still alive"
    backend = reference_backend(checkpoint)
    assert torch.isfinite(asyncio.run(generate(trunk, backend, prompt(1, 4), 2))).all()


def test_a_node_that_fails_ends_the_pass_with_its_error(
    tiny_moe: Callable[[str], Path], reference_backend: Any, make_trunk: MakeTrunk
) -> None:
    checkpoint = Checkpoint.open(tiny_moe("qwen3_moe"))
    trunk = make_trunk(checkpoint)

    class Failing(reference_backend):  # type: ignore[misc]
        def submit(self, layer: int, *arguments: Any) -> Awaitable[torch.Tensor]:
            if layer == 1:
                raise NodeUnavailable("attic", "The node attic is away; start it again.")
            return super().submit(layer, *arguments)  # type: ignore[no-any-return]

    with pytest.raises(NodeUnavailable, match="attic"):
        asyncio.run(trunk.forward([SequenceInput(prompt(1, 4), trunk.new_cache())], Failing(checkpoint)))
    # Another sequence, with a cache of its own, is not touched by it.
    assert torch.isfinite(asyncio.run(generate(trunk, reference_backend(checkpoint), prompt(1, 4), 1))).all()


def test_experts_outside_of_a_pass_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="forward pass"):
        bridge.current()


def test_context_variables_are_each_pass_own() -> None:
    """transformers captures outputs through context variables: a pass must not see another's."""
    import contextvars

    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)

    async def turn() -> torch.Tensor:
        await asyncio.sleep(0)
        return torch.zeros(())

    def body(value: int) -> Callable[[], int]:
        def function() -> int:
            token = variable.set(value)
            bridge.await_in_forward(turn())
            seen = variable.get()
            variable.reset(token)
            return seen

        return function

    async def main() -> list[int]:
        backend: Any = None
        return await asyncio.gather(*(bridge.run(body(value), backend) for value in (1, 2, 3)))

    assert asyncio.run(main()) == [1, 2, 3]
    assert variable.get() == 0


def test_bf16_keeps_to_transformers(
    tiny_moe: Callable[[str], Path], tmp_path: Path, reference_backend: Any, make_trunk: MakeTrunk
) -> None:
    """A bf16 checkpoint is computed in bf16; its experts' sums come back in bf16 too."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_moe("mixtral"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.dtype == torch.bfloat16
    assert {layer.spec.format for layer in checkpoint.manifest.layers} == {"bf16"}
    trunk = make_trunk(checkpoint)
    tokens = prompt(4, 10)
    batch = [SequenceInput(tokens, trunk.new_cache(), all_logits=True)]
    (ours,) = asyncio.run(trunk.forward(batch, reference_backend(checkpoint)))
    assert ours.dtype == torch.float32
    with torch.no_grad():
        theirs = model(input_ids=tokens[None]).logits[0].float()
    difference = (torch.log_softmax(ours, -1) - torch.log_softmax(theirs, -1)).abs().max()
    assert difference < 0.1  # bf16 has 8 bits; three layers round differently here and there


def test_chunks_are_only_where_they_are_right(tiny_moe: Callable[[str], Path], make_trunk: MakeTrunk) -> None:
    expected = {
        "mixtral": 512,
        "gpt_oss": 512,
        "qwen3_next": 512,
        "jamba": 1024,
        "minimax": 1024,
        "deepseek_v32": 1024,
    }
    assert {f: make_trunk(Checkpoint.open(tiny_moe(f))).prefill_chunk for f in expected} == expected


def rewrite_config(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a checkpoint that differs in its config."""
    for file in source.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(CoordinatorError, match="not a mixture-of-experts model"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "no_such_family"}, "no_such_family.*does not know"),
        ({"model_type": None}, "no model_type"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"hidden_act": "tanh"}, "mixtral use an activation or a gate that is not supported"),
        ({"hidden_size": 48}, "shape"),
        ({"num_hidden_layers": 4}, "no tensors for model.layers.3"),
        ({"num_attention_heads": "many"}, "not a valid mixtral config"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_a_config_that_cannot_be_served_is_one_sentence(
    changes: dict[str, Any], sentence: str, tiny_moe: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = rewrite_config(tiny_moe("mixtral"), tmp_path, **changes)
    with pytest.raises(CoordinatorError, match=sentence) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["openai_privacy_filter", "diffusion_gemma"])
def test_a_model_that_does_not_generate_from_left_to_right_is_refused(
    family: str, tiny_moe: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = rewrite_config(tiny_moe("mixtral"), tmp_path)
    CONFIG_MAPPING[family]().save_pretrained(folder)
    with pytest.raises(CoordinatorError, match="not a causal language model"):
        Checkpoint.open(folder)


def test_a_gate_that_no_spec_describes_names_the_family(tiny_moe: Callable[[str], Path], tmp_path: Path) -> None:
    """inkling2 caps its gate with a tanh, which ExpertSpec cannot say."""
    folder = rewrite_config(tiny_moe("mixtral"), tmp_path, model_type="inkling2_text")
    with pytest.raises(CoordinatorError, match="inkling2_text"):
        Checkpoint.open(folder)
