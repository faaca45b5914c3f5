"""A GGUF file as the coordinator sees it; `checkpoints.checkpoint.Checkpoint` is that for safetensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from moehive.kernels.geometry import ExpertId, GeometryError, LayerGeometry, Manifest

from ...types import CoordinatorError
from .. import architecture as arch
from ..architecture import Architecture, ExpertsModule
from ..experts import layout_of
from ..loading import load_trunk
from .config import read_config
from .experts import LayerExperts
from .file import GgufFile, GgufTensor, open_gguf
from .tensors import GgufTrunk, dtype_of
from .tokenizer import load_tokenizer


class GgufCheckpoint:
    """One model's weights in a GGUF file. Opening reads headers only; `expert_blob` may be called from threads.

    `manifest` describes the experts, in the file's own formats.
    """

    def __init__(
        self,
        file: GgufFile,
        name: str,
        config: PreTrainedConfig,
        architecture: Architecture,
        manifest: Manifest | None,
    ) -> None:
        """Use `GgufCheckpoint.open`."""
        self.path = file.path
        self.family = architecture.family
        self.config = config
        self.dtype = architecture.dtype
        self.context_length = arch.context_length(config)
        self._file = file
        modules = architecture.experts if manifest is None else ()
        self._layers = [_layer(file, self.family, module) for module in modules]
        layers = [
            LayerGeometry(module.module.num_experts, module.top_k, layer.spec)
            for module, layer in zip(modules, self._layers, strict=True)
        ]
        self.manifest = manifest or Manifest(name, file.fingerprint, tuple(layers))
        # Whether no expert's numbers are rounded anew when it is read.
        self.computed_as_stored = all(layer.computed_as_stored for layer in self._layers)

    @classmethod
    def open(cls, path: str | Path, name: str | None = None, manifest: Manifest | None = None) -> GgufCheckpoint:
        """Opens a .gguf file; of a split model, any of its parts.

        `name` is the model's name for people (the file's by default). `manifest` describes experts that lie elsewhere
        (pack/): the file then holds the trunk alone. Raises CoordinatorError, one sentence, when the file is not a
        whole model of a supported architecture.
        """
        path = Path(path)
        file = open_gguf(path)
        config = read_config(file)
        try:
            architecture = arch.build(path, config, dtype_of(config))
            return cls(file, name or _short_name(path), config, architecture, manifest)
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
        """transformers' tokenizer of the file (None if it has none), and the tokens that end a text."""
        return load_tokenizer(self._file)


def _layer(file: GgufFile, family: str, module: ExpertsModule) -> LayerExperts:
    number = re.search(r"\.layers\.(\d+)\.", module.name)
    if number is None:
        raise CoordinatorError(f"{file.path}: the experts of {family} do not lie in numbered layers.")
    plain = layout_of(family, module, torch.float32).spec
    return LayerExperts(file, int(number[1]), module.module.num_experts, plain)


def _short_name(path: Path) -> str:
    return re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", path.absolute().name) or path.name
