"""Who holds how much, in which memory: the split with which a layer is done soonest.

Each layer's experts are split alike, so a machine is described by its share of every layer. A machine's time for its
share of one token's experts is what it costs to ask it, and its bytes by the speed of the memory that they are read
from. Shares are such that all machines are done at once, as far as their memories reach. Disks get only what no
memory holds, and only beside some RAM.

As in the running cluster (coordinator/cluster/policy.py), a GPU that computes the model's format holds copies of
experts that lie in RAM or on disk. Those need not be in RAM meanwhile: above a disk its memory is room, as RAM is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moehive.kernels.geometry import bytes_filled

from .cluster import Cluster, Machine
from .constants import CONTEXT_TOKENS, COORDINATOR_BYTES, HOP_S, NODE_BYTES
from .model import Model
from .one_token import tier_speeds

_STEPS = 200  # of bisection


@dataclass(frozen=True, slots=True)
class Holding:
    """What one machine holds: bytes of experts in RAM and on disk, and of those the bytes that a GPU has copies of.

    `trunk_bytes` and `kv_bytes` are the coordinator's.
    """

    machine: Machine
    ram_bytes: int = 0
    disk_bytes: int = 0
    vram_bytes: int = 0
    trunk_bytes: int = 0
    kv_bytes: int = 0

    @property
    def expert_bytes(self) -> int:
        """All that it holds."""
        return self.ram_bytes + self.disk_bytes

    @property
    def read_bytes(self) -> int:
        """Those that are read from the disk whenever a token asks for them."""
        return self.read_from().get("disk", 0)

    def read_from(self) -> dict[str, int]:
        """Bytes of experts by the tier that they are read from when a token asks for them."""
        disk = max(0, self.disk_bytes - self.vram_bytes)
        found = {"vram": self.vram_bytes, "ram": self.expert_bytes - self.vram_bytes - disk, "disk": disk}
        return {name: nbytes for name, nbytes in found.items() if nbytes}

    def seconds(self, nbytes: float, speeds: Mapping[str, float]) -> float:
        """To read and compute `nbytes` of experts, spread over its tiers as its experts are; `speeds` of each."""
        if not nbytes:
            return 0.0
        return sum(nbytes * held / self.expert_bytes / speeds[name] for name, held in self.read_from().items())


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
    def read_bytes(self) -> int:
        """Of experts that are read from disks whenever a token asks for them."""
        return sum(holding.read_bytes for holding in self.holdings)


@dataclass(frozen=True, slots=True)
class _Room:
    """A machine's room for experts, bytes, and how quickly each further byte is read."""

    cost: float  # seconds to ask it
    ram: int
    memory: int  # RAM, and above a disk a GPU's memory
    disk: int  # beyond those
    steps: tuple[tuple[int, float], ...]  # bytes, bytes a second; the quickest first

    def slice(self, begin: int, end: int) -> "_Part":
        """What it takes from `begin` bytes on, up to `end`."""
        found, before = [], 0
        for nbytes, speed in self.steps:
            inside = min(end, before + nbytes) - max(begin, before)
            if inside > 0:
                found.append((inside, speed))
            before += nbytes
        return _Part(self.cost, tuple(found))


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a machine's room, as _Room has it."""

    cost: float
    steps: tuple[tuple[int, float], ...]

    @property
    def nbytes(self) -> int:
        """All of it."""
        return sum(nbytes for nbytes, _ in self.steps)


def room_for_weights(model: Model, cluster: Cluster) -> int:
    """Bytes of RAM that are left for a model's weights beside the programs and the cache.

    Less one expert a machine, in the model's format: experts are whole, so no memory is full to the last byte.
    """
    return sum(
        max(0, machine.ram.nbytes - _beside(machine, model) - max(layer.largest_bytes for layer in model.layers))
        for machine in cluster.machines
        if machine.ram is not None
    )


def hold(model: Model, cluster: Cluster) -> Placed:
    """Places a model."""
    kv = CONTEXT_TOKENS * model.kv_bytes_a_token
    needed = model.trunk_bytes + kv + COORDINATOR_BYTES
    room = cluster.coordinator.ram.nbytes if cluster.coordinator.ram else 0
    rooms = [_room(machine, cluster, model) for machine in cluster.machines]
    scale = model.active_expert_bytes / len(model.layers) / model.expert_bytes  # of what it holds, read for a layer
    held = [int(n) for n in _split([r.slice(0, r.memory) for r in rooms], model.expert_bytes, scale)]
    rest = model.expert_bytes - sum(held)
    if rest > len(rooms):  # more than rounding
        more = [int(n) for n in _split([r.slice(r.memory, r.memory + r.disk) for r in rooms], rest, scale)]
        held = [a + b for a, b in zip(held, more, strict=True)]
        rest -= sum(more)
    holdings = tuple(
        Holding(
            machine,
            min(nbytes, room.ram),
            nbytes - min(nbytes, room.ram),
            min(nbytes, _gpu_bytes(machine, model)),
            model.trunk_bytes if machine.coordinator else 0,
            kv if machine.coordinator else 0,
        )
        for machine, room, nbytes in zip(cluster.machines, rooms, held, strict=True)
    )
    return Placed(holdings, rest if rest > 2 * len(rooms) else 0, max(0, needed - room))


def _beside(machine: Machine, model: Model) -> int:
    """Bytes of RAM that the program takes there, and the cache."""
    return CONTEXT_TOKENS * model.kv_bytes_a_token + COORDINATOR_BYTES if machine.coordinator else NODE_BYTES


def _gpu_bytes(machine: Machine, model: Model) -> int:
    """Bytes of GPU memory that hold the model's experts."""
    return machine.vram.nbytes if machine.vram is not None and model.on_gpu else 0


def _room(machine: Machine, cluster: Cluster, model: Model) -> _Room:
    cost = 0.0 if machine.coordinator else cluster.rtt_s + cluster.coordinator.step_factor * HOP_S
    beside = _beside(machine, model) + (model.trunk_bytes if machine.coordinator else 0)
    if machine.ram is None or machine.ram.nbytes <= beside:
        return _Room(cost, 0, 0, 0, ())
    left = machine.ram.nbytes - beside
    ram = memory = bytes_filled(left, model.layers)
    speeds = tier_speeds(model, machine)
    steps = [(ram, speeds["ram"])]
    on_gpu, disk = _gpu_bytes(machine, model), 0
    if machine.vram is not None and on_gpu:
        steps.insert(0, (on_gpu, speeds["vram"]))
    if machine.disk is not None:
        above = bytes_filled(min(on_gpu, machine.disk.nbytes), model.layers)
        memory = bytes_filled(left + above, model.layers)
        disk = bytes_filled(left + machine.disk.nbytes, model.layers) - memory
        steps.append((memory + disk, speeds["disk"]))
    return _Room(cost, ram, memory, disk, tuple(steps))


def _split(rooms: Sequence[_Part], wanted: float, scale: float) -> list[float]:
    """Bytes for each machine, `wanted` in all if they fit: all are done at the same time, or are full."""
    if sum(room.nbytes for room in rooms) <= wanted:
        return [float(room.nbytes) for room in rooms]
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


def _within(room: _Part, seconds: float, scale: float) -> float:
    """Bytes that a machine can hold and still be done with a layer in time."""
    left, held = seconds - room.cost, 0.0
    for nbytes, speed in room.steps:
        if left <= 0:
            break
        take = min(float(nbytes), left * speed / scale)
        held += take
        left -= take * scale / speed
    return held
