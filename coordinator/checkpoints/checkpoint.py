"""A checkpoint as the coordinator sees it: a trunk to load into memory, and experts to hand out as blobs."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from moehive.kernels.blob import build_blob
from moehive.kernels.geometry import ExpertId, GeometryError, LayerGeometry, Manifest

from ..types import CoordinatorError
from . import architecture as arch
from .architecture import Architecture
from .conversion import ExpertParameter, KeyMap, map_keys
from .directory import Directory, open_directory
from .experts import ExpertLayout, canonical, layout_of
from .loading import load_trunk
from .quantized.experts import OwnBits, OwnBitsFinder, blob_of
from .quantized.find import ordinary_tensors
from .quantized.method import method_of
from .quantized.tensor import AnyTensor, QuantizedTensor
from .safetensors_file import StoredTensor
from .trunk_tensors import SafetensorsTrunk

log = logging.getLogger(__name__)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Checkpoint:
    """One model's weights on disk. Opening reads headers only; `expert_blob` may be called from several threads.

    `manifest` describes the experts; `trunk_bytes` is what `load_trunk` will hold in memory; `shapes` are those of
    the model's parameters.
    """

    def __init__(
        self, directory: Directory, name: str, architecture: Architecture, keys: KeyMap, manifest: Manifest | None
    ) -> None:
        """Use `Checkpoint.open`."""
        self.path = directory.path
        self.family = architecture.family
        self.config: PreTrainedConfig = architecture.config
        self.dtype = architecture.dtype
        self.context_length = arch.context_length(architecture.config)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in architecture.model.named_parameters()}
        self._keys = keys
        self._layouts: list[ExpertLayout] = []
        self._parameters: list[dict[str, ExpertParameter]] = []
        self._own_bits: list[dict[str, list[OwnBits]]] = []  # of projections that are quantized, by place
        own = OwnBitsFinder()
        layers: list[LayerGeometry] = []
        for layer in architecture.experts if manifest is None else ():
            layout = layout_of(self.family, layer, architecture.dtype)
            parameters: dict[str, ExpertParameter] = {}
            for short in layout.names:
                full = f"{layer.name}.{short}"
                source = keys.sources.get(full)
                if source is None:
                    raise CoordinatorError(f"{self.path} has no tensors for {full}; download the checkpoint again.")
                parameters[short] = ExpertParameter(architecture, full, source)
            kept = own.find(layout, parameters)
            layout = replace(layout, spec=own.spec_of(layout.spec, kept))
            self._layouts.append(layout)
            self._parameters.append(parameters)
            self._own_bits.append(kept)
            layers.append(LayerGeometry(layer.module.num_experts, layer.top_k, layout.spec))
        self.manifest = manifest or Manifest(name, directory.fingerprint, tuple(layers))
        self.computed_as_stored = not own.expanded  # no expert's numbers are rounded anew when it is read
        if own.expanded:
            log.warning(
                "%s stores experts in a way that no kernel computes in (%s): they become %s",
                self.path, ", ".join(sorted(own.expanded)), self.dtype,
            )  # fmt: skip
        self.trunk_bytes = _trunk_bytes(architecture)
        self._lock = threading.Lock()  # held while a layer that cannot be read expert by expert is converted
        self._converted: tuple[int, dict[str, torch.Tensor]] | None = None  # that layer, at most one

    @classmethod
    def open(cls, path: str | Path, name: str | None = None, manifest: Manifest | None = None) -> Checkpoint:
        """Opens a directory of safetensors, as `save_pretrained` writes it or a hub serves it.

        `name` is the model's name for people (the directory's by default). `manifest` describes experts that lie
        elsewhere (pack/): the directory then holds the trunk alone. Raises CoordinatorError, one sentence, when the
        directory is not a whole checkpoint of a supported mixture-of-experts model.
        """
        directory = open_directory(Path(path))
        config = arch.read_config(directory.path, directory.config)
        dtype = _dtype(directory, config)
        method = method_of(directory.path, directory.config)
        try:
            architecture = arch.build(directory.path, config, dtype)
            tensors: dict[str, AnyTensor] = dict(directory.tensors)
            if method is not None:
                tensors = ordinary_tensors(directory.path, directory.tensors, method, dtype)
            keys = map_keys(architecture, tensors)
            return cls(directory, name or directory.path.resolve().name, architecture, keys, manifest)
        except GeometryError as error:
            raise CoordinatorError(f"{directory.path}: {error}") from error

    def expert_blob(self, expert: ExpertId) -> torch.Tensor:
        """One expert's blob (kernels/geometry.py), uint8 [manifest.nbytes(expert)], read from disk now.

        Raises CoordinatorError when the files can no longer be read.
        """
        layout = self._layouts[expert.layer]
        kept = self._own_bits[expert.layer]
        if not kept:
            return build_blob(layout.spec, canonical(layout, self._parts(expert)))
        return blob_of(layout, kept, self._parts(expert), expert.expert)

    def load_trunk(self) -> Architecture:
        """The model with its trunk's weights in memory and its experts on meta.

        Raises CoordinatorError for tensors that are missing or do not fit.
        """
        architecture = arch.build(self.path, self.config, self.dtype)
        load_trunk(self.path, architecture, self._keys.trunk)
        return architecture

    def trunk_tensors(self) -> SafetensorsTrunk:
        """The trunk's tensors for a lean trunk, each read when it is asked for."""
        return SafetensorsTrunk(self.path, self.dtype, self._keys.sources)

    def trunk_stored(self) -> dict[str, StoredTensor]:
        """The stored tensors that the trunk is made of, by the checkpoint's own names."""
        used = {t.name for source in self._keys.sources.values() for found in source.tensors.values() for t in found}
        found: dict[str, StoredTensor] = {}
        for name, tensor in self._keys.trunk.items():
            if name in used:
                parts = tensor.parts if isinstance(tensor, QuantizedTensor) else (tensor,)
                found |= {part.name: part for part in parts}
        return found

    def _parts(self, expert: ExpertId) -> dict[str, torch.Tensor]:
        """The tensors that are not kept in their own bits, by their names in the experts module."""
        kept = {name for name, place in self._places(expert.layer) if place in self._own_bits[expert.layer]}
        parameters = {n: p for n, p in self._parameters[expert.layer].items() if n not in kept}
        norm = self._layouts[expert.layer].norm
        parts: dict[str, torch.Tensor] = {}
        for name, parameter in parameters.items():
            if norm is not None and name == norm.name:
                parts[name] = parameter.read_all()
            elif parameter.by_expert:
                parts[name] = parameter.read(expert.expert)
            else:
                parts[name] = self._whole(expert.layer, name)[expert.expert : expert.expert + 1]
        return parts

    def _places(self, layer: int) -> list[tuple[str, str]]:
        """The tensors of a layer's experts: names in the experts module, and in the blob."""
        layout = self._layouts[layer]
        return [(name, place.name) for name, place in zip(layout.names, layout.spec.tensors, strict=True)]

    def _whole(self, layer: int, name: str) -> torch.Tensor:
        with self._lock:
            if self._converted is None or self._converted[0] != layer:
                self._converted = None  # before the next is made: one layer in memory, not two
                self._converted = (layer, {})
            tensors = self._converted[1]
            if name not in tensors:
                tensors[name] = self._parameters[layer][name].read_all()
            return tensors[name]


def _dtype(directory: Directory, config: PreTrainedConfig) -> torch.dtype:
    """The dtype to compute in: the config's, else that of the checkpoint's first floating tensor, as transformers."""
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if dtype is None:
        dtype = next((t.dtype for t in directory.tensors.values() if t.dtype in _FLOATS), None)
    if dtype not in _FLOATS:
        raise CoordinatorError(f"{directory.path} is in {dtype}, which is not supported; give f32, bf16 or f16.")
    return dtype


def _trunk_bytes(architecture: Architecture) -> int:
    model = architecture.model
    experts = tuple(f"{layer.name}." for layer in architecture.experts)
    tied = model.all_tied_weights_keys
    return sum(
        tensor.nbytes
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if name not in tied and not name.startswith(experts)
    )
