"""When to plan and when to let a node go: pure functions over the cluster's state.

- The first plan is made when `min_nodes` nodes are here.
- A node that goes away keeps its place for REPLACE_SECONDS, since it may only be starting again: its experts are
  asked of their other holders, else read by the coordinator, until it is back with the same slice. After that the
  others take over, if they have the memory; at once when it is quarantined, since it may not come back.
- A node that is new gets its share by a new plan; the old plan serves until every slice of the new one is loaded.
- A node that leaves is released when the others have loaded its experts, or at once when they can't.
- A node that a person drains stays, and holds nothing once the others have loaded its experts.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from moehive.kernels.geometry import LayerGeometry, bytes_filled

from ..types import LOCAL, NodeName, Plan
from .state import Capacity, ClusterState

SHARE_STEPS = 40  # of bisection
REPLACE_SECONDS = 30.0  # a node away for longer loses its experts to the others


class Place(Protocol):
    """Makes a plan from memory; see placement/place.py."""

    def __call__(
        self,
        capacities: Mapping[NodeName, int],
        layers: Sequence[LayerGeometry],
        epoch: int,
        previous: Plan | None = None,
    ) -> Plan: ...


def usable(
    state: ClusterState, layers: Sequence[LayerGeometry], without: NodeName | None = None
) -> dict[NodeName, int]:
    """The nodes that a new plan may count on, and the bytes that each gives: of memory while that is enough.

    When the experts of `layers` are more than RAM holds, a GPU's memory counts as well, if it computes them: what
    lies there need not be in RAM, only on the node's disk. When they are more than that, each node gives disk, in
    proportion to its memory as far as its disk allows: one that reads twice as many experts from memory should read
    twice as many from disk. Memory that is less than an expert on a node holds nothing, so bytes count in whole
    experts. `without`: a node that is about to leave.
    """
    here = {name: capacity for name, capacity in _here(state).items() if name != without}
    ram = {name: capacity.ram_bytes for name, capacity in here.items()}
    memory = {name: capacity.ram_bytes + _gpu_bytes(capacity, layers) for name, capacity in here.items()}
    most = {name: capacity.ram_bytes + capacity.disk_bytes for name, capacity in here.items()}
    needed = sum(layer.nbytes for layer in layers)

    def enough(given: Mapping[NodeName, int]) -> bool:
        return sum(bytes_filled(nbytes, layers) for nbytes in given.values()) >= needed

    if enough(ram) or most == ram:
        return ram

    def share(factor: float) -> dict[NodeName, int]:
        return {name: min(int(factor * size), most[name]) for name, size in memory.items()}

    low, high = 1.0, max((most[name] / size for name, size in memory.items() if size), default=1.0)
    for _ in range(SHARE_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(share(middle)) else (middle, high)
    return share(high)


def _gpu_bytes(capacity: Capacity, layers: Sequence[LayerGeometry]) -> int:
    """Bytes of a GPU's memory that experts fill whose files lie on the node's disk; they come through its RAM."""
    if not capacity.ram_bytes or not all(layer.on_gpu for layer in layers):
        return 0
    return bytes_filled(min(capacity.vram_bytes, capacity.disk_bytes), layers)


def _here(state: ClusterState) -> dict[NodeName, Capacity]:
    """The nodes that are present and stay."""
    return {
        name: node.capacity
        for name, node in state.nodes.items()
        if node.present and node.stays and node.capacity is not None
    }


def wants_plan(
    state: ClusterState,
    min_nodes: int,
    held_bytes: Mapping[NodeName, int],
    away_seconds: Mapping[NodeName, float],
) -> bool:
    """Whether a new plan over the usable nodes should be tried.

    `held_bytes` are the sizes of the latest plan's slices, `away_seconds` how long each absent node has been so.
    """
    here = _here(state)
    if not here or (state.active is None and sum(1 for name in here if name != LOCAL) < min_nodes):
        return False
    if state.epoch == 0:
        return True
    # A plan that can't be kept: a node leaves or is drained, or has come back with less memory than its slice.
    if any(not state.nodes[name].stays for name in state.members):
        return True
    if any(held_bytes.get(name, 0) > c.ram_bytes + c.disk_bytes for name, c in here.items()):
        return True
    absent = [name for name in state.members if not state.nodes[name].present]
    if here.keys() <= state.members and not absent:
        return False
    waited_for = [name for name in absent if not state.nodes[name].quarantine]
    if any(away_seconds.get(name, 0.0) < REPLACE_SECONDS for name in waited_for):
        return False
    stuck = any(not state.nodes[name].present or state.nodes[name].problem for name in state.pending_owners)
    return state.pending is None or stuck


def is_needed(state: ClusterState, name: NodeName) -> bool:
    """Whether a plan, active or pending, gives experts to a node."""
    return name in state.active_owners or name in state.pending_owners


def may_go(state: ClusterState, name: NodeName) -> bool:
    """Whether a leaving node is to be released now: it has no experts, or waiting would not help."""
    replaced = state.active is not None and state.pending is not None and name not in state.pending_owners
    return not (is_needed(state, name) and replaced)


def reason(state: ClusterState, min_nodes: int, shortage: str) -> str | None:
    """Why the cluster is not ready, in one sentence; None when it is. `shortage` says why no plan could be made."""
    if state.ready:
        return None
    if state.epoch == 0:
        here = sum(1 for name in _here(state) if name != LOCAL)
        if here < min_nodes:
            return f"{here} of {min_nodes} expert nodes are here; start {min_nodes - here} more."
        return shortage or "The plan is being made."
    owners = state.missing or state.pending_owners
    away = sorted(name for name in owners if not state.nodes[name].present)
    shut_out = [state.nodes[name] for name in away if state.nodes[name].quarantine]
    if shut_out:
        return (
            f"{shut_out[0].quarantine} It is shut out with a part of the model; when it is mended, "
            f"`moehive node readmit {shut_out[0].name}` lets it in again."
        )
    if away:
        words = ("node", "is", "it") if len(away) == 1 else ("nodes", "are", "them")
        return (
            f"Expert {words[0]} {', '.join(away)} {words[1]} away with a part of the model; start {words[2]} again."
            + (" Requests are slow meanwhile, or wait." if state.active is not None else "")
        )
    problems = [f"{node.name}: {node.problem}" for node in state.nodes.values() if node.problem]
    if problems:
        return f"A slice could not be loaded on {'; '.join(problems)}"
    loading = [
        f"{node.name} {100 * node.bytes_done // max(1, node.bytes_total)} %"
        for node in state.nodes.values()
        if node.assigned - node.ready
    ]
    return f"The experts are being loaded ({', '.join(loading)})."
