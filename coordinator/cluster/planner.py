"""The plan that comes next: over the nodes that are here, when policy.py asks for one, or a better one for traffic.

How a plan is made, gets its epoch and is kept is plans.py's.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from moehive.kernels.geometry import LayerGeometry

from ..types import CoordinatorError, NodeName, Plan
from . import policy
from .events import Event, Planned
from .plans import ModelTooLarge, Plans
from .state import ClusterState

log = logging.getLogger(__name__)


class Planner:
    """Use it on the event loop's thread; plans are made on others, one at a time."""

    def __init__(
        self,
        plans: Plans,
        layers: Sequence[LayerGeometry],
        min_nodes: int,
        state: Callable[[], ClusterState],
        record: Callable[[Event | None], None],
    ) -> None:
        """`state`: the cluster's, now. `record` gets a new plan's event, or None when there is none after all."""
        self.shortage = ""  # why no plan could be made
        self._plans = plans
        self._layers = layers
        self._min_nodes = min_nodes
        self._state = state
        self._record = record
        self._too_small: Mapping[NodeName, int] | None = None  # for these there is no plan
        self._held_bytes: dict[NodeName, int] = {}  # of the latest plan's slices
        self._planning: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether the next plan is being made."""
        return self._planning is not None

    def measure(self, plan: Plan, owners: frozenset[NodeName]) -> None:
        """Notes the sizes of the latest plan's slices."""
        self._held_bytes = {name: self._plans.slice_bytes(plan, name) for name in owners}

    def replan(self, away_since: Mapping[NodeName, float]) -> None:
        """Begins the next plan if it is wanted; `away_since`: of each absent node, seconds of the loop's clock."""
        if self._planning is not None:
            return
        now = asyncio.get_running_loop().time()
        away = {name: now - since for name, since in away_since.items()}
        capacities = self._usable()
        wanted = policy.wants_plan(self._state(), self._min_nodes, self._held_bytes, away)
        if wanted and capacities != self._too_small:
            self._planning = asyncio.create_task(self._plan(capacities))

    async def find_room(self, name: NodeName) -> None:
        """Returns if the others can hold what a node holds; raises CoordinatorError when they can't."""
        if policy.is_needed(self._state(), name):
            await asyncio.to_thread(self._plans.make, self._usable(without=name), self._state())

    async def improve(self, find: Callable[[Mapping[NodeName, int], int, Plan], Plan | None]) -> None:
        """Loads a better plan over the same nodes, if `find`, on a thread, has one.

        `find` is given their bytes, the new plan's epoch, and the plan in force.
        """
        active, capacities = self._state().active, self._usable()
        if active is None or not self._may_improve(active, capacities):
            return

        def found(epoch: int) -> Plan | None:
            plan = find(capacities, epoch, active)
            return plan if self._may_improve(active, capacities) else None

        plan = await asyncio.to_thread(self._plans.claim_better, found, self._state)
        if plan is not None and plan.epoch > self._state().epoch and self._may_improve(active, capacities):
            log.info("Plan of epoch %d, for the traffic of late.", plan.epoch)
            self._record(Planned(plan, frozenset(capacities)))

    async def stop(self) -> None:
        """Drops the plan that is being made."""
        if self._planning is not None:
            self._planning.cancel()
            await asyncio.gather(self._planning, return_exceptions=True)

    async def _plan(self, capacities: Mapping[NodeName, int]) -> None:
        """Makes the next plan the pending one; on failure keeps what there is and remembers why."""
        event: Event | None = None
        try:
            plan = await asyncio.to_thread(self._plans.claim, capacities, self._state())
            self.shortage, self._too_small = "", None
            if self._usable() == capacities:  # else: somebody came or went, and it is decided anew
                log.info("Plan of epoch %d over %s.", plan.epoch, ", ".join(sorted(capacities)))
                event = Planned(plan, frozenset(capacities))
        except CoordinatorError as error:
            if str(error) != self.shortage:
                log.warning("No new plan: %s", error)
            self.shortage = str(error)
            if isinstance(error, ModelTooLarge):
                self._too_small = capacities
        finally:
            self._planning = None
        self._record(event)

    def _usable(self, without: NodeName | None = None) -> dict[NodeName, int]:
        return policy.usable(self._state(), self._layers, without)

    def _may_improve(self, active: Plan, capacities: Mapping[NodeName, int]) -> bool:
        """Whether `active` serves and nobody comes or goes."""
        state = self._state()
        steady = state.pending is None and self._planning is None and self._usable() == capacities
        return steady and state.active is active and state.ready and capacities.keys() == state.members
