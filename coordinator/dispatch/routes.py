"""Which node computes which expert now: the plan in force, who of its nodes can be asked, and how quick each is."""

import asyncio
from collections.abc import Callable, Collection, Sequence

import numpy as np
import numpy.typing as npt

from ..changes import Changes
from ..types import NodeName, NodeUnavailable, NotReady, Plan
from .asking import Asking
from .placed import Placed
from .routing import Owner
from .speed import LinkSpeed
from .speeds import FEW_TOKENS, UNHEARD, NodeSpeed, Speeds


class Routes:
    """Use it on the event loop's thread. `changed` is called when somebody can be asked again or no more."""

    def __init__(self, expert_bytes: Sequence[int], with_local: bool, changed: Callable[[], None]) -> None:
        """`expert_bytes`: of an expert of each layer; `with_local`: this process holds experts too."""
        self.asking = Asking(self._place)
        self.speeds = Speeds()
        self._expert_bytes = expert_bytes
        self._with_local = with_local
        self._changed = changed
        self._placed: Placed | None = None
        self._prepared: Placed | None = None
        self._figures: list[tuple[NodeSpeed, LinkSpeed | None]] = []  # of each node of the plan in force
        self._changes = Changes()

    @property
    def placed(self) -> Placed:
        """The plan in force. Raises NotReady before the first."""
        if self._placed is None:
            raise NotReady("The cluster does not hold the model yet; `moehive status` says what is missing.")
        return self._placed

    @property
    def epoch(self) -> int:
        """Of the plan in force; 0 before the first."""
        return self._placed.plan.epoch if self._placed is not None else 0

    @property
    def lost(self) -> int:
        """Experts that no node can be asked for now."""
        return self._placed.lost if self._placed is not None else 0

    async def prepare(self, plan: Plan) -> None:
        """Makes ready to follow `plan` later, on a thread: with many experts it takes a while."""
        self._prepared = await asyncio.to_thread(Placed, plan)

    def follow(self, plan: Plan, holding: Collection[NodeName] | None) -> None:
        """Puts `plan` in force; asks those that are `holding` their slices (None: as before)."""
        prepared, self._prepared = self._prepared, None
        self._placed = prepared if prepared is not None and prepared.plan is plan else Placed(plan)
        if holding is not None:
            self.asking.holding(holding)
        self._place()

    def holding(self, nodes: Collection[NodeName]) -> None:
        """From now on only these hold their slice of the plan in force."""
        self.asking.holding(nodes)
        self._place()

    def tick(self) -> None:
        """A layer is being dispatched."""
        self.speeds.tick()
        if self.speeds.layers % UNHEARD == 0:
            for link in self.asking.links.values():
                link.speed.forgive()

    def owner(self, layer: int, ids: npt.NDArray[np.int64], avoid: Collection[NodeName] = ()) -> Owner:
        """A node's index for each expert that `ids` [tokens, k] name; other experts' do not matter."""
        placed = self.placed
        if avoid:
            return placed.owners_but(layer, avoid)
        if not placed.has_choice[layer]:
            return placed.owners[layer]
        many = len(ids) > FEW_TOKENS  # those are computed as pairs, few are read as bytes
        return placed.holders(layer).choose(ids, many, *self._costs(self._expert_bytes[layer], many))

    async def change(self) -> None:
        """Returns when somebody can be asked again or no more."""
        await self._changes.next()

    def unavailable(self, layer: int, expert: int) -> NodeUnavailable:
        """The error of a request for an expert that nobody can compute."""
        node = self.placed.plan.owners[layer][expert][0]
        return NodeUnavailable(
            node,
            f"Node {node} is away, and nobody else could load the experts that this request needs; the request can "
            "be sent again once it is back.",
        )

    def _costs(self, nbytes: int, many: bool) -> tuple[list[float], list[float]]:
        """For each node of the plan: seconds before anything comes from it, and for an expert or, of `many`, a pair.

        By how much all nodes are late is this process's own doing, and says nothing for or against one of them.
        """
        late = min([link.late_s for _, link in self._figures if link is not None], default=0.0)
        base = [
            speed.backlog_s if link is None else speed.backlog_s + link.round_trip_s + (link.late_s - late)
            for speed, link in self._figures
        ]
        return base, [speed.pair_s(nbytes) if many else speed.read_s_per_byte * nbytes for speed, _ in self._figures]

    def _place(self) -> None:
        if self._placed is None:
            return
        self._placed.use(self.asking.live(self._with_local))
        links = self.asking.links
        self._figures = [
            (self.speeds.of(name), links[name].speed if name in links else None) for name in self._placed.names
        ]
        self._changed()
        self._changes.tell()
