"""The file of a plan: what `moehive plan -o` writes."""

import json
from pathlib import Path
from typing import Any

from ..whole_file import whole_file
from .plan import Placement


def plan_json(plan: Placement) -> dict[str, Any]:
    """`replicas` are node indices for each expert, the one to ask first in front; times are seconds.

    `expected_s` and `bound_s` are of all layers of one step, the kinds of batches counting the same; `batches` has
    them for each kind, and `bound_same_slots_s`, which holds for plans that share memory out over the layers as this
    one does. `tier` (only where nodes have several) has the tier of each replica, `shared` (only where there is a
    shared expert) the node that computes it, null for the coordinator.
    """
    cluster = plan.cluster
    tiered = any(len(node.tiers) > 1 for node in cluster.nodes)
    layers = []
    for index, chosen in enumerate(plan.replicas):
        replicas = [plan.holders(index, expert) for expert in range(len(chosen))]
        layer: dict[str, Any] = {"replicas": replicas}
        if tiered:
            layer["tier"] = [
                [_tier(plan, index, expert, node) for node in nodes] for expert, nodes in enumerate(replicas)
            ]
        if cluster.shared is not None:
            at = plan.shared_at[index]
            layer["shared"] = None if at is None else cluster.places[at].node
        layers.append(layer)
    return {
        "layers": layers,
        "expected_s": plan.expected_s,
        "bound_s": plan.bound_s,
        "batches": {
            str(mix): {
                "expected_s": float(plan.expected[:, number].sum()),
                "bound_s": float(plan.bound[number]),
                "bound_same_slots_s": float(plan.bound_same_slots[number]),
            }
            for number, mix in enumerate(plan.mixes)
        },
        "nodes": [node.name for node in cluster.nodes],
    }


def _tier(plan: Placement, layer: int, expert: int, node: int) -> int:
    bits = int(plan.replicas[layer][expert])
    return min(p.tier for at, p in enumerate(plan.cluster.places) if p.node == node and bits >> at & 1)


def write_json(value: Any, path: Path) -> None:
    """Writes beside, to the disk, then renames. Raises OSError."""
    with whole_file(path) as file:
        file.write(json.dumps(value).encode())
