"""Now and then an answer is computed again here, so that a node with damaged memory, or a liar, is found.

One token of one reply at a time, in the background, with experts read from the checkpoint: the answer has been used
by then. What differs by more than TOLERANCE of its size is no rounding, of 8-bit links neither. When the sum of a
chain of nodes is wrong, each of them is a suspect, whose next own answer is checked.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

import torch

from moehive.kernels.geometry import ExpertId, Manifest
from moehive.kernels.ops import Reduction
from moehive.proto.tensors import Routing

from ..types import CoordinatorError, NodeName
from .local import LocalExperts
from .parts import Part
from .rows import Rows

log = logging.getLogger(__name__)

EVERY_LAYERS = 5000  # one check in so many layers: at 60 layers and 20 tokens a second, every four seconds
TOLERANCE = 0.1
SMALLEST = 1e-4  # norm of an answer below which the tolerance says nothing


class SpotCheck:
    """Use it on the event loop's thread."""

    def __init__(
        self,
        manifest: Manifest,
        read: Callable[[ExpertId], torch.Tensor],
        on_lie: Callable[[NodeName, str], None],
        on_doubt: Callable[[Sequence[NodeName]], object],
    ) -> None:
        """`read` gives an expert's blob. `on_lie` hears of a node whose answer was wrong, with a sentence.

        `on_doubt` hears of the nodes of a chain whose sum was wrong.
        """
        self._manifest = manifest
        self._read = read
        self._on_lie = on_lie
        self._on_doubt = on_doubt
        self._check_at = EVERY_LAYERS
        self._suspects: set[NodeName] = set()
        self._task: asyncio.Task[None] | None = None
        self.checked = 0  # answers

    def wants(self, layers: int) -> bool:
        """Whether an answer to one of the next layers may be compared; `layers` since the start."""
        return layers >= self._check_at or bool(self._suspects)

    def answered(self, part: Part, hidden: torch.Tensor, answer: Rows, reduction: Reduction, layers: int) -> None:
        """Compares, if it is time, the first token's rows of a reply to `part` of a layer's `hidden` states.

        `layers` since the start. Returns at once.
        """
        suspect = not part.chained and part.node in self._suspects
        if (layers < self._check_at and not suspect) or (self._task is not None and not self._task.done()):
            return
        self._check_at = layers + EVERY_LAYERS
        self._suspects.discard(part.node)
        routing = part.share.routing
        end = int(routing.offsets[1])
        one = Routing(routing.offsets[:2].copy(), routing.experts[:end].copy(), routing.weights[:end].copy())
        rows = answer.values[: end if reduction is Reduction.PER_EXPERT else 1].float().clone()
        token = int(part.share.tokens[0])
        self._task = asyncio.get_running_loop().create_task(
            self._check(part.nodes, part.layer, hidden[token : token + 1].clone(), one, rows, reduction)
        )

    async def stop(self) -> None:
        """Ends a check in hand."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _check(
        self,
        nodes: Sequence[NodeName],
        layer: int,
        hidden: torch.Tensor,
        routing: Routing,
        rows: torch.Tensor,
        reduction: Reduction,
    ) -> None:
        try:
            right = await asyncio.to_thread(self._compute, layer, hidden, routing, reduction)
        except (CoordinatorError, OSError, MemoryError) as error:
            log.warning("An answer of %s could not be checked: %s", ", ".join(nodes), error)
            return
        self.checked += 1
        size = float(right.norm())
        if size <= SMALLEST or float((right - rows).norm()) <= TOLERANCE * size:
            return
        if len(nodes) == 1:
            self._on_lie(nodes[0], f"Node {nodes[0]} answered wrong sums in layer {layer}.")
        else:
            log.warning("The sum of %s was wrong in layer %d; each of them is checked.", ", ".join(nodes), layer)
            self._suspects.update(nodes)
            self._on_doubt(nodes)

    def _compute(self, layer: int, hidden: torch.Tensor, routing: Routing, reduction: Reduction) -> torch.Tensor:
        local = LocalExperts(self._manifest, threads=1)
        local.hold([ExpertId(layer, expert) for expert in set(routing.experts.tolist())], self._read)
        return local.compute(layer, hidden, routing, reduction).float()
