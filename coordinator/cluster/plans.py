"""Makes the cluster's plans, gives them their epochs, and keeps the one in force for the next start.

What is slow for many experts (a plan, its slices, writing it down) happens on threads.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from moehive.kernels.geometry import Manifest

from ..types import CoordinatorError, NodeName, Plan
from . import policy
from .records import claim_epoch, last_epoch, load_plan, save_plan
from .state import ClusterState
from .store import Store

log = logging.getLogger(__name__)


class ModelTooLarge(CoordinatorError):
    """The nodes that are here can't hold the model; only other nodes, or more memory, help."""


class Plans:
    """Of one model. `keep` and `kept` belong to one event loop's thread; the rest may run on any."""

    def __init__(self, store: Store, manifest: Manifest, place: policy.Place) -> None:
        self._store = store
        self._manifest = manifest
        self._place = place
        self._saving: asyncio.Task[None] | None = None

    def make(self, capacities: Mapping[NodeName, int], state: ClusterState) -> Plan:
        """The plan that would be next over these nodes and their bytes.

        Raises ModelTooLarge when there is no room, another CoordinatorError when the store fails.
        """
        epoch = self._next_epoch(state)
        try:
            plan = self._place(capacities, self._manifest.layers, epoch, state.active or state.pending)
        except CoordinatorError as error:
            raise ModelTooLarge(str(error)) from error
        assert plan.slices  # worked out here, not on the loop
        return plan

    def claim(self, capacities: Mapping[NodeName, int], state: ClusterState) -> Plan:
        """The same, and its epoch is its own from now on."""
        plan = self.make(capacities, state)
        claim_epoch(self._store, plan.epoch)
        return plan

    def claim_better(self, find: Callable[[int], Plan | None], state: Callable[[], ClusterState]) -> Plan | None:
        """The plan that `find` has for an epoch, if any; its epoch, which may be a later one then, is claimed."""
        plan = find(self._next_epoch(state()))
        if plan is None:
            return None
        plan = replace(plan, epoch=self._next_epoch(state()))
        assert plan.slices  # worked out here, not on the loop
        claim_epoch(self._store, plan.epoch)
        return plan

    def slice_bytes(self, plan: Plan, name: NodeName) -> int:
        """Bytes of a node's slice."""
        layers = zip(self._manifest.layers, plan.slice_of(name), strict=True)
        return sum(layer.spec_of(expert).nbytes for layer, experts in layers for expert in experts)

    def last(self) -> tuple[Plan, frozenset[NodeName]] | None:
        """The plan that was in force last and its members, if there is one for this model."""
        return load_plan(self._store, self._manifest.fingerprint, self._manifest.layers)

    def keep(self, plan: Plan, members: frozenset[NodeName]) -> None:
        """Begins to write the plan in force down, after the earlier one."""
        self._saving = asyncio.create_task(self._save(plan, members, self._saving))

    async def kept(self) -> None:
        """Returns once all is written down."""
        if self._saving is not None:
            await self._saving

    async def _save(self, plan: Plan, members: frozenset[NodeName], earlier: "asyncio.Task[None] | None") -> None:
        if earlier is not None:
            await earlier
        try:
            await asyncio.to_thread(save_plan, self._store, self._manifest.fingerprint, plan, sorted(members))
        except CoordinatorError as error:
            log.error("The plan could not be kept for the next start: %s", error)

    def _next_epoch(self, state: ClusterState) -> int:
        return max(state.epoch, last_epoch(self._store)) + 1
