"""What a node said of itself and its link has shown: what placement counts on, and what a person is shown."""

from dataclasses import replace

from .cluster.state import ClusterState, Node, TierFigures
from .dispatch.link import Link
from .dispatch.local import LocalExperts
from .dispatch.parts import NodeCounters
from .placement.place import Measured
from .serving.status import NodeStatus, TierStatus
from .types import NodeName


def measured(node: Node, link: Link | None, token_bytes: int) -> Measured:
    """What a plan counts on. `token_bytes` of a token travel, there and back; `link`: None while there is none."""
    found = Measured()
    if (given := node.capacity) is not None:
        machine = given.address.rpartition(":")[0]
        found = Measured(
            given.read_bandwidth, machine=machine, ram_bytes=given.ram_bytes, vram_bytes=given.vram_bytes
        )
    if link is not None:
        found = replace(found, rtt_s=link.speed.round_trip_s, token_s=token_bytes * link.speed.s_per_byte)
    return found


def node_status(
    state: ClusterState,
    name: NodeName,
    here: LocalExperts | None,
    counters: NodeCounters,
    link: Link | None,
    *,
    load_bytes_per_s: float,
    source_fault: str,
) -> NodeStatus:
    """What a person is shown; `here`: the experts, if the node is the coordinator's own memory."""
    node = state.nodes[name]
    plan = state.active or state.pending
    assigned = sum(map(len, plan.slice_of(name))) if plan is not None else 0
    held, nbytes = node.figures.experts_held, node.figures.bytes_held
    if plan is not None and plan.epoch in node.ready:
        held = max(held, assigned)  # the last heartbeat may be older than the slice
    if here is not None:
        held, nbytes = here.count, here.nbytes
    # The last report of a slice that is there may be from before its end.
    loaded, to_load = (node.bytes_done, node.bytes_total) if node.loads else (0, 0)
    return NodeStatus(
        name=name,
        state=state.phase(name).value,
        address=node.capacity.address if node.capacity else "",
        experts_held=held,
        experts_assigned=assigned,
        bytes_held=nbytes,
        ram_bytes=node.capacity.ram_bytes if node.capacity else 0,
        read_bandwidth=node.capacity.read_bandwidth if node.capacity else 0.0,
        expert_calls=counters.expert_calls,
        compute_ns=counters.compute_ns,
        load=node.figures.load,
        resident_bytes=node.figures.resident_bytes,
        load_progress=loaded / to_load if to_load else 0.0,
        load_bytes=loaded,
        load_total_bytes=to_load,
        load_bytes_per_s=load_bytes_per_s,
        source_fault=source_fault,
        problem=node.quarantine or node.problem,
        tiers=_tier_status(node.figures.tiers),
        round_trip_s=link.speed.round_trip_s if link is not None else 0.0,
        link_bandwidth=1 / link.speed.s_per_byte if link is not None and link.speed.s_per_byte else 0.0,
        disk_bytes=node.capacity.disk_bytes if node.capacity else 0,
        vram_bytes=node.capacity.vram_bytes if node.capacity else 0,
        disk_bandwidth=node.figures.tiers.disk_bandwidth if node.figures.tiers else 0.0,
        products_per_s=node.capacity.products_per_s if node.capacity else 0.0,
        token_products_per_s=node.capacity.token_products_per_s if node.capacity else 0.0,
    )


def _tier_status(tiers: TierFigures | None) -> TierStatus | None:
    if tiers is None:
        return None
    lookups = max(1, tiers.lookups)
    return TierStatus(
        ram_bytes=tiers.ram_bytes,
        disk_bytes=tiers.disk_bytes,
        vram_bytes=tiers.vram_bytes,
        hit_rate=tiers.in_ram / lookups,
        foreseen_rate=tiers.foreseen / lookups,
        disk_read_bytes=tiers.disk_read_bytes,
    )
