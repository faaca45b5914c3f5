"""What to buy, change or leave out: each is estimated as the cluster itself is, and ranked by what it brings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .cluster import Cluster, Machine, Tier
from .holding import hold
from .model import Model
from .step import decode_step

_GPU = Tier(24 * 10**9, 900e9)  # as a used RTX 3090 has
_RAM_BYTES = 32 << 30
_WIRED_S, _WIRED_BYTES = 0.2e-3, 2.5e9 / 8  # of a cable at 2.5 Gbit/s
_LEAST_GAIN = 1.03


@dataclass(frozen=True, slots=True)
class Advice:
    """One change, and what the cluster would then do."""

    what: str
    decode_tokens_per_s: float
    fits: bool


def advise(model: Model, models: Mapping[str, Model], cluster: Cluster) -> list[Advice]:
    """Changes that make the model fit first, then those that make it faster, the best in front."""
    fits_now, now = _outcome(model, cluster)
    found = []
    for what, changed, other in _changes(model, models, cluster):
        fits, rate = _outcome(changed, other)
        if (fits and not fits_now) or (fits == fits_now and rate > _LEAST_GAIN * now):
            found.append(Advice(what, rate, fits))
    found.sort(key=lambda one: (not one.fits, -one.decode_tokens_per_s, one.what))
    return found


def _outcome(model: Model, cluster: Cluster) -> tuple[bool, float]:
    placed = hold(model, cluster)
    return placed.fits, 1 / decode_step(model, cluster, placed).seconds


def _changes(model: Model, models: Mapping[str, Model], cluster: Cluster) -> Iterator[tuple[str, Model, Cluster]]:
    for machine in cluster.machines:
        if machine.ram is not None:
            ram = Tier(machine.ram.nbytes + _RAM_BYTES, machine.ram.bytes_per_s)
            yield f"32 GB more RAM in {machine.name}", model, _with(cluster, machine, replace(machine, ram=ram))
        if machine.vram is None:
            gpu = replace(machine, vram=_GPU)
            yield f"a GPU with 24 GB in {machine.name}", model, _with(cluster, machine, gpu)
    if len(cluster.machines) > 1 and cluster.rtt_s > _WIRED_S:
        speed = max(cluster.bandwidth, _WIRED_BYTES)
        yield "cables: 2.5 Gbit/s, 0.2 ms", model, replace(cluster, rtt_s=_WIRED_S, bandwidth=speed)
    nodes = [machine for machine in cluster.machines if not machine.coordinator]
    for machine in nodes:  # each adds a message to a layer, and a slow one may be what a layer waits for
        yield f"to leave out {machine.name}", model, _without(cluster, [machine])
    if len(nodes) > 1:
        yield f"{cluster.coordinator.name} alone, without any node", model, _without(cluster, nodes)
    best = max((m.ram for m in cluster.machines if m.ram is not None), key=lambda tier: tier.nbytes)
    another = Machine("another", ram=best)
    yield (
        f"another machine like the largest ({best.nbytes / 2**30:.0f} GiB)",
        model,
        replace(cluster, machines=(*cluster.machines, another)),
    )
    for name, smaller in models.items():
        if smaller.total_bytes < 0.9 * model.total_bytes:
            yield f"{name} instead of {model.format}, at some loss", smaller, cluster


def _without(cluster: Cluster, machines: Sequence[Machine]) -> Cluster:
    left = tuple(machine for machine in cluster.machines if not any(machine is one for one in machines))
    return replace(cluster, machines=left)


def _with(cluster: Cluster, old: Machine, new: Machine) -> Cluster:
    return replace(cluster, machines=tuple(new if machine is old else machine for machine in cluster.machines))
