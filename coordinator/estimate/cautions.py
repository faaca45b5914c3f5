"""What a person must know before trying: a model that does not fit, disks that are read for each token, Wi-Fi."""

from .cluster import Cluster
from .constants import WIFI_RTT_S
from .holding import Placed
from .model import Model
from .step import Step


def warn(model: Model, cluster: Cluster, placed: Placed, step: Step) -> list[str]:
    """Sentences, the gravest first; none when all is well."""
    found = []
    if placed.missing_trunk_bytes:
        found.append(
            f"The coordinator {cluster.coordinator.name} lacks {_gb(placed.missing_trunk_bytes)} of RAM for the"
            " trunk, its cache and the program."
        )
    if placed.missing_bytes:
        found.append(
            f"It does not fit: {_gb(placed.missing_bytes)} of {_gb(model.expert_bytes)} of experts have no place; the"
            " speeds are those of a cluster that has room for them."
        )
    if placed.disk_bytes:
        share = placed.disk_bytes / model.expert_bytes
        read = "which are read for each token" if placed.read_bytes else "until GPUs have copies of as many"
        found.append(f"{_gb(placed.disk_bytes)} of experts ({share:.0%}) lie on disks, {read}.")
    remote = [h for h in placed.holdings if h.expert_bytes and not h.machine.coordinator]
    if remote and cluster.rtt_s >= WIFI_RTT_S:
        waiting = len(model.layers) * cluster.rtt_s
        found.append(
            f"The link is as slow as Wi-Fi: each of {len(model.layers)} layers waits for one round trip of "
            f"{cluster.rtt_s * 1e3:.3g} ms, {waiting * 1e3:.0f} ms a token, so it can't do more than "
            f"{1 / waiting:.2g} tokens/s. Use cables."
        )
    return found


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3g} GB"
