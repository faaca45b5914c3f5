"""`moehive status` in sentences: why a node holds what it holds, what is waited for, what one more would bring."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moehive.client.results import NodeStatus

ENOUGH_CALLS = 1000  # of experts, before figures say something


def in_words(nodes: "Sequence[NodeStatus]") -> list[str]:
    """Sentences for a person; few or none while there is nothing to say yet."""
    holding = [node for node in nodes if node.experts_held and node.state != "away"]
    memory = sum(node.ram_bytes for node in nodes if node.state != "away")
    held = sum(node.experts_held for node in holding)
    calls = sum(node.expert_calls for node in holding)
    sentences = []
    for node in nodes:
        if node.state == "quarantined":
            sentences.append(
                f"{node.name} is quarantined: {node.problem} When it is mended, `moehive node readmit {node.name}` "
                "lets it in again."
            )
        elif node.problem:
            sentences.append(f"{node.name} could not load its slice, and tries again: {node.problem}")
        elif node.state == "draining":
            sentences.append(f"{node.name} is being drained: the others load its experts.")
        elif node.state == "drained":
            sentences.append(f"{node.name} is drained; `moehive node readmit {node.name}` gives it experts again.")
    sentences += [_share(node, held, memory, calls) for node in holding]
    if calls >= ENOUGH_CALLS and len(holding) > 1:
        sentences += _bottleneck(holding)
    return sentences


def _share(node: "NodeStatus", held: int, memory: int, calls: int) -> str:
    """What a node holds and does of all nodes' experts `held`, `memory` in bytes, and `calls`."""
    text = (
        f"{node.name} holds {node.experts_held / held:.0%} of what is held: it gives "
        f"{node.ram_bytes / memory if memory else 0:.0%} of the memory"
    )
    if node.read_bandwidth:
        text += f" and reads {node.read_bandwidth / 1e9:.1f} GB/s"
    if node.round_trip_s:
        text += f", {1e3 * node.round_trip_s:.2f} ms away"
    if calls >= ENOUGH_CALLS and node.expert_calls:
        text += (
            f"; {node.expert_calls / calls:.0%} of the calls went there, "
            f"at {node.compute_ns / node.expert_calls / 1e3:.0f} µs each"
        )
    return text + "."


def _bottleneck(holding: "Sequence[NodeStatus]") -> Iterator[str]:
    """What a layer waits for most, and what one more machine would bring."""
    spent = sum(node.compute_ns for node in holding)
    slowest = max(holding, key=lambda node: node.compute_ns)
    farthest = max(holding, key=lambda node: node.round_trip_s)
    each = slowest.compute_ns / slowest.expert_calls / 1e9 if slowest.expert_calls else 0.0
    if farthest.round_trip_s > 4 * each:
        yield (
            f"A layer waits most for the way to {farthest.name}: {1e3 * farthest.round_trip_s:.2f} ms, and an expert "
            f"takes {1e3 * each:.2f} ms. A quicker link would bring more than another machine."
        )
    elif spent:
        yield (
            f"A layer waits most for {slowest.name}: {slowest.compute_ns / spent:.0%} of the nodes' computing "
            "was its."
        )
    rate = sum(node.read_bandwidth for node in holding)
    if slowest.read_bandwidth and rate:
        share = slowest.read_bandwidth / (rate + slowest.read_bandwidth)
        yield (
            f"One more machine like {slowest.name} would take over up to {share:.0%} of what nodes compute in a "
            "layer; round trips would stay."
        )
