"""What 8-bit hidden states do to a model's logits: `moehive bench hop` prints it.

The same text twice through the same trunk and the same experts, in this process: once as it is, once with every
message of the hop written and read as on a slow link. The difference is the rounding alone.
"""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from importlib.resources import files

import torch

from moehive.kernels.geometry import ExpertId
from moehive.kernels.ops import Reduction
from moehive.proto import experts_pb2 as pb
from moehive.proto.tensors import (
    head_bytes,
    parse_reply,
    parse_request,
    read_request,
    read_values,
    reply_pieces,
    routing_bytes,
    write_head,
)

from ..checkpoints.opening import open_model
from ..dispatch.local import LocalExperts
from ..dispatch.routing import split
from ..models.base import SequenceInput
from ..precision.forward import divergence
from ..serving.text import Text
from ..trunk import load_trunk

TOKENS = 256
NODES = 3  # each rounds its own partial sum


class _Rounding:
    """An `ExpertBackend` whose experts are here, by made-up nodes, behind the hop's messages."""

    def __init__(self, experts: LocalExperts, counts: list[int], eight_bit: bool) -> None:
        self._experts = experts
        self._owners = [torch.arange(count).remainder(NODES).numpy() for count in counts]
        self._eight_bit = eight_bit

    def submit(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> Awaitable[torch.Tensor]:
        return self._compute(layer, hidden, ids, weights)

    async def _compute(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros(hidden.shape)
        for share in split(ids.to(torch.int64).numpy(), weights.float().numpy(), self._owners[layer]).values():
            tokens = torch.from_numpy(share.tokens)
            request = pb.ComputeRequest(reduction=pb.REDUCTION_PARTIAL_SUM)
            raw = write_head(request, hidden[tokens], self._eight_bit)
            pieces = head_bytes(request, len(raw)), raw, routing_bytes(share.routing)
            states, routing = read_request(parse_request(b"".join(pieces)))
            rows = self._experts.compute(layer, states, routing, Reduction.PARTIAL_SUM)
            reply = parse_reply(b"".join(reply_pieces(pb.ComputeReply(), rows, request.dtype)))
            total.index_add_(0, tokens, read_values(reply, len(tokens), hidden.shape[1], rows.dtype).float())
        return total.to(hidden.dtype)


@dataclass(frozen=True, slots=True)
class Rounding:
    """What 8 bits did to the predictions of `tokens` tokens."""

    tokens: int
    kl: float  # divergence from the exact distribution to the one with rounding, nats a token, mean
    same_choice: float  # share of tokens whose most likely successor stayed the same


def measure_rounding(model: str) -> Rounding:
    """Runs a text through `model` (a path or a hub id) with and without rounding. Raises CoordinatorError."""
    return asyncio.run(_measure(model))


async def _measure(model: str) -> Rounding:
    checkpoint = open_model(model)
    trunk = load_trunk(checkpoint, 1)
    manifest = checkpoint.manifest
    experts = LocalExperts(manifest, 1)
    counts = [layer.experts for layer in manifest.layers]
    every = [ExpertId(layer, expert) for layer, count in enumerate(counts) for expert in range(count)]
    experts.hold(every, checkpoint.expert_blob)
    text = files("moehive.coordinator.demo").joinpath("calibration.txt").read_text("utf-8")
    ids = torch.tensor((await Text(*checkpoint.tokenizer()).encode(text))[:TOKENS])
    logs = []
    for eight_bit in (False, True):
        batch = [SequenceInput(ids, trunk.new_cache(), all_logits=True)]
        (logits,) = await trunk.forward(batch, _Rounding(experts, counts, eight_bit))
        logs.append(logits.log_softmax(-1))
    exact, rounded = logs
    same = (exact.argmax(-1) == rounded.argmax(-1)).float().mean()
    return Rounding(len(ids), divergence([exact], [rounded]), float(same))
