"""Which node fetches an expert from where, so that each expert leaves the coordinator once.

The first node that asks for an expert gets it from the coordinator and passes it on: whoever asks later is sent to
that node, which may still be waiting for it, or to any other that has reported it held. Waiting is never in a circle,
since only a node that fetches from the coordinator is waited for.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from moehive.kernels.geometry import ExpertId

from ..types import LOCAL, NodeName
from .state import ClusterState

log = logging.getLogger(__name__)


class Sources:
    """Used on the event loop's thread only. `state` gives the cluster as of now."""

    def __init__(self, state: Callable[[], ClusterState], expert_bytes: Callable[[ExpertId], int]) -> None:
        self._state = state
        self._expert_bytes = expert_bytes
        self._relays: dict[ExpertId, NodeName] = {}  # who was sent to the coordinator for an expert
        self._asked: Counter[NodeName] = Counter()  # bytes that each node was made to pass on
        self._faults: dict[NodeName, str] = {}

    def locate(
        self, asker: NodeName, experts: Sequence[ExpertId], avoid: Collection[NodeName]
    ) -> list[NodeName | None]:
        """A node for each expert, the one that had to pass on least so far; None: the coordinator."""
        return [self._locate(asker, expert, avoid) for expert in experts]

    def report(self, asker: NodeName, source: NodeName, expert: ExpertId) -> None:
        """A node got bytes from another that are not the expert's."""
        if source not in self._state().nodes:
            return
        self._faults[source] = f"gave {asker} wrong bytes of expert {expert.expert} of layer {expert.layer}"
        log.error("Node %s %s; fetched again from elsewhere.", source, self._faults[source])

    def fault(self, name: NodeName) -> str:
        """The last wrong thing that a node gave to another, for a person; empty when there is none."""
        return self._faults.get(name, "")

    def forget(self, name: NodeName) -> None:
        """A node's control stream has ended: nobody waits for what it was fetching."""
        self._relays = {expert: relay for expert, relay in self._relays.items() if relay != name}

    def _locate(self, asker: NodeName, expert: ExpertId, avoid: Collection[NodeName]) -> NodeName | None:
        relay = self._relays.get(expert)
        holders = self._holders(expert)
        if relay is not None and self._state().nodes[relay].present:
            holders.append(relay)
        usable = [name for name in holders if name != asker and name not in avoid]
        if not usable:
            self._relays[expert] = asker
            return None
        source = min(usable, key=lambda name: (self._asked[name], name))
        self._asked[source] += self._expert_bytes(expert)
        return source

    def _holders(self, expert: ExpertId) -> list[NodeName]:
        """The nodes that are here and have reported a slice with the expert ready."""
        state = self._state()
        return [
            name
            for plan in (state.active, state.pending)
            if plan is not None
            for name in plan.owners[expert.layer][expert.expert]
            if name != LOCAL and name in state.nodes and state.holds(name, plan.epoch)
        ]
