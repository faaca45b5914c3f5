"""The running cluster's plan: by its traffic where that is known, else as if all experts were used alike.

The planner is given what nodes and links have measured and what the dispatcher has recorded. What it must not do is
ask a node for more memory than it has while it changes over from the plan in force: it then holds the slices of both.
So replicas fill a part of the spare memory only, and where that is not enough, the plan is uniform.py's, which moves
less.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moehive.kernels.geometry import LayerGeometry

from ..types import LOCAL, CoordinatorError, NodeName, Owners, Pins, Plan
from .cluster import MAX_NODES, Cluster, Node, Tier
from .pins import covered, pinned
from .plan import Placement, make_plan, score
from .replan import Migration, replan
from .slots import share_out
from .traces import DEFAULT_MIXES, Trace
from .uniform import uniform_plan

log = logging.getLogger(__name__)

SPARE = 0.25  # of the model's size: memory that replicas may take, where there is as much
FILLED = 0.8  # of a node's memory that a plan may take, so that there is room to change over
EFFORT = 0.2  # of the search: a node that joins or goes should not wait for the last percent
COPY_BYTES_PER_S = 30e6  # a quarter of 1 Gbit/s
HORIZON_SECONDS = 3600.0  # for which traffic is expected to stay as it is
USUAL_BANDWIDTH = 10e9  # bytes a second, of a node that has not said
USUAL_GPU_BANDWIDTH = 360e9  # of experts on a GPU, which nodes do not measure; as estimates assume
USUAL_RTT_S = 3e-4
PIN_GAIN = 0.02  # of all uses: a plan that pins others must find so many more of them in a fast tier


@dataclass(frozen=True, slots=True)
class Measured:
    """What a node and the link to it were measured to do, and what its tiers hold; 0: not known, or none."""

    bandwidth: float = 0.0  # bytes a second of reading experts
    rtt_s: float = 0.0
    token_s: float = 0.0  # on the wire, of one token's hidden states, there and back
    machine: str = ""  # where the node runs; empty: on one of its own
    ram_bytes: int = 0  # of what it gives to experts; the rest is disk
    vram_bytes: int = 0  # of a GPU, beside those; its experts' files lie on the disk

    def read_speed(self, nbytes: int) -> float:
        """Bytes a second of so many bytes of experts, as many of them as fit on the GPU."""
        bandwidth, on_gpu = self.bandwidth or USUAL_BANDWIDTH, min(nbytes, self.vram_bytes)
        return nbytes / (on_gpu / USUAL_GPU_BANDWIDTH + (nbytes - on_gpu) / bandwidth) if on_gpu else bandwidth


def place(
    capacities: Mapping[NodeName, int],
    measured: Mapping[NodeName, Measured],
    layers: Sequence[LayerGeometry],
    trace: Trace | None,
    epoch: int,
    previous: Plan | None = None,
) -> Plan:
    """A plan within `capacities` (bytes of each node). Raises CoordinatorError when the experts don't fit."""
    # Beyond what the planner knows, the nodes that give least hold nothing.
    names = sorted(capacities, key=lambda name: (-capacities[name], name))[:MAX_NODES]
    capacities = {name: capacities[name] for name in sorted(names)}
    measured = _with_usable_gpus(measured, layers)
    alike = _by_machine(measured)
    plan = _uniform(capacities, alike, layers, epoch, previous)
    if trace is None:
        return plan
    owners = _by_traffic(capacities, alike, layers, trace, previous)
    if owners is not None:
        plan = Plan(epoch, owners)
    return replace(plan, pins=_pins(plan.owners, measured, layers, trace))


def _by_traffic(
    capacities: Mapping[NodeName, int],
    measured: Mapping[NodeName, Measured],
    layers: Sequence[LayerGeometry],
    trace: Trace,
    previous: Plan | None,
) -> Owners | None:
    """What the planner finds; None where it knows nothing of such a model, or there is no memory for it."""
    experts = {layer.experts for layer in layers}
    if len(experts) > 1 or trace.layers != len(layers):
        return None
    cluster = _cluster(_with_replicas(capacities, measured, layers), measured, layers)
    try:
        made = make_plan(cluster, trace, experts=experts.pop(), effort=EFFORT)
    except CoordinatorError:
        return None  # the model fits, but with no memory to spare
    owners = _owners(made, list(capacities), layers)
    if previous is not None and not _fits_beside(owners, previous, capacities, layers):
        log.info("The plan by traffic would need more memory than there is while nodes change over.")
        return None
    log.info(
        "Planned for %d tokens of traffic: %.3f ms of experts a step; no plan takes less than %.3f ms.",
        trace.tokens, 1e3 * made.expected_s, 1e3 * made.bound_s,
    )  # fmt: skip
    return owners


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
    measured = _with_usable_gpus(measured, layers)
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
    measured = _by_machine(measured)
    cluster = _cluster(_with_replicas(capacities, measured, layers), measured, layers)
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
    return owners if _fits_beside(owners, current, capacities, layers) else None


def _uniform(
    capacities: Mapping[NodeName, int],
    measured: Mapping[NodeName, Measured],
    layers: Sequence[LayerGeometry],
    epoch: int,
    previous: Plan | None,
) -> Plan:
    """The plan without a trace; nodes are filled to the last byte only if the experts don't fit otherwise."""
    counts = [layer.experts for layer in layers]
    cluster = _cluster(_filled(capacities), measured, layers)
    try:
        slots = share_out(cluster, counts)
    except CoordinatorError:
        cluster = _cluster(capacities, measured, layers)
        slots = share_out(cluster, counts)
    return uniform_plan(cluster, slots, capacities, layers, epoch, previous)


def _with_usable_gpus(
    measured: Mapping[NodeName, Measured], layers: Sequence[LayerGeometry]
) -> Mapping[NodeName, Measured]:
    """Without GPUs where one does not compute the experts."""
    if all(layer.on_gpu for layer in layers):
        return measured
    return {name: replace(found, vram_bytes=0) for name, found in measured.items()}


def _by_machine(measured: Mapping[NodeName, Measured]) -> dict[NodeName, Measured]:
    """Nodes of one machine share its memory and its network: what they measured one by one is evened out."""
    together: dict[str, list[Measured]] = {}
    for name, found in measured.items():
        together.setdefault(found.machine or f"node {name}", []).append(found)
    return {name: _as_all(found, together[found.machine or f"node {name}"]) for name, found in measured.items()}


def _as_all(node: Measured, nodes: Sequence[Measured]) -> Measured:
    """With the mean bandwidth, and the shortest times: a busy machine only makes them longer."""
    bandwidths = [other.bandwidth for other in nodes if other.bandwidth]
    return replace(
        node,
        bandwidth=sum(bandwidths) / max(1, len(bandwidths)),
        rtt_s=min((other.rtt_s for other in nodes if other.rtt_s), default=0.0),
        token_s=min((other.token_s for other in nodes if other.token_s), default=0.0),
    )


def _filled(capacities: Mapping[NodeName, int]) -> dict[NodeName, int]:
    return {name: int(FILLED * size) for name, size in capacities.items()}


def _pins(
    owners: Owners, measured: Mapping[NodeName, Measured], layers: Sequence[LayerGeometry], trace: Trace
) -> dict[NodeName, Pins]:
    tiers = {name: (node.ram_bytes, node.vram_bytes) for name, node in measured.items()}
    return pinned(owners, tiers, layers, trace)


def _with_replicas(
    capacities: Mapping[NodeName, int], measured: Mapping[NodeName, Measured], layers: Sequence[LayerGeometry]
) -> dict[NodeName, int]:
    """Bytes of each node that experts and their replicas may take: by its bandwidth, as far as its memory goes."""
    most = _filled(capacities)
    left = int((1 + SPARE) * sum(layer.nbytes for layer in layers))
    rates = {name: measured.get(name, Measured()).read_speed(nbytes) for name, nbytes in most.items()}
    given = {}
    # Who is full first takes what it has; the rest is split anew among the others.
    for name in sorted(most, key=lambda name: (most[name] / rates[name], name)):
        given[name] = min(most[name], int(left * rates[name] / sum(rates.values())))
        left -= given[name]
        del rates[name]
    return given


def _cluster(
    memory: Mapping[NodeName, int], measured: Mapping[NodeName, Measured], layers: Sequence[LayerGeometry]
) -> Cluster:
    """The planner's cluster, with so much memory of each node."""
    return Cluster(
        tuple(_node(name, memory[name], measured.get(name, Measured())) for name in sorted(memory)),
        tuple(layer.expert_bytes for layer in layers),
    )


def _owners(made: Placement, names: Sequence[NodeName], layers: Sequence[LayerGeometry]) -> Owners:
    return tuple(
        tuple(tuple(names[node] for node in made.holders(layer, expert)) for expert in range(geometry.experts))
        for layer, geometry in enumerate(layers)
    )


def _node(name: NodeName, nbytes: int, measured: Measured) -> Node:
    rtt = 0.0 if name == LOCAL else measured.rtt_s or USUAL_RTT_S
    speed = measured.read_speed(nbytes)
    return Node(name=name, rtt_s=rtt, token_s=measured.token_s, tiers=(Tier(nbytes, speed),))


def _fits_beside(
    owners: Owners, previous: Plan, capacities: Mapping[NodeName, int], layers: Sequence[LayerGeometry]
) -> bool:
    """Whether each node has room for what `owners` give it beside its slice of the plan before."""
    held: Counter[NodeName] = Counter()
    for new, old, geometry in zip(owners, previous.owners, layers, strict=True):
        for expert, (ours, theirs) in enumerate(zip(new, old, strict=True)):
            for name in {*ours, *theirs}:
                held[name] += geometry.spec_of(expert).nbytes
    return all(held[name] <= size for name, size in capacities.items())
