"""Which of a checkpoint's tensors make up an expert, and how: transformers' own conversion, one expert at a time.

transformers keeps, for each family, renamings and converters from the names in checkpoints to its modules' fused
parameters ([experts, out, in]). Nearly all of its converters treat each expert alone (stack, concatenate, transpose,
de-interleave), so they run here on a stack of one expert. The others convert a whole layer at once.
"""

import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ..types import CoordinatorError
from .architecture import Architecture
from .safetensors_file import StoredTensor


@dataclass(slots=True)
class Source:
    """The stored tensors of one of the model's parameters, by the converter's patterns (one, unnamed, without it)."""

    converter: WeightConverter | None
    first_target: str  # the full name under which the converter is applied
    tensors: dict[str, list[StoredTensor]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KeyMap:
    """Of each of the model's parameters and buffers, its source; and the tensors that belong to no expert."""

    sources: dict[str, Source]
    trunk: dict[str, StoredTensor]


def map_keys(architecture: Architecture, tensors: dict[str, StoredTensor]) -> KeyMap:
    """Finds each parameter's source as transformers' loader does (`convert_and_load_state_dict_in_model`)."""
    model = architecture.model
    known = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    experts = tuple(f"{layer.name}." for layer in architecture.experts)

    sources: dict[str, Source] = {}
    trunk: dict[str, StoredTensor] = {}
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, known)
        converter = by_pattern[pattern] if pattern is not None else None
        targets = [target] if converter is None else _targets(converter, target)
        for each in targets:
            source = sources.setdefault(each, Source(converter, target))
            source.tensors.setdefault(pattern or "", []).append(tensors[name])
        if not all(each.startswith(experts) for each in targets):
            trunk[name] = tensors[name]
    return KeyMap({name: source for name, source in sources.items() if name in known}, trunk)


def _targets(converter: WeightConverter, first: str) -> list[str]:
    return [first.replace(converter.target_patterns[0], target) for target in converter.target_patterns]


class ExpertParameter:
    """One fused parameter of a layer's experts, readable expert by expert."""

    def __init__(self, architecture: Architecture, name: str, experts: int, source: Source) -> None:
        """`name` is the parameter's full name; `experts` the size of its first dimension.

        Raises CoordinatorError when the checkpoint's tensors do not make up the parameter.
        """
        self.name = name
        self._experts = experts
        self._source = source
        self._config = architecture.config
        self._parameter = architecture.model.get_parameter(name)
        self._per_expert_lists = self._lists_of_experts()
        self.by_expert = self._separable()
        self._check()

    def read(self, expert: int) -> torch.Tensor:
        """One expert's part, [1, ...] in the parameter's dtype. Only where `by_expert`."""
        if self._source.converter is None:
            return self._single().read(expert, expert + 1).to(self._parameter.dtype)
        return self._convert(
            {
                pattern: [self._one(tensors, expert).to(self._parameter.dtype)]
                for pattern, tensors in self._source.tensors.items()
            }
        )

    def read_all(self) -> torch.Tensor:
        """The whole parameter, [experts, ...] in its dtype."""
        if self._source.converter is None:
            return self._single().read().to(self._parameter.dtype)
        return self._convert(
            {
                pattern: [tensor.read().to(self._parameter.dtype) for tensor in tensors]
                for pattern, tensors in self._source.tensors.items()
            }
        )

    def _single(self) -> StoredTensor:
        return self._source.tensors[""][0]

    def _one(self, tensors: list[StoredTensor], expert: int) -> torch.Tensor:
        return tensors[expert].read() if self._per_expert_lists else tensors[0].read(expert, expert + 1)

    def _convert(self, collected: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        converter = deepcopy(self._source.converter)
        assert converter is not None
        converter.collected_tensors.update(collected)
        rows = self._experts if not self.by_expert else 1
        result = converter.convert(
            self._source.first_target, model=_OneExpert(self._parameter, rows), config=self._config
        )
        value = result[self.name]
        tensor: torch.Tensor = value[0] if isinstance(value, list) else value
        return tensor

    def _lists_of_experts(self) -> bool:
        """Whether the checkpoint has a tensor of its own for each expert."""
        converter = self._source.converter
        return converter is not None and isinstance(converter.operations[0], MergeModulelist)

    def _separable(self) -> bool:
        """Whether the conversion of one expert is that expert's part of the whole conversion."""
        converter = self._source.converter
        if converter is None:
            return True
        if converter.operations[0].__class__ is MergeModulelist and converter.operations[0].dim != 0:
            return False
        operations = converter.operations[1:] if self._per_expert_lists else converter.operations
        if not all(_keeps_experts_apart(operation) for operation in operations):
            return False
        counts = {len(tensors) for tensors in self._source.tensors.values()}
        if self._per_expert_lists:
            return counts == {self._experts}
        shapes = [tensor.shape for tensors in self._source.tensors.values() for tensor in tensors]
        return counts == {1} and all(shape and shape[0] == self._experts for shape in shapes)

    def _check(self) -> None:
        """Runs the conversion on shapes alone, so that a checkpoint that does not fit fails when it is opened."""
        wanted = tuple(self._parameter.shape)
        if self._per_expert_lists:
            for pattern, found in self._source.tensors.items():
                if self.by_expert is False and len(found) != self._experts and len(self._targets()) == 1:
                    raise CoordinatorError(
                        f"The checkpoint has {len(found)} of the {self._experts} tensors {pattern} that make up"
                        f" {self.name}; download it again."
                    )
        if self._source.converter is None:
            shape = self._single().shape
        else:
            expert_only = self.by_expert
            collected = {
                pattern: [
                    torch.empty(
                        (1, *tensor.shape[1:]) if expert_only and not self._per_expert_lists else tensor.shape,
                        device="meta",
                    )
                    for tensor in (tensors[:1] if expert_only else tensors)
                ]
                for pattern, tensors in self._source.tensors.items()
            }
            try:
                shape = tuple(self._convert(collected).shape)
            except (RuntimeError, ValueError, KeyError, IndexError) as error:
                raise CoordinatorError(
                    f"The checkpoint's tensors do not make up {self.name}: {str(error).splitlines()[0]}."
                ) from error
            if expert_only:
                wanted = (1, *wanted[1:])
        if tuple(shape) != wanted:
            raise CoordinatorError(
                f"The checkpoint's tensors give {self.name} the shape {tuple(shape)}; its config says {wanted}."
            )

    def _targets(self) -> list[str]:
        converter = self._source.converter
        return [] if converter is None else converter.target_patterns


@dataclass(frozen=True, slots=True)
class _OneExpert:
    """Stands in for the model where a conversion asks for its parameter's shape."""

    parameter: torch.Tensor
    rows: int

    def get_parameter(self, name: str) -> torch.Tensor:
        return self.parameter[:1] if self.rows == 1 else self.parameter


def _keeps_experts_apart(operation: Any) -> bool:
    """Whether an operation on [experts, ...] treats each expert alone."""
    if type(operation) in (Chunk, Concatenate, Interleave):
        return bool(operation.dim != 0)
    if type(operation) is Transpose:
        return operation.dim0 != 0 and operation.dim1 != 0
    return False


def missing_names(architecture: Architecture, sources: Iterable[str]) -> list[str]:
    """The expert parameters for which the checkpoint has no tensor at all."""
    have = set(sources)
    return [
        f"{layer.name}.{name}"
        for layer in architecture.experts
        for name, _ in layer.module.named_parameters()
        if f"{layer.name}.{name}" not in have
    ]
