"""Made-up clusters and routing traces for benchmarks and tests. No real model was traced for them.

A token's experts are drawn without replacement by logits that add up a Zipf popularity (exponent 0.5), the topic of
its sequence, and the class of the token, which neighbours in a text do not share: the hottest fifth of the experts
takes 40 to 45 % of the load, as published traces show.
"""

from collections.abc import Sequence

import numpy as np

from .cluster import Cluster, Node, Tier
from .traces import Trace

ZIPF = 0.5
TOPICS, TOPIC_SPREAD = 8, 0.35
CLASSES, CLASS_SPREAD = 48, 0.8
MEAN_LENGTH = 96  # tokens of a sequence

# (name, bytes a second, bytes of memory, round trip in seconds); msg_s is 0.05 ms, on the GPU 0.02 ms.
_GPU = ("gpu", 400e9, 24, 0.02e-3)
CLUSTERS: dict[str, tuple[tuple[str, float, int, float], ...]] = {
    "A": tuple((f"box-{n}", 100e9, 32, 0.3e-3) for n in range(4)),
    "B": (_GPU, *((f"box-{n}", 40e9, 32, 0.3e-3) for n in range(3))),
    "C": (
        _GPU,
        ("server", 200e9, 64, 0.3e-3),
        ("card", 180e9, 8, 0.3e-3),
        ("tower", 100e9, 64, 0.3e-3),
        ("desk", 60e9, 64, 0.3e-3),
        ("old", 40e9, 32, 0.3e-3),
        ("mini", 40e9, 16, 0.4e-3),
        ("wifi", 50e9, 16, 3.0e-3),
    ),
}


def cluster(name: str, experts: int, layers: int, expert_bytes: int, spare: float) -> Cluster:
    """Cluster A, B or C, its memory scaled so that it holds the model `1 + spare` times, in whole slots a layer."""
    nodes = CLUSTERS[name]
    total = sum(node[2] for node in nodes)
    shares = [experts * (1 + spare) * node[2] / total for node in nodes]
    slots = [int(share) for share in shares]
    missing = round(sum(shares)) - sum(slots)
    for index in sorted(range(len(nodes)), key=lambda i: (slots[i] - shares[i], i))[:missing]:
        slots[index] += 1
    return Cluster(
        tuple(
            Node(
                name=node[0],
                rtt_s=node[3],
                msg_s=0.02e-3 if node is _GPU else 0.05e-3,
                tiers=(Tier(count * layers * expert_bytes, node[1]),),
            )
            for node, count in zip(nodes, slots, strict=True)
        ),
        (expert_bytes,),
    )


def trace(
    layers: int, experts: int, top_k: int, sequences: int, seed: int, drift: Sequence[float] = (), draw: int = 0
) -> Trace:
    """`sequences` made-up sequences of the traffic `seed`; another `draw` has other sequences of the same traffic.

    `drift` has an entry for each sequence: 0 to 1, how far its traffic is another one.
    """
    world, random = np.random.default_rng(seed), np.random.default_rng([seed, draw])
    lengths = np.maximum(8, random.geometric(1 / MEAN_LENGTH, size=sequences))
    seq = np.repeat(np.arange(sequences, dtype=np.uint32), lengths)
    topic = random.integers(TOPICS, size=sequences)[seq]
    kind = np.minimum(random.zipf(1.4, size=len(seq)) - 1, CLASSES - 1)
    along = (np.asarray(drift, np.float32) if len(drift) else np.zeros(sequences, np.float32))[seq]
    chosen = np.empty((layers, len(seq), top_k), dtype=np.uint16)
    for layer in range(layers):
        popularity = -ZIPF * np.log(world.permutation(experts) + 1.0).astype(np.float32)
        later = -ZIPF * np.log(world.permutation(experts) + 1.0).astype(np.float32)
        by_topic = world.normal(0, TOPIC_SPREAD, size=(TOPICS, experts)).astype(np.float32)
        by_kind = world.normal(0, CLASS_SPREAD, size=(CLASSES, experts)).astype(np.float32)
        by_kind -= by_kind.mean(axis=0)  # a class says which, not how much: popularity is Zipf's
        for start in range(0, len(seq), 4096):
            part = slice(start, start + 4096)
            logits = by_topic[topic[part]] + by_kind[kind[part]] + popularity
            if len(drift):
                logits += along[part, None] * (later - popularity)
            # Who ends first in a race at these rates is a draw without replacement.
            ends = random.standard_exponential(logits.shape, dtype=np.float32) * np.exp(-logits)
            chosen[layer, part] = np.argpartition(ends, top_k, axis=1)[:, :top_k]
    return Trace(chosen, seq)
