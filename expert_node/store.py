"""The experts that this node holds in RAM, bounded by the bytes that it gives to them.

One model at a time. The mapping of a layer is replaced, never changed, so a computation on another thread goes on
with the experts that it started with. Further tiers (VRAM above, disk below) belong behind `layer`.
"""

from collections.abc import Collection, Mapping
from types import MappingProxyType

from moehive.kernels.geometry import ExpertId, ExpertSpec, Manifest
from moehive.kernels.ops import ExpertWeights

from .types import NodeError

_NONE: Mapping[int, ExpertWeights] = MappingProxyType({})


class StoreFull(NodeError):
    """An expert, or a slice, is more than this node gives to experts."""


class ExpertStore:
    """Experts by layer and number. Change it on the event loop's thread; `layer` and `spec` are safe on any."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.bytes_held = 0
        self.experts_held = 0
        self.manifest: Manifest | None = None
        self.first_epoch = 0  # requests of an older epoch mean another model
        self._layers: dict[int, Mapping[int, ExpertWeights]] = {}

    def use(self, manifest: Manifest, epoch: int) -> None:
        """Says which model the experts belong to from `epoch` on; another model's experts are dropped."""
        if self.manifest is None or self.manifest.fingerprint != manifest.fingerprint:
            self.retain(())
            self.first_epoch = epoch
        self.manifest = manifest

    def spec(self, layer: int) -> ExpertSpec | None:
        """What the experts of a layer compute; None when the model has no such layer."""
        if self.manifest is None or layer >= len(self.manifest.layers):
            return None
        return self.manifest.layers[layer].spec

    def layer(self, layer: int) -> Mapping[int, ExpertWeights]:
        """The experts held of a layer, by number; this mapping never changes."""
        return self._layers.get(layer, _NONE)

    def __contains__(self, expert: ExpertId) -> bool:
        return expert.expert in self.layer(expert.layer)

    def make_room(self, nbytes: int, keep: Collection[ExpertId]) -> None:
        """Drops all but `keep` when `nbytes` more do not fit. Raises StoreFull when that is not enough."""
        if self.bytes_held + nbytes > self.capacity_bytes:
            self.retain(keep)
        if self.bytes_held + nbytes > self.capacity_bytes:
            raise StoreFull(
                f"The slice needs {self.bytes_held + nbytes} bytes of memory and this node gives "
                f"{self.capacity_bytes} bytes to experts: add nodes, or start this one with a larger --memory."
            )

    def add(self, expert: ExpertId, weights: ExpertWeights) -> None:
        """Takes an expert of the model named in `use`, for which there is room."""
        if expert in self:
            return
        assert self.manifest is not None
        nbytes = self.manifest.nbytes(expert)
        self._layers[expert.layer] = {**self.layer(expert.layer), expert.expert: weights}
        self.bytes_held += nbytes
        self.experts_held += 1

    def retain(self, experts: Collection[ExpertId]) -> int:
        """Drops what is not among `experts`; returns how many experts were dropped."""
        dropped = 0
        for layer, held in list(self._layers.items()):
            kept = {number: weights for number, weights in held.items() if ExpertId(layer, number) in experts}
            gone = len(held) - len(kept)
            if gone:
                assert self.manifest is not None
                self._layers[layer] = kept
                self.bytes_held -= gone * self.manifest.layers[layer].spec.nbytes
                self.experts_held -= gone
                dropped += gone
        return dropped
