"""A GGUF file as the coordinator sees it; `checkpoints.checkpoint.Checkpoint` is that for safetensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from moehive.kernels.geometry import ExpertId, GeometryError, LayerGeometry, Manifest

from ...types import CoordinatorError
from ..config import context_length
from ..experts import layout_of
from ..outline import ExpertsOutline, Outlines, pack_layers, unpack_layers
from .config import read_config
from .experts import LayerExperts
from .file import GgufFile, GgufTensor, open_gguf
from .tensors import GgufTrunk, dtype_of
from .tokenizer import load_tokenizer

if TYPE_CHECKING:
    from ..architecture import Architecture


class GgufCheckpoint:
    """One model's weights in a GGUF file. Opening reads headers only; `expert_blob` may be called from threads.

    `manifest` describes the experts, in the file's own formats, `described` what the model computes with them,
    wherever they lie.
    """

    def __init__(
        self,
        file: GgufFile,
        name: str,
        config: PreTrainedConfig,
        layers: tuple[ExpertsOutline, ...],
        manifest: Manifest | None,
    ) -> None:
        """Use `GgufCheckpoint.open`."""
        self.path = file.path
        self.family = str(config.model_type)
        self.config = config
        self.dtype = dtype_of(config)
        self.context_length = context_length(config)
        self._file = file
        self.described = layers
        self._layers = [_layer(file, self.family, layer) for layer in layers] if manifest is None else []
        self.manifest = manifest or Manifest(
            name,
            file.fingerprint,
            tuple(
                LayerGeometry(layer.experts, layer.top_k, found.spec)
                for layer, found in zip(layers, self._layers, strict=True)
            ),
        )
        # Whether no expert's numbers are rounded anew when it is read.
        self.computed_as_stored = all(layer.computed_as_stored for layer in self._layers)

    @classmethod
    def open(
        cls,
        path: str | Path,
        name: str | None = None,
        manifest: Manifest | None = None,
        outlines: Outlines | None = None,
    ) -> GgufCheckpoint:
        """Opens a .gguf file; of a split model, any of its parts.

        `name` is the model's name for people (the file's by default). `manifest` describes experts that lie elsewhere
        (pack/): the file then holds the trunk alone. `outlines` as for `open_model`. Raises CoordinatorError, one
        sentence, when the file is not a whole model of a supported architecture.
        """
        path = Path(path)
        file = open_gguf(path)
        config = read_config(file)
        try:
            return cls(file, name or _short_name(path), config, _layers(file, config, outlines), manifest)
        except GeometryError as error:
            raise CoordinatorError(f"{path}: {error}") from error

    def expert_blob(self, expert: ExpertId) -> torch.Tensor:
        """One expert's blob (kernels/geometry.py), uint8 [manifest.nbytes(expert)], read from disk now.

        Raises CoordinatorError when the file can no longer be read.
        """
        return self._layers[expert.layer].blob(expert.expert)

    def trunk_tensors(self) -> GgufTrunk:
        """The trunk's tensors for a lean trunk, each read when it is asked for."""
        return GgufTrunk(self._file, self.config)

    def load_trunk(self) -> Architecture:
        """The model with its trunk's weights in memory, decoded, and its experts on meta.

        Raises CoordinatorError for tensors that are missing or do not fit.
        """
        from .. import architecture as arch
        from ..loading import load_trunk

        architecture = arch.build(self.path, self.config, self.dtype)
        experts = tuple(f"{layer.name}." for layer in architecture.experts)
        source = self.trunk_tensors()
        names = [name for name in architecture.model.state_dict() if not name.startswith(experts) and name in source]
        tensors: dict[str, Any] = {name: source.tensor(name).to(self.dtype) for name in names}
        load_trunk(self.path, architecture, tensors)
        return architecture

    def trunk_stored(self) -> list[GgufTensor]:
        """The tensors that are no routed experts, in the file's order."""
        return [tensor for name, tensor in self._file.tensors.items() if "_exps." not in name]

    def tokenizer(self) -> tuple[Any, frozenset[int]]:
        """See Checkpoint.tokenizer."""
        return load_tokenizer(self._file)


def _layers(file: GgufFile, config: PreTrainedConfig, outlines: Outlines | None) -> tuple[ExpertsOutline, ...]:
    """What a layer's experts compute, in f32, as transformers' model says, or as it is kept."""
    kept = outlines.find(file.fingerprint, "gguf", unpack_layers) if outlines is not None else None
    if kept is not None:
        return kept
    from .. import architecture as arch  # here, for it takes seconds

    architecture = arch.build(file.path, config, dtype_of(config))
    layers = tuple(
        ExpertsOutline(
            one.name, one.module.num_experts, one.top_k, layout_of(architecture.family, one, torch.float32)
        )
        for one in architecture.experts
    )
    if outlines is not None:
        outlines.keep(file.fingerprint, "gguf", pack_layers(layers))
    return layers


def _layer(file: GgufFile, family: str, layer: ExpertsOutline) -> LayerExperts:
    number = re.search(r"\.layers\.(\d+)\.", layer.name)
    if number is None:
        raise CoordinatorError(f"{file.path}: the experts of {family} do not lie in numbered layers.")
    return LayerExperts(file, int(number[1]), layer.experts, layer.layout.spec)


def _short_name(path: Path) -> str:
    return re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", path.absolute().name) or path.name
