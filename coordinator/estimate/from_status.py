"""A cluster's description from what it measured of itself: `moehive status --cluster-file`."""

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address
from typing import Protocol

from ..types import LOCAL, CoordinatorError
from .cluster import Cluster, Machine, Tier
from .constants import COORDINATOR_BYTES, DISK_BYTES_PER_S, NODE_BYTES, PROBE_S, VRAM_BYTES_PER_S
from .this_machine import BANDWIDTH


class MeasuredNode(Protocol):
    """What a status says of a node; moehive.client's NodeStatus."""

    @property
    def name(self) -> str: ...
    @property
    def address(self) -> str: ...
    @property
    def ram_bytes(self) -> int: ...
    @property
    def read_bandwidth(self) -> float: ...
    @property
    def round_trip_s(self) -> float: ...
    @property
    def link_bandwidth(self) -> float: ...
    @property
    def disk_bytes(self) -> int: ...
    @property
    def disk_bandwidth(self) -> float: ...
    @property
    def vram_bytes(self) -> int: ...
    @property
    def products_per_s(self) -> float: ...
    @property
    def token_products_per_s(self) -> float: ...


def of_status(nodes: Sequence[MeasuredNode], own: Machine) -> tuple[Cluster, list[str]]:
    """The cluster, and sentences on what was not measured and is assumed.

    `own`: the coordinator's machine; what nodes on it give of its memory and disk is theirs. The slowest link counts
    for all.
    Raises CoordinatorError when no link was measured.
    """
    remote = [node for node in nodes if node.name != LOCAL and node.ram_bytes and node.read_bandwidth]
    trips = [node.round_trip_s for node in remote if node.round_trip_s]
    if not trips:
        raise CoordinatorError("No link to a node was measured yet; send the model a request, then try again.")
    speeds = [node.link_bandwidth for node in remote if node.link_bandwidth]
    assumed = []
    if not speeds:
        assumed.append("No large message was sent yet, so 1 Gbit/s is assumed; a long prompt measures it.")
    if unread := [node.name for node in remote if node.disk_bytes and not node.disk_bandwidth]:
        assumed.append(
            f"The disk of {', '.join(unread)} was not measured, so {DISK_BYTES_PER_S / 1e9:g} GB/s is assumed; a "
            "node measures it once its experts are more than its memory holds."
        )
    if gpus := [node.name for node in remote if node.vram_bytes]:
        assumed.append(
            f"How fast the GPU of {', '.join(gpus)} reads its memory is not measured, so "
            f"{VRAM_BYTES_PER_S / 1e9:g} GB/s is assumed; write its maker's figure as vram_Bps."
        )
    here = [node for node in remote if _is_here(node.address)]
    if own.ram is not None:
        # What they hold is mapped from files, whose memory counts as free.
        left = own.ram.nbytes - sum(node.ram_bytes for node in here)
        own = replace(own, ram=Tier(max(left, COORDINATOR_BYTES), own.ram.bytes_per_s))
    theirs = sum(node.disk_bytes for node in here)
    if own.disk is not None:
        left = own.disk.nbytes - theirs
        own = replace(own, disk=Tier(left, own.disk.bytes_per_s) if left > 0 else None)
    if own.disk is not None:
        assumed.append(
            f"The coordinator's machine could give {own.disk.nbytes / 1e9:,.0f} GB of disk to experts, which takes a"
            " node on it: `moehive node`."
        )
    machines = (own, *map(_machine, remote))
    # A measured round trip holds the software's part, which an estimate adds by itself.
    rtt = max(0.0, max(trips) - own.step_factor * PROBE_S)
    return Cluster(rtt, min(speeds, default=BANDWIDTH), machines), assumed


def _is_here(address: str) -> bool:
    """Whether host:port is of loopback."""
    try:
        return ip_address(address.rpartition(":")[0].strip("[]")).is_loopback
    except ValueError:
        return False


def _machine(node: MeasuredNode) -> Machine:
    """A node gives its memory to experts; its process comes on top, which an estimate takes off again."""
    disk, vram = node.disk_bytes, node.vram_bytes
    return Machine(
        node.name,
        vram=Tier(vram, VRAM_BYTES_PER_S) if vram else None,
        ram=Tier(node.ram_bytes + NODE_BYTES, node.read_bandwidth),
        disk=Tier(disk, node.disk_bandwidth or DISK_BYTES_PER_S) if disk else None,
        products_per_s=node.products_per_s or None,
        token_products_per_s=node.token_products_per_s or None,
    )
