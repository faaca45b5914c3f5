"""A plan in words: why a node holds what it holds, what a layer waits for, what one more machine would bring."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..types import CoordinatorError
from .cluster import Cluster, Node, Tier
from .makespan import layer_costs
from .plan import Placement, make_plan, score_batches
from .search import by_mix
from .slots import amount
from .traces import Batches, Trace

SLOW = 1.0  # a node whose round trip alone takes this much of a layer's time without it holds everyone up


@dataclass(frozen=True, slots=True)
class Explanation:
    """Sentences for a person."""

    nodes: dict[str, str]  # why each node holds what it holds
    waits: str  # what a layer waits for
    warnings: tuple[str, ...]  # what memory did not allow
    more: tuple[str, ...]  # what one more machine would bring


def explain(plan: Placement, trace: Trace) -> Explanation:
    """Explains a plan that was made for `trace`; plans anew, in short, for what one more machine would bring."""
    _, held = trace.split()
    cluster = plan.cluster
    batches = score_batches(held, plan.mixes, 0)
    load = [np.bincount(part.hits, minlength=len(plan.replicas[0])) for part in batches]
    held_by = [0] * len(cluster.nodes)
    alone_by = [0] * len(cluster.nodes)
    served = [0.0] * len(cluster.nodes)
    total = float(sum(part.sum() for part in load))
    for chosen, hits in zip(plan.replicas, load, strict=True):
        for place, found in enumerate(cluster.places):
            has = (chosen >> np.uint64(place)) & np.uint64(1) != 0
            held_by[found.node] += int(has.sum())
            alone_by[found.node] += int((has & (np.bitwise_count(chosen) == 1)).sum())
            served[found.node] += float(hits[has].sum())
    nodes = {
        node.name: _why(cluster, index, held_by[index], alone_by[index], served[index] / max(1.0, total))
        for index, node in enumerate(cluster.nodes)
    }
    waits, warnings = _waits(plan, batches, alone_by)
    return Explanation(nodes, waits, warnings, _more(plan, trace))


def _why(cluster: Cluster, index: int, held: int, alone: int, share: float) -> str:
    node = cluster.nodes[index]
    if node.excluded:
        return "holds nothing: it is excluded."
    if not held:
        return "holds nothing: no expert fits into the memory that it gives."
    speed = max(tier.bw_Bps for tier in node.tiers)
    return (
        f"holds {held:,} experts that are asked for in {share:.0%} of all cases, {alone:,} of them nobody else does; "
        f"it reads {amount(int(speed))}/s, and a round trip there takes {1e3 * (node.rtt_s + node.msg_s):.2f} ms."
    )


def _waits(plan: Placement, batches: Sequence[Batches], alone_by: list[int]) -> tuple[str, tuple[str, ...]]:
    """Which node ends last most often, were each a little quicker; and nodes that hold everyone up."""
    cluster, mixes = plan.cluster, len(plan.mixes)
    picked = range(0, len(batches), max(1, len(batches) // 4))
    base = np.mean([by_mix(layer_costs(cluster, i, plan.mixes), batches[i], plan.replicas[i], mixes) for i in picked])
    gains = []
    for index, node in enumerate(cluster.nodes):
        quick = replace(
            node, tiers=tuple(replace(t, bw_Bps=1.1 * t.bw_Bps) for t in node.tiers), rtt_s=node.rtt_s / 1.1
        )
        gains.append(float(base) - _time_with(plan, batches, picked, index, quick))
    worst = int(np.argmax(gains))
    name = cluster.nodes[worst].name
    step = max(cluster.bytes_of(0) / tier.bw_Bps for tier in cluster.nodes[worst].tiers)
    cause = "its round trip" if cluster.nodes[worst].rtt_s > step else "the bandwidth of its memory"
    waits = (
        f"A layer takes {1e3 * float(base):.3f} ms and waits most for {name}, for {cause}: were {name} a tenth "
        f"quicker, it would take {max(0.0, gains[worst]) / float(base):.1%} less."
    )
    warnings = []
    for index, node in enumerate(cluster.nodes):
        if alone_by[index] and node.rtt_s + node.msg_s > SLOW * float(base):
            warnings.append(
                f"{node.name} holds {alone_by[index]:,} experts that nobody else has room for, and whoever needs one "
                f"waits {1e3 * (node.rtt_s + node.msg_s):.1f} ms; {amount(alone_by[index] * cluster.bytes_of(0))} "
                "of memory on other nodes would end that."
            )
    return waits, tuple(warnings)


def _time_with(plan: Placement, batches: Sequence[Batches], picked: range, index: int, node: Node) -> float:
    """Mean seconds of a layer by the same plan, were one node another."""
    cluster = plan.cluster
    times = []
    for i in picked:
        costs = layer_costs(cluster, i, plan.mixes)
        for place, found in enumerate(cluster.places):
            if found.node == index:
                costs.fixed[:, place] = [node.rtt_s + node.msg_s + mix.tokens * node.token_s for mix in plan.mixes]
                costs.step[place] = cluster.bytes_of(i) / node.tiers[found.tier].bw_Bps
        times.append(by_mix(costs, batches[i], plan.replicas[i], len(plan.mixes)))
    return float(np.mean(times))


def _more(plan: Placement, trace: Trace) -> tuple[str, ...]:
    """One more of the kinds of machines that are there, planned on a few layers."""
    cluster = plan.cluster
    layers = min(trace.layers, 2)
    few = Trace(trace.experts[:layers], trace.seq)
    experts = len(plan.replicas[0])

    def sized(nodes: tuple[Node, ...]) -> Cluster:
        part = layers / trace.layers
        shrunk = tuple(
            replace(
                node,
                tiers=tuple(Tier(int(t.mem_bytes * part), t.bw_Bps) for t in node.tiers),
                reserve_bytes=int(node.reserve_bytes * part),
                pinned=frozenset(pin for pin in node.pinned if pin[0] < layers),
            )
            for node in nodes
        )
        return Cluster(shrunk, cluster.expert_bytes[:layers], cluster.shared)

    sentences = []
    try:
        before = make_plan(sized(cluster.nodes), few, plan.mixes, experts=experts).expected_s
    except CoordinatorError:
        return ()
    seen: set[tuple[float, tuple[float, ...]]] = set()
    for node in cluster.nodes:
        kind = (node.rtt_s, tuple(tier.bw_Bps for tier in node.tiers))
        if kind in seen or node.excluded or len(seen) == 3:
            continue
        seen.add(kind)
        other = replace(node, name=f"{node.name[:48]} again", pinned=frozenset())
        try:
            after = make_plan(sized((*cluster.nodes, other)), few, plan.mixes, experts=experts).expected_s
        except CoordinatorError:
            continue
        change = 1 - after / before
        sentences.append(
            f"One more machine like {node.name} would bring {change:.1%} less time a layer."
            if change > 0.005
            else f"One more machine like {node.name} would bring no speed, only room."
        )
    return tuple(sentences)
