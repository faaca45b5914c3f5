"""What a layer costs: the places' times, and what free placement would need.

A place is done after `fixed + step × distinct experts dispatched to it`, and a layer when its last place is. `fixed`
is the round trip, the message and the wire time of the batch's hidden states; `step` is an expert's bytes by the
place's bandwidth. Times of computing are those of reading, as they are in decoding.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .cluster import Cluster
from .native import Floats, LayerCosts
from .traces import Mix


def layer_costs(cluster: Cluster, layer: int, mixes: Sequence[Mix], shared_at: int | None = None) -> LayerCosts:
    """Seconds of a layer on each place; `shared_at` is the place that computes the shared expert, if any does."""
    nodes = [cluster.nodes[place.node] for place in cluster.places]
    fixed = np.array([[node.rtt_s + node.msg_s + mix.tokens * node.token_s for node in nodes] for mix in mixes])
    bandwidth = np.array([place.bw_Bps for place in cluster.places])
    always = np.zeros(len(nodes))
    if shared_at is not None and cluster.shared is not None:
        always[shared_at] = cluster.shared.nbytes / bandwidth[shared_at]
    return LayerCosts(fixed, cluster.bytes_of(layer) / bandwidth, always)


def time_for(
    fixed: Floats, step: Floats, wanted: npt.NDArray[np.int64] | int, usable: npt.NDArray[np.bool_] | None = None
) -> Floats:
    """Least seconds in which the `usable` places compute `wanted` experts, were all of them everywhere.

    `fixed` and `step` are [places]; `wanted` may be an array, and 0 takes no time. Infinite without a usable place.
    """
    counts = np.atleast_1d(np.asarray(wanted))
    most = int(counts.max(initial=0))
    if usable is not None:
        fixed, step = fixed[usable], step[usable]
    if not len(step):
        return np.where(counts > 0, np.inf, 0.0)
    # The k-th expert to end anywhere ends at the k-th least of these times.
    ends = np.sort((fixed[:, None] + step[:, None] * np.arange(1, most + 1)).ravel())[:most]
    out: Floats = np.concatenate([[0.0], ends])[counts]
    return out


def popularity(
    hits: npt.NDArray[np.uint16], batch_weights: Floats, offsets: npt.NDArray[np.int64], experts: int
) -> Floats:
    """How often each expert is hit, each batch counting by its weight."""
    weights = np.repeat(batch_weights, np.diff(offsets))
    return np.bincount(hits, weights=weights, minlength=experts).astype(np.float64)
