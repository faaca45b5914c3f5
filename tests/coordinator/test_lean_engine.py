"""Continuous batching on the real thing: a text and its log-probabilities do not depend on who else is served."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from moehive.coordinator.checkpoints.checkpoint import Checkpoint
from moehive.coordinator.dispatch.dispatcher import Dispatcher
from moehive.coordinator.dispatch.local import LocalExperts
from moehive.coordinator.engine.engine import Engine
from moehive.coordinator.models.lean.trunk import LeanTrunk
from moehive.coordinator.trunk import load_trunk
from moehive.coordinator.types import LOCAL, GenerationRequest, Plan, SamplingParams, Token
from moehive.kernels.geometry import ExpertId
from moehive.kernels.ops import Reduction


@pytest.mark.parametrize("family", ["mixtral", "qwen3_5_moe_text", "deepseek_v3"])
def test_bits_do_not_depend_on_company(family: str, tiny_moe: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(tiny_moe(family))
    trunk = load_trunk(checkpoint, 1)
    assert isinstance(trunk, LeanTrunk)
    manifest = checkpoint.manifest
    local = LocalExperts(manifest, 1)
    everything = [ExpertId(n, e) for n, layer in enumerate(manifest.layers) for e in range(layer.experts)]
    local.hold(everything, checkpoint.expert_blob)
    dispatcher = Dispatcher(manifest, local, Reduction.PER_EXPERT)
    dispatcher.follow(Plan(1, tuple(((LOCAL,),) * layer.experts for layer in manifest.layers)))

    async def text(engine: Engine, n: int) -> list[tuple[int, float | None]]:
        prompt = tuple(3 + (7 * n + i * i) % 120 for i in range(1 + 9 * n))
        request = GenerationRequest(
            request_id=f"{n}", prompt=prompt, sampling=SamplingParams(temperature=0), max_tokens=12, logprobs=1
        )
        return [(event.id, event.logprob) async for event in engine.generate(request) if isinstance(event, Token)]

    async def run() -> None:
        engine = Engine(trunk, dispatcher, 1 << 30)
        alone = [await text(engine, n) for n in range(6)]
        together = await asyncio.gather(*(text(engine, n) for n in range(6)))
        assert list(together) == alone
        engine.check_integrity()

    asyncio.run(run())
