"""What a person must know before trying: a model that does not fit, disks that are read for each token, Wi-Fi."""

from collections.abc import Sequence

from ..sizes import in_bytes
from .cluster import Cluster, Machine
from .constants import WIFI_RTT_S
from .holding import Placed
from .model import Model


def warn(model: Model, cluster: Cluster, placed: Placed) -> list[str]:
    """Sentences, the gravest first; none when all is well."""
    found = []
    if placed.missing_trunk_bytes:
        found.append(
            f"The coordinator {cluster.coordinator.name} lacks {in_bytes(placed.missing_trunk_bytes)} of RAM for the"
            " trunk, its cache and the program."
        )
    if placed.missing_bytes:
        found.append(
            f"It does not fit: {in_bytes(placed.missing_bytes)} of {in_bytes(model.expert_bytes)} of experts have no"
            " place; the speeds are those of a cluster that has room for them."
        )
    if placed.read_bytes:
        share = placed.read_bytes / model.expert_bytes
        found.append(
            f"{in_bytes(placed.read_bytes)} of experts ({share:.0%}) lie on disks, which are read for each token."
        )
    gpus = [machine for machine in cluster.machines if machine.vram is not None]
    if gpus and not model.on_gpu:
        found.append(
            f"Experts in {model.format} are not computed by a GPU, so that of {_names(gpus)} does not count."
        )
    if placed.missing_bytes and model.on_gpu and (bare := [gpu for gpu in gpus if gpu.disk is None]):
        found.append(
            f"The GPU of {_names(bare)} is no room without a disk that its experts come from: say disk_bytes and "
            "disk_Bps."
        )
    remote = [h for h in placed.holdings if h.expert_bytes and not h.machine.coordinator]
    if remote and cluster.rtt_s >= WIFI_RTT_S:
        waiting = len(model.layers) * cluster.rtt_s
        found.append(
            f"The link is as slow as Wi-Fi: each of {len(model.layers)} layers waits for one round trip of "
            f"{cluster.rtt_s * 1e3:.3g} ms, {waiting * 1e3:.0f} ms a token, so it can't do more than "
            f"{1 / waiting:.2g} tokens/s. Use cables."
        )
    return found


def _names(machines: Sequence[Machine]) -> str:
    return ", ".join(machine.name for machine in machines)
