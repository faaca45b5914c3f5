"""A checkpoint as the coordinator sees it: a trunk to load into memory, and experts to hand out as blobs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from moehive.kernels.blob import build_blob
from moehive.kernels.geometry import ExpertId, GeometryError, LayerGeometry, Manifest

from ..types import CoordinatorError
from .config import context_length, read_config
from .directory import Directory, open_directory
from .expert_parameter import ExpertParameter, WholeConversion
from .experts import ExpertLayout, canonical
from .outline import Outline, Outlines, pack_outline, unpack_outline
from .quantized.experts import OwnBits, OwnBitsFinder, blob_of
from .quantized.find import ordinary_tensors
from .quantized.method import method_of
from .quantized.tensor import AnyTensor, QuantizedTensor
from .safetensors_file import StoredTensor
from .tokenizer import load_tokenizer
from .trunk_tensors import SafetensorsTrunk, misfit

if TYPE_CHECKING:
    from .architecture import Architecture

log = logging.getLogger(__name__)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Checkpoint:
    """One model's weights on disk. Opening reads headers only; `expert_blob` may be called from several threads.

    `manifest` describes the experts, `described` what the model computes with them, wherever they lie; `trunk_bytes`
    is what `load_trunk` will hold in memory; `shapes` are those of the model's parameters.
    """

    def __init__(
        self,
        directory: Directory,
        name: str,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        tensors: dict[str, AnyTensor],
        outline: Outline,
        whole: Mapping[str, WholeConversion],
        manifest: Manifest | None,
    ) -> None:
        """Use `Checkpoint.open`."""
        self.path = directory.path
        self.family = str(config.model_type)
        self.config = config
        self.dtype = dtype
        self.context_length = context_length(config)
        self.shapes = outline.shapes
        self.trunk_bytes = outline.trunk_bytes
        self.described = outline.layers
        self._tensors = tensors
        self._outline = outline
        self._layouts: list[ExpertLayout] = []
        self._parameters: list[dict[str, ExpertParameter]] = []
        self._own_bits: list[dict[str, list[OwnBits]]] = []  # of projections that are quantized, by place
        own = OwnBitsFinder()
        layers: list[LayerGeometry] = []
        for layer in outline.layers if manifest is None else ():
            parameters = {
                short: ExpertParameter(one, tensors, whole.get(one.name)) for short, one in layer.parameters.items()
            }
            kept = own.find(layer.layout, parameters)
            layout = replace(layer.layout, spec=own.spec_of(layer.layout.spec, kept))
            self._layouts.append(layout)
            self._parameters.append(parameters)
            self._own_bits.append(kept)
            layers.append(LayerGeometry(layer.experts, layer.top_k, layout.spec))
        self.manifest = manifest or Manifest(name, directory.fingerprint, tuple(layers))
        self.computed_as_stored = not own.expanded  # no expert's numbers are rounded anew when it is read
        if own.expanded:
            log.warning(
                "%s stores experts in a way that no kernel computes in (%s): they become %s",
                self.path, ", ".join(sorted(own.expanded)), self.dtype,
            )  # fmt: skip
        self._lock = threading.Lock()  # held while a layer that cannot be read expert by expert is converted
        self._converted: tuple[int, dict[str, torch.Tensor]] | None = None  # that layer, at most one

    @classmethod
    def open(
        cls,
        path: str | Path,
        name: str | None = None,
        manifest: Manifest | None = None,
        outlines: Outlines | None = None,
    ) -> Checkpoint:
        """Opens a directory of safetensors, as `save_pretrained` writes it or a hub serves it.

        `name` is the model's name for people (the directory's by default). `manifest` describes experts that lie
        elsewhere (pack/): the directory then holds the trunk alone. `outlines` as for `open_model`. Raises
        CoordinatorError, one sentence, when the directory is not a whole checkpoint of a supported
        mixture-of-experts model.
        """
        directory = open_directory(Path(path))
        config = read_config(directory.path, directory.config)
        dtype = _dtype(directory, config)
        method = method_of(directory.path, directory.config)
        name = name or directory.path.resolve().name
        kind = "safetensors" if manifest is None else "trunk"
        try:
            tensors: dict[str, AnyTensor] = dict(directory.tensors)
            if method is not None:
                tensors = ordinary_tensors(directory.path, directory.tensors, method, dtype)
            kept = outlines.find(directory.fingerprint, kind, unpack_outline) if outlines is not None else None
            if kept is not None:
                return cls(directory, name, config, dtype, tensors, kept, {}, manifest)
            from . import architecture as arch  # here, for it takes seconds
            from .conversion import outline_of

            architecture = arch.build(directory.path, config, dtype)
            outline, whole = outline_of(directory.path, architecture, tensors, with_experts=manifest is None)
            opened = cls(directory, name, config, dtype, tensors, outline, whole, manifest)
        except GeometryError as error:
            raise CoordinatorError(f"{directory.path}: {error}") from error
        if outlines is not None and not whole:
            outlines.keep(directory.fingerprint, kind, pack_outline(outline))
        return opened

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
        from . import architecture as arch
        from .loading import load_trunk

        architecture = arch.build(self.path, self.config, self.dtype)
        load_trunk(self.path, architecture, {name: self._tensors[name] for name in self._outline.trunk})
        return architecture

    def trunk_tensors(self) -> SafetensorsTrunk:
        """The trunk's tensors for a lean trunk, each read when it is asked for.

        Raises CoordinatorError for tensors that do not fit.
        """
        plain = {name: self._tensors[stored] for name, stored in self._outline.plain.items()}
        for name, tensor in plain.items():
            wanted = self.shapes.get(name, tensor.shape)
            if tuple(tensor.shape) != wanted:
                raise misfit(self.path, name, tensor.shape, wanted)
        return SafetensorsTrunk(self.path, self.dtype, plain)

    def trunk_stored(self) -> dict[str, StoredTensor]:
        """The stored tensors that the trunk is made of, by the checkpoint's own names."""
        unused = set(self._outline.unused)
        found: dict[str, StoredTensor] = {}
        for name in self._outline.trunk:
            if name not in unused:
                tensor = self._tensors[name]
                parts = tensor.parts if isinstance(tensor, QuantizedTensor) else (tensor,)
                found |= {part.name: part for part in parts}
        return found

    def tokenizer(self) -> tuple[Any, frozenset[int]]:
        """transformers' tokenizer (None if there is none), and the ids that end a text.

        Raises CoordinatorError when it can't be read.
        """
        return load_tokenizer(self.path)

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
