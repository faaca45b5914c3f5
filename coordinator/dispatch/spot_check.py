"""Now and then an answer is computed again here, so that a node with damaged memory, or a liar, is found.

One token of one reply at a time, in the background, with experts read from the checkpoint: the answer has been used
by then. What differs by more than TOLERANCE of its size is no rounding, of 8-bit links neither.
"""

import asyncio
import logging
from collections.abc import Callable

import torch

from moehive.kernels.geometry import ExpertId, Manifest
from moehive.kernels.ops import Reduction
from moehive.proto.tensors import Routing

from ..types import CoordinatorError, NodeName
from .local import LocalExperts
from .parts import Part

log = logging.getLogger(__name__)

EVERY_LAYERS = 5000  # one check in so many layers: at 60 layers and 20 tokens a second, every four seconds
TOLERANCE = 0.1
SMALLEST = 1e-4  # norm of an answer below which the tolerance says nothing


class SpotCheck:
    """`read` gives an expert's blob; `on_lie` hears of a node whose answer was wrong, with a sentence."""

    def __init__(
        self,
        manifest: Manifest,
        read: Callable[[ExpertId], torch.Tensor],
        on_lie: Callable[[NodeName, str], None],
    ) -> None:
        self._manifest = manifest
        self._read = read
        self._on_lie = on_lie
        self._task: asyncio.Task[None] | None = None
        self.checked = 0  # answers

    def check(self, part: Part, hidden: torch.Tensor, values: torch.Tensor, reduction: Reduction) -> None:
        """Compares the first token's rows of a reply to `part` of a layer's `hidden` states; returns at once."""
        if self._task is not None and not self._task.done():
            return
        routing = part.share.routing
        end = int(routing.offsets[1])
        one = Routing(routing.offsets[:2].copy(), routing.experts[:end].copy(), routing.weights[:end].copy())
        rows = values[: end if reduction is Reduction.PER_EXPERT else 1].float().clone()
        token = int(part.share.tokens[0])
        self._task = asyncio.get_running_loop().create_task(
            self._check(part.node, part.layer, hidden[token : token + 1].clone(), one, rows, reduction)
        )

    async def stop(self) -> None:
        """Ends a check in hand."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _check(
        self,
        node: NodeName,
        layer: int,
        hidden: torch.Tensor,
        routing: Routing,
        rows: torch.Tensor,
        reduction: Reduction,
    ) -> None:
        try:
            right = await asyncio.to_thread(self._compute, layer, hidden, routing, reduction)
        except (CoordinatorError, OSError, MemoryError) as error:
            log.warning("An answer of node %s could not be checked: %s", node, error)
            return
        self.checked += 1
        size = float(right.norm())
        if size > SMALLEST and not float((right - rows).norm()) <= TOLERANCE * size:
            self._on_lie(node, f"Node {node} answered wrong sums in layer {layer}.")

    def _compute(self, layer: int, hidden: torch.Tensor, routing: Routing, reduction: Reduction) -> torch.Tensor:
        local = LocalExperts(self._manifest, threads=1)
        local.hold([ExpertId(layer, expert) for expert in set(routing.experts.tolist())], self._read)
        return local.compute(layer, hidden, routing, reduction).float()
