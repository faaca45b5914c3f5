"""The running cluster's plan: by its traffic where that is known, else by shares of memory.

The planner is given what nodes have measured and what the dispatcher has recorded. What it must not do is ask a node
for more memory than it has while it changes over from the plan in force: it then holds the slices of both. So
replicas fill a part of the spare memory only, and where that is not enough, shares, which move least, are the plan.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moehive.kernels.geometry import LayerGeometry

from ..types import LOCAL, CoordinatorError, NodeName, Pins, Plan
from .cluster import MAX_NODES, Cluster, Node, Tier
from .pins import Owners, covered, pinned
from .plan import Placement, make_plan, score
from .replan import Migration, replan
from .shares import place_by_memory
from .slots import share_out
from .traces import DEFAULT_MIXES, Trace

log = logging.getLogger(__name__)

SPARE = 0.25  # of the model's size: memory that replicas may take, where there is as much
FILLED = 0.8  # of a node's memory that a plan may take, so that there is room to change over
EFFORT = 0.2  # of the search: a node that joins or goes should not wait for the last percent
COPY_BYTES_PER_S = 30e6  # a quarter of 1 Gbit/s
HORIZON_SECONDS = 3600.0  # for which traffic is expected to stay as it is
USUAL_BANDWIDTH = 10e9  # bytes a second, of a node that has not said
USUAL_RTT_S = 3e-4
PIN_GAIN = 0.02  # of all uses: a plan that pins others must find so many more of them in a fast tier


@dataclass(frozen=True, slots=True)
class Measured:
    """What a node and the link to it were measured to do, and what its tiers hold; 0: not known, or none."""

    bandwidth: float = 0.0  # bytes a second of reading experts
    rtt_s: float = 0.0
    token_s: float = 0.0  # on the wire, of one token's hidden states, there and back
    ram_bytes: int = 0  # of what it gives to experts; the rest is disk
    vram_bytes: int = 0  # of a GPU, beside those


def place(
    capacities: Mapping[NodeName, int],
    measured: Mapping[NodeName, Measured],
    layers: Sequence[LayerGeometry],
    trace: Trace | None,
    epoch: int,
    previous: Plan | None = None,
) -> Plan:
    """A plan within `capacities` (bytes of each node). Raises CoordinatorError when the experts don't fit."""
    plan = _place(capacities, measured, layers, trace, epoch, previous)
    return plan if trace is None else replace(plan, pins=_pins(plan.owners, measured, layers, trace))


def _place(
    capacities: Mapping[NodeName, int],
    measured: Mapping[NodeName, Measured],
    layers: Sequence[LayerGeometry],
    trace: Trace | None,
    epoch: int,
    previous: Plan | None,
) -> Plan:
    shares = place_by_memory(capacities, layers, epoch, previous)
    experts = {layer.experts for layer in layers}
    if trace is None or len(experts) > 1 or trace.layers != len(layers) or len(capacities) > MAX_NODES:
        return shares
    cluster = _cluster(capacities, measured, layers)
    try:
        made = make_plan(cluster, trace, experts=experts.pop(), effort=EFFORT)
    except CoordinatorError:
        return shares  # the model fits, but with no memory to spare
    plan = Plan(epoch, _owners(made, sorted(capacities), layers))
    if previous is not None and not _fits_beside(plan, previous, capacities, layers):
        log.info("The plan by traffic would need more memory than there is while nodes change over.")
        return shares
    log.info(
        "Planned for %d tokens of traffic: %.3f ms of experts a step; no plan takes less than %.3f ms.",
        trace.tokens, 1e3 * made.expected_s, 1e3 * made.bound_s,
    )  # fmt: skip
    return plan


def better(
    capacities: Mapping[NodeName, int],
    measured: Mapping[NodeName, Measured],
    layers: Sequence[LayerGeometry],
    trace: Trace,
    epoch: int,
    current: Plan,
    steps_per_s: float,
) -> Plan | None:
    """A plan that is worth its copies (replan.py), or None. `steps_per_s` is the traffic of late.

    Without better owners it may be the present ones with other experts in their fast tiers, which costs no copies.
    """
    owners = _better_owners(capacities, measured, layers, trace, current, steps_per_s)
    kept = current.owners if owners is None else owners
    pins = _pins(kept, measured, layers, trace)
    if owners is None and covered(pins, kept, trace) - covered(current.pins, kept, trace) < PIN_GAIN:
        return None
    return Plan(epoch, kept, pins)


def _better_owners(
    capacities: Mapping[NodeName, int],
    measured: Mapping[NodeName, Measured],
    layers: Sequence[LayerGeometry],
    trace: Trace,
    current: Plan,
    steps_per_s: float,
) -> Owners | None:
    experts = {layer.experts for layer in layers}
    here = {name for layer in current.owners for nodes in layer for name in nodes}
    if len(experts) > 1 or not here <= capacities.keys() or len(capacities) > MAX_NODES or steps_per_s <= 0:
        return None
    names = sorted(capacities)
    cluster = _cluster(capacities, measured, layers)
    bit = {names[place.node]: np.uint64(1 << at) for at, place in enumerate(cluster.places)}
    replicas = tuple(
        np.array([np.bitwise_or.reduce([bit[name] for name in nodes]) for nodes in owners], dtype=np.uint64)
        for owners in current.owners
    )
    try:
        slots = share_out(cluster, [layer.experts for layer in layers])
    except CoordinatorError:
        return None
    held = [[np.count_nonzero(chosen & bit[names[p.node]]) for p in cluster.places] for chosen in replicas]
    slots = np.maximum(slots, np.array(held, dtype=np.int32))
    fit, _ = trace.split()
    plan = score(cluster, DEFAULT_MIXES, replicas, slots, fit, (None,) * len(layers), 0, 1)
    migration = Migration(bytes_per_s=COPY_BYTES_PER_S, horizon_steps=HORIZON_SECONDS * steps_per_s)
    decision = replan(plan, trace, migration, effort=EFFORT)
    log.info("%s", decision.sentence)
    if not decision.adopt:
        return None
    owners = _owners(decision.plan, names, layers)
    return owners if _fits_beside(Plan(current.epoch, owners), current, capacities, layers) else None


def _pins(
    owners: Owners, measured: Mapping[NodeName, Measured], layers: Sequence[LayerGeometry], trace: Trace
) -> dict[NodeName, Pins]:
    tiers = {name: (node.ram_bytes, node.vram_bytes) for name, node in measured.items()}
    return pinned(owners, tiers, layers, trace)


def _cluster(
    capacities: Mapping[NodeName, int], measured: Mapping[NodeName, Measured], layers: Sequence[LayerGeometry]
) -> Cluster:
    total = sum(layer.nbytes for layer in layers)
    part = min(FILLED, (1 + SPARE) * total / max(1, sum(capacities.values())))
    return Cluster(
        tuple(
            _node(name, int(part * capacities[name]), measured.get(name, Measured())) for name in sorted(capacities)
        ),
        tuple(layer.expert_bytes for layer in layers),
    )


def _owners(made: Placement, names: Sequence[NodeName], layers: Sequence[LayerGeometry]) -> Owners:
    return tuple(
        tuple(tuple(names[node] for node in made.holders(layer, expert)) for expert in range(geometry.experts))
        for layer, geometry in enumerate(layers)
    )


def _node(name: NodeName, nbytes: int, measured: Measured) -> Node:
    rtt = 0.0 if name == LOCAL else measured.rtt_s or USUAL_RTT_S
    bandwidth = measured.bandwidth or USUAL_BANDWIDTH
    return Node(name=name, rtt_s=rtt, token_s=measured.token_s, tiers=(Tier(nbytes, bandwidth),))


def _fits_beside(
    plan: Plan, previous: Plan, capacities: Mapping[NodeName, int], layers: Sequence[LayerGeometry]
) -> bool:
    """Whether each node has room for its slices of both plans."""
    held: Counter[NodeName] = Counter()
    for new, old, geometry in zip(plan.owners, previous.owners, layers, strict=True):
        for expert, (ours, theirs) in enumerate(zip(new, old, strict=True)):
            for name in {*ours, *theirs}:
                held[name] += geometry.spec_of(expert).nbytes
    return all(held[name] <= size for name, size in capacities.items())
