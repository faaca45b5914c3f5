"""Who holds how much, in which memory: the split with which a layer is done soonest.

Each layer's experts are split alike, so a machine is described by its share of every layer. A machine's time for its
share of one token's experts is what it costs to ask it, and its bytes by the speed of the memory that they lie in;
the quickest memory is filled first. Shares are such that all machines are done at once, as far as their memories
reach. Disks get only what no memory holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .cluster import Cluster, Machine
from .constants import CONTEXT_TOKENS, COORDINATOR_BYTES, HOP_S, KERNEL_SHARES, NODE_BYTES, OTHER_SHARE, STEP_SHARE
from .model import Model

_STEPS = 200  # of bisection


@dataclass(frozen=True, slots=True)
class Holding:
    """What one machine holds. `experts` are bytes by tier; `trunk_bytes` of the coordinator, with its cache."""

    machine: Machine
    experts: dict[str, int]
    trunk_bytes: int = 0
    kv_bytes: int = 0

    @property
    def expert_bytes(self) -> int:
        """In all its tiers."""
        return sum(self.experts.values())

    def seconds(self, nbytes: float, kernel_share: float) -> float:
        """To read and compute `nbytes` of experts, spread over its tiers as its experts are."""
        if not nbytes:
            return 0.0
        tiers = self.machine.tiers()
        return sum(
            nbytes * held / self.expert_bytes / (tiers[name].bytes_per_s * (1.0 if name == "disk" else kernel_share))
            for name, held in self.experts.items()
        )


@dataclass(frozen=True, slots=True)
class Placed:
    """All machines; `missing_bytes` have no place anywhere, `missing_trunk_bytes` none on the coordinator."""

    holdings: tuple[Holding, ...]
    missing_bytes: int
    missing_trunk_bytes: int

    @property
    def fits(self) -> bool:
        """Whether everything has a place."""
        return not (self.missing_bytes or self.missing_trunk_bytes)

    @property
    def disk_bytes(self) -> int:
        """Of experts that lie on disks."""
        return sum(holding.experts.get("disk", 0) for holding in self.holdings)


@dataclass(frozen=True, slots=True)
class _Room:
    """A machine's tiers as steps: bytes that fit, and bytes a second."""

    cost: float  # seconds to ask it
    tiers: tuple[tuple[str, int, float], ...]


def kernel_share(model: Model) -> float:
    """Of what memory could deliver, the part that kernels of the model's format reach."""
    return STEP_SHARE * KERNEL_SHARES.get(model.format, OTHER_SHARE)


def room_for_weights(model: Model, cluster: Cluster) -> int:
    """Bytes of VRAM and RAM that are left for a model's weights beside the programs and the cache."""
    room = 0
    for machine in cluster.machines:
        beside = CONTEXT_TOKENS * model.kv_bytes_a_token + COORDINATOR_BYTES if machine.coordinator else NODE_BYTES
        room += machine.vram.nbytes if machine.vram else 0
        room += max(0, machine.ram.nbytes - beside) if machine.ram else 0
    return room


def hold(model: Model, cluster: Cluster) -> Placed:
    """Places a model."""
    kv = CONTEXT_TOKENS * model.kv_bytes_a_token
    needed = model.trunk_bytes + kv + COORDINATOR_BYTES
    room = cluster.coordinator.ram.nbytes if cluster.coordinator.ram else 0
    share = kernel_share(model)
    rooms = [_room(machine, cluster, needed, share) for machine in cluster.machines]
    scale = model.active_expert_bytes / len(model.layers) / model.expert_bytes  # of what it holds, read for a layer
    memory = [_Room(r.cost, tuple(tier for tier in r.tiers if tier[0] != "disk")) for r in rooms]
    amounts = _split(memory, model.expert_bytes, scale)
    held = [_fill(r, amount) for r, amount in zip(memory, amounts, strict=True)]
    rest = model.expert_bytes - sum(map(int, amounts))
    if rest > len(rooms):  # more than rounding
        disks = [_Room(r.cost, tuple(tier for tier in r.tiers if tier[0] == "disk")) for r in rooms]
        on_disk = _split(disks, rest, scale)
        for kept, amount in zip(held, on_disk, strict=True):
            if int(amount):
                kept["disk"] = int(amount)
        rest -= sum(map(int, on_disk))
    holdings = tuple(
        Holding(machine, kept, model.trunk_bytes if machine.coordinator else 0, kv if machine.coordinator else 0)
        for machine, kept in zip(cluster.machines, held, strict=True)
    )
    return Placed(holdings, rest if rest > 2 * len(rooms) else 0, max(0, needed - room))


def _room(machine: Machine, cluster: Cluster, trunk: int, share: float) -> _Room:
    tiers = []
    for name, tier in machine.tiers().items():
        nbytes = tier.nbytes
        if name == "ram":
            nbytes = max(0, nbytes - (trunk if machine.coordinator else NODE_BYTES))
        tiers.append((name, nbytes, tier.bytes_per_s * (1.0 if name == "disk" else share)))
    return _Room(0.0 if machine.coordinator else cluster.rtt_s + HOP_S, tuple(tiers))


def _split(rooms: Sequence[_Room], wanted: float, scale: float) -> list[float]:
    """Bytes for each machine, `wanted` in all if they fit: all are done at the same time, or are full."""
    if sum(nbytes for room in rooms for _, nbytes, _ in room.tiers) <= wanted:
        return [float(sum(nbytes for _, nbytes, _ in room.tiers)) for room in rooms]
    low, high = 0.0, 1.0
    while sum(_within(room, high, scale) for room in rooms) < wanted:
        high *= 2
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if sum(_within(room, middle, scale) for room in rooms) < wanted:
            low = middle
        else:
            high = middle
    amounts = [_within(room, high, scale) for room in rooms]
    factor = wanted / sum(amounts)  # the last of the bisection's error
    return [amount * min(1.0, factor) for amount in amounts]


def _within(room: _Room, seconds: float, scale: float) -> float:
    """Bytes that a machine can hold and still be done with a layer in time."""
    left, held = seconds - room.cost, 0.0
    for _, nbytes, speed in room.tiers:
        if left <= 0:
            break
        take = min(float(nbytes), left * speed / scale)
        held += take
        left -= take * scale / speed
    return held


def _fill(room: _Room, amount: float) -> dict[str, int]:
    held: dict[str, int] = {}
    left = int(amount)
    for name, nbytes, _ in room.tiers:
        take = min(left, nbytes)
        if take:
            held[name] = take
            left -= take
    return held
