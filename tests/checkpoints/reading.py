"""A checkpoint as it is computed, all in this process, against transformers' model. Plain module."""

import asyncio
from typing import Any

import torch

from moehive.coordinator.dispatch.local import LocalExperts
from moehive.coordinator.models.base import SequenceInput
from moehive.coordinator.trunk import load_trunk
from moehive.kernels.blob import decode_tensor, tensor_views
from moehive.kernels.geometry import ExpertId
from moehive.kernels.ops import Reduction
from moehive.proto.tensors import Routing

PROMPT = [3, 17, 5, 99, 42, 8, 61, 7, 30]
STEPS = 12


class NativeBackend:
    """`ExpertBackend` in this process: all experts in RAM, on the native kernels."""

    def __init__(self, checkpoint: Any) -> None:
        self._local = LocalExperts(checkpoint.manifest, 1)
        layers = enumerate(checkpoint.manifest.layers)
        experts = [ExpertId(layer, e) for layer, geometry in layers for e in range(geometry.experts)]
        self._local.hold(experts, checkpoint.expert_blob)

    async def submit(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        tokens, each = ids.shape
        routing = Routing(
            torch.arange(0, (tokens + 1) * each, each).numpy().astype("uint32"),
            ids.flatten().numpy().astype("uint32"),
            weights.float().flatten().numpy(),
        )
        await asyncio.sleep(0)
        return self._local.compute(layer, hidden, routing, Reduction.PARTIAL_SUM)


def logits(checkpoint: Any, tokens: list[int]) -> torch.Tensor:
    """[tokens, vocabulary], of one pass."""
    return passes(checkpoint, tokens)[0]


def passes(checkpoint: Any, tokens: list[int], steps: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of one pass over all tokens, and those of the last `steps`, one by one as a text is continued."""
    trunk, backend = load_trunk(checkpoint, 1), NativeBackend(checkpoint)

    async def run() -> tuple[torch.Tensor, torch.Tensor]:
        async def forward(tokens: list[int], cache: Any) -> torch.Tensor:
            sequence = SequenceInput(torch.tensor(tokens), cache, all_logits=True)
            return (await trunk.forward([sequence], backend))[0].float()

        whole, rows = await forward(tokens, trunk.new_cache()), []
        if steps:
            cache = trunk.new_cache()
            await forward(tokens[:-steps], cache)
            rows = [await forward([token], cache) for token in tokens[-steps:]]
        return whole, torch.cat(rows) if rows else whole[:0]

    return asyncio.run(run())


def decoded(checkpoint: Any, expert: ExpertId) -> dict[str, torch.Tensor]:
    spec = checkpoint.manifest.layers[expert.layer].spec
    views = tensor_views(spec, checkpoint.expert_blob(expert))
    return {place.name: decode_tensor(place, views[place.name]) for place in spec.tensors}


def check_text(model: Any, checkpoint: Any) -> None:
    """Teacher-forced on transformers' greedy text: the same choices, and a small divergence."""
    text = greedy(model, PROMPT, STEPS)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([PROMPT + text])).logits[0].log_softmax(-1)
    measured = logits(checkpoint, PROMPT + text).log_softmax(-1)
    divergence = (expected.exp() * (expected - measured)).sum(-1)
    # Activations are rounded to 8 bits and bf16 on the way; a wrong scale or row costs some 0.1 nats and more.
    assert divergence.mean() < 3e-3
    top = expected.topk(2, -1).values
    sure = (top[:, 0] - top[:, 1]) > 0.1  # nats; what is nearly a tie may fall either way
    assert sure.sum() > len(sure) // 2
    other = sure & (measured.argmax(-1) != expected.argmax(-1))
    assert other.sum() <= 1, "a token whose experts are nearly a tie may be sent to others, rarely"
    assert (divergence[other] > 10 * divergence.median()).all(), "it stands alone: a wrong scale or row is in all"


@torch.no_grad()
def greedy(model: Any, prompt: list[int], steps: int) -> list[int]:
    """transformers' greedy tokens."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]
