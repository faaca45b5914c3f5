"""The experts that this node holds, in tiers: what of it lies where.

While all fit into the RAM that this node gives, they are mapped from the disk cache and stay. When a slice is larger,
they lie on disk and RAM holds those that are used most (`tier`, see tiers/ram.py). A GPU's memory is above that
(tiers/gpu.py).

One model at a time. The mapping of a layer is replaced, never changed, so a computation on another thread goes on
with the experts that it started with.
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from moehive.kernels.geometry import ExpertId, ExpertSpec, Manifest
from moehive.kernels.ops import ExpertWeights, load_expert

from .cache import mapped
from .tiers.arena import padded
from .tiers.ram import LEAST_EXPERTS, RamTier
from .tiers.reader import DiskReader
from .types import NodeError

if TYPE_CHECKING:
    from .tiers.gpu import GpuTier  # imports Triton, which only a node with a GPU needs

log = logging.getLogger(__name__)

_NONE: Mapping[int, ExpertWeights] = MappingProxyType({})


class StoreFull(NodeError):
    """An expert, or a slice, is more than this node gives to experts."""


class ExpertStore:
    """Experts by layer and number. Change it on the event loop's thread; `layer`, `spec`, `tier` are safe on any."""

    def __init__(self, capacity_bytes: int, disk_bytes: int = 0, gpu: "GpuTier | None" = None) -> None:
        """`capacity_bytes` of RAM, `disk_bytes` of disk for what is more, a GPU's memory for what is used most."""
        self.gpu = gpu
        self.capacity_bytes = capacity_bytes
        self.disk_bytes = disk_bytes
        self.bytes_held = 0  # in all tiers
        self.experts_held = 0
        self.manifest: Manifest | None = None
        self.first_epoch = 0  # requests of an older epoch mean another model
        self.changed: set[int] = set()  # layers whose mapping was replaced, for who follows that and empties it
        self.tier: RamTier | None = None  # while the experts are more than RAM holds
        self._reader: DiskReader | None = None
        self._layers: dict[int, Mapping[int, ExpertWeights]] = {}  # those that stay in RAM
        self._files: dict[ExpertId, Path] = {}  # of the disk cache, where known
        self._in_ram: frozenset[ExpertId] = frozenset()  # what the plan keeps there

    def use(self, manifest: Manifest, epoch: int) -> None:
        """Says which model the experts belong to from `epoch` on; another model's experts are dropped."""
        if self.manifest is None or self.manifest.fingerprint != manifest.fingerprint:
            self.retain(())
            self.pin(frozenset(), frozenset())
            self.tier = None
            self.first_epoch = epoch
        self.manifest = manifest

    def spec(self, layer: int) -> ExpertSpec | None:
        """What the experts of a layer compute; None when the model has no such layer."""
        if self.manifest is None or layer >= len(self.manifest.layers):
            return None
        return self.manifest.layers[layer].spec

    def top_k(self, layer: int) -> int:
        """How many experts a token asks for in a layer of the model."""
        assert self.manifest is not None
        return self.manifest.layers[layer].top_k

    def layer(self, layer: int) -> Mapping[int, ExpertWeights]:
        """The experts of a layer that stay in RAM, by number; this mapping never changes."""
        return self._layers.get(layer, _NONE)

    def __contains__(self, expert: ExpertId) -> bool:
        return expert.expert in self.layer(expert.layer) or (self.tier is not None and expert in self.tier)

    @property
    def ram_bytes(self) -> int:
        """Bytes of experts that are in RAM now."""
        if self.tier is None:
            return self.bytes_held
        return self.tier.ram_bytes + self._staying_bytes()

    def make_room(self, nbytes: int, keep: Collection[ExpertId]) -> None:
        """Sees to it that `nbytes` more can be held: drops all but `keep`, or turns to the disk.

        Raises StoreFull when that is not enough.
        """
        if self.bytes_held + nbytes > self.capacity_bytes:
            self.retain(keep)
        wanted = self.bytes_held + nbytes
        if wanted <= self.capacity_bytes:
            return
        if wanted > self.capacity_bytes + self.disk_bytes:
            disk = f" of memory and {self.disk_bytes} of disk" if self.disk_bytes else " of memory"
            raise StoreFull(
                f"The slice needs {wanted} bytes and this node gives {self.capacity_bytes}{disk} to experts: add "
                "nodes, or start this one with a larger --memory or --disk."
            )
        self._turn_to_disk()

    def add(self, expert: ExpertId, weights: ExpertWeights, path: Path | None = None) -> None:
        """Takes an expert of the model named in `use`, for which there is room; `path` is its checked file."""
        if expert in self:
            return
        assert self.manifest is not None
        if path is not None:
            self._files[expert] = path
        if self.tier is not None and path is not None:
            self.tier.add(expert, weights.spec, path)
        else:
            self._layers[expert.layer] = {**self.layer(expert.layer), expert.expert: weights}
            self.changed.add(expert.layer)
        self.bytes_held += self.manifest.nbytes(expert)
        self.experts_held += 1

    def retain(self, experts: Collection[ExpertId]) -> int:
        """Drops what is not among `experts`; returns how many experts were dropped."""
        gone = [
            ExpertId(layer, number)
            for layer, held in self._layers.items()
            for number in held
            if (layer, number) not in experts
        ]
        for layer in {expert.layer for expert in gone}:
            held = self._layers[layer]
            self._layers[layer] = {number: weights for number, weights in held.items() if (layer, number) in experts}
            self.changed.add(layer)
        if self.tier is not None:
            below = [expert for expert in self.tier.experts() if expert not in experts]
            for expert in below:
                self.tier.remove(expert)
            gone += below
        for expert in gone:
            assert self.manifest is not None
            self._files.pop(expert, None)
            if self.gpu is not None:
                self.gpu.remove(expert)
            self.bytes_held -= self.manifest.nbytes(expert)
        self.experts_held -= len(gone)
        return len(gone)

    def pin(self, in_ram: frozenset[ExpertId], in_vram: frozenset[ExpertId]) -> None:
        """From now on these stay in RAM, and in a GPU's memory, once they are there, and no others."""
        self._in_ram = in_ram
        if self.tier is not None:
            self.tier.pin(in_ram)
        if self.gpu is not None:
            self.gpu.pinned = in_vram

    def prepare(self) -> None:
        """A slice is whole: finds out how the disk is read best, and fills the RAM above it. Blocks for a moment."""
        tier = self.tier
        if tier is not None and self._reader is not None:
            self._reader.choose(list(self._files.values()))
        if self.gpu is not None:
            for weights in self._one_of_each_kind():
                self.gpu.measure_break_even(weights)
        if tier is not None:
            tier.fill()

    def close(self) -> None:
        """Ends the reading from disk; nothing may be computing any more."""
        if self._reader is not None:
            self._reader.close()

    def _one_of_each_kind(self) -> Iterator[ExpertWeights]:
        """An expert of each spec, of those on disk one that is mapped for the moment. Raises CacheError."""
        seen: set[ExpertSpec] = set()
        for held in list(self._layers.values()):
            for weights in held.values():
                if weights.spec not in seen:
                    seen.add(weights.spec)
                    yield weights
        for expert, path in list(self._files.items()):
            assert self.manifest is not None
            spec = self.manifest.layers[expert.layer].spec_of(expert.expert)
            if spec not in seen:
                seen.add(spec)
                yield load_expert(spec, mapped(path, spec.nbytes))

    def _staying_bytes(self) -> int:
        return sum(weights.spec.nbytes for held in self._layers.values() for weights in held.values())

    def _turn_to_disk(self) -> None:
        """From now on the experts whose files are known lie on disk, and RAM holds some of them."""
        if self.tier is not None:
            return
        assert self.manifest is not None
        stay: dict[int, Mapping[int, ExpertWeights]] = {
            layer: {number: weights for number, weights in held.items() if (layer, number) not in self._files}
            for layer, held in self._layers.items()
        }
        below = {
            ExpertId(layer, number): weights.spec
            for layer, held in self._layers.items()
            for number, weights in held.items()
            if (layer, number) in self._files
        }
        room = self.capacity_bytes - sum(w.spec.nbytes for held in stay.values() for w in held.values())
        largest = max(
            self.manifest.nbytes(ExpertId(number, expert))
            for number, layer in enumerate(self.manifest.layers)
            for expert in range(layer.experts)
        )
        if room < LEAST_EXPERTS * padded(largest):
            raise StoreFull(
                f"This node gives {room} bytes of memory to experts; to keep the rest on disk it needs at least "
                f"{LEAST_EXPERTS * padded(largest)}: start it with a larger --memory."
            )
        if self._reader is None:
            self._reader = DiskReader()
        tier = RamTier(room, [layer.experts for layer in self.manifest.layers], self._reader)
        for expert, spec in below.items():
            tier.add(expert, spec, self._files[expert])
        tier.pin(self._in_ram)
        self.changed.update(self._layers)
        self._layers = stay
        self.tier = tier
        log.info("The experts are more than the memory for them: %.2f GB hold what is used most.", room / 1e9)
