"""Which of a checkpoint's tensors make up an expert, and how: transformers' own conversion, one expert at a time.

transformers keeps, for each family, renamings and converters from the names in checkpoints to its modules' fused
parameters ([experts, out, in]). Nearly all of its converters treat each expert alone (stack, concatenate, transpose,
de-interleave), so they run here on a stack of one expert. The others convert a whole layer at once.
"""

import math
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
from .quantized.tensor import AnyTensor

# Types of numbers that mean nothing without a scale.
_CODES = (torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(slots=True)
class Source:
    """The stored tensors of one of the model's parameters, by the converter's patterns (one, unnamed, without it)."""

    converter: WeightConverter | None
    first_target: str  # the full name under which the converter is applied
    tensors: dict[str, list[AnyTensor]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KeyMap:
    """Of each of the model's parameters and buffers, its source; and the tensors that belong to no expert."""

    sources: dict[str, Source]
    trunk: dict[str, AnyTensor]


def map_keys(architecture: Architecture, tensors: dict[str, AnyTensor]) -> KeyMap:
    """Finds each parameter's source as transformers' loader does (`convert_and_load_state_dict_in_model`)."""
    model = architecture.model
    known = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    experts = tuple(f"{layer.name}." for layer in architecture.experts)

    sources: dict[str, Source] = {}
    trunk: dict[str, AnyTensor] = {}
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, known)
        converter = by_pattern[pattern] if pattern is not None else None
        targets = [target] if converter is None else _targets(converter, target)
        for each in targets:
            source = sources.setdefault(each, Source(converter, target))
            source.tensors.setdefault(pattern or "", []).append(tensors[name])
            if tensors[name].dtype in _CODES and each in known and known[each].is_floating_point():
                raise CoordinatorError(
                    f"The checkpoint holds {name} as {tensors[name].get_dtype()} without its scales, so what it means"
                    " is not known; download it again."
                )
        if not all(each.startswith(experts) for each in targets):
            trunk[name] = tensors[name]
    return KeyMap({name: source for name, source in sources.items() if name in known}, trunk)


def _targets(converter: WeightConverter, first: str) -> list[str]:
    return [first.replace(converter.target_patterns[0], target) for target in converter.target_patterns]


class ExpertParameter:
    """One fused parameter of a layer's experts, [experts, ...], readable expert by expert."""

    def __init__(self, architecture: Architecture, name: str, source: Source) -> None:
        """`name` is the parameter's full name.

        Raises CoordinatorError when the checkpoint's tensors do not make up the parameter.
        """
        self.name = name
        self._source = source
        self._config = architecture.config
        self._parameter = architecture.model.get_parameter(name)
        self._experts = self._parameter.shape[0]
        operations = source.converter.operations if source.converter is not None else []
        self._one_tensor_each = bool(operations) and type(operations[0]) is MergeModulelist
        self.by_expert = self._separable()
        self._check()

    def read(self, expert: int) -> torch.Tensor:
        """One expert's part, [1, ...] in the parameter's dtype. Only where `by_expert`."""
        if self._source.converter is None:
            return self._cast(self._source.tensors[""][0].read(expert, expert + 1))
        return self._convert(
            {
                pattern: [
                    self._cast(
                        tensors[expert].read() if self._one_tensor_each else tensors[0].read(expert, expert + 1)
                    )
                ]
                for pattern, tensors in self._source.tensors.items()
            },
            rows=1,
        )

    def read_all(self) -> torch.Tensor:
        """The whole parameter, in its dtype."""
        if self._source.converter is None:
            return self._cast(self._source.tensors[""][0].read())
        return self._convert(
            {pattern: [self._cast(t.read()) for t in tensors] for pattern, tensors in self._source.tensors.items()},
            rows=self._experts,
        )

    @property
    def sources(self) -> list[list[AnyTensor]]:
        """The stored tensors of each pattern, in the order that `origins` counts in."""
        return list(self._source.tensors.values())

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for parameters that are converted alike, and so have equal `origins`."""
        return (id(self._source.converter), self.name.rpartition(".")[2], tuple(self._sizes()))

    def tensor_of(self, pattern: int, expert: int) -> tuple[AnyTensor, int | None]:
        """Where an expert's part of a pattern lies: a tensor, and the expert's place if it is a stack."""
        tensors = self.sources[pattern]
        return (tensors[expert], None) if self._one_tensor_each else (tensors[0], expert)

    def origins(self) -> torch.Tensor:
        """Where each number of one expert's part comes from: the conversion of numbered entries. Only `by_expert`.

        int32 [1, ...]; entries are counted through the patterns' tensors of one expert, one after the other.
        """
        sizes = self._sizes()
        numbered: dict[str, list[torch.Tensor]] = {}
        start = 0
        for pattern, size in zip(self._source.tensors, sizes, strict=True):
            count = math.prod(size)
            if start + count > 2**31:
                raise CoordinatorError(f"The experts of {self.name} are too large.")
            numbered[pattern] = [torch.arange(start, start + count, dtype=torch.int32).view(size)]
            start += count
        if self._source.converter is None:
            return numbered[""][0]
        return self._convert(numbered, rows=1)

    def _sizes(self) -> list[tuple[int, ...]]:
        """Shapes of one expert's tensors, pattern by pattern, as the conversion takes them."""
        alone = not self._one_tensor_each
        return [
            (1, *tensors[0].shape[1:]) if alone else tensors[0].shape for tensors in self._source.tensors.values()
        ]

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._parameter.dtype)

    def _convert(self, collected: dict[str, list[torch.Tensor]], rows: int) -> torch.Tensor:
        converter: Any = deepcopy(self._source.converter)
        converter.collected_tensors.update(collected)
        model = _Shapes(self._parameter[:rows])
        value = converter.convert(self._source.first_target, model=model, config=self._config)[self.name]
        tensor: torch.Tensor = value[0] if isinstance(value, list) else value
        return tensor

    def _separable(self) -> bool:
        """Whether the conversion of one expert alone is that expert's part of the whole conversion."""
        if self._source.converter is None:
            return True
        operations: list[Any] = list(self._source.converter.operations)
        if self._one_tensor_each and operations.pop(0).dim != 0:
            return False
        if not all(_keeps_experts_apart(operation) for operation in operations):
            return False
        stored = list(self._source.tensors.values())
        if self._one_tensor_each:
            return all(len(tensors) == self._experts for tensors in stored)
        return all(len(tensors) == 1 and tensors[0].shape[:1] == (self._experts,) for tensors in stored)

    def _check(self) -> None:
        """Runs the conversion on shapes alone, so that a checkpoint that does not fit fails when it is opened."""
        wanted = tuple(self._parameter.shape)
        if self._source.converter is None:
            shape = self._source.tensors[""][0].shape
        else:
            counts = {len(tensors) for tensors in self._source.tensors.values()}
            shared = len(self._source.converter.target_patterns) > 1  # with another parameter's experts
            whole = len(counts) == 1 and (shared or counts == {self._experts})
            if self._one_tensor_each and not whole:
                raise self._misfit(f"make up {self.name} for {self._experts} experts only in part")
            if self.by_expert:
                wanted = (1, *wanted[1:])
            try:
                shape = tuple(self._convert(self._shapes(), rows=wanted[0]).shape)
            except (RuntimeError, ValueError, KeyError, IndexError) as error:
                raise CoordinatorError(
                    f"The checkpoint's tensors do not make up {self.name}: {str(error).splitlines()[0]}."
                ) from error
        if shape != wanted:
            raise self._misfit(f"give {self.name} the shape {list(shape)}, but its config says {list(wanted)}")

    def _misfit(self, what: str) -> CoordinatorError:
        found = [f"{len(tensors)} of {pattern or 'it'}" for pattern, tensors in self._source.tensors.items()]
        return CoordinatorError(
            f"The checkpoint's tensors ({', '.join(found)}) {what}; a tensor is missing or is another model's."
        )

    def _shapes(self) -> dict[str, list[torch.Tensor]]:
        """What `read` or `read_all` would convert, on the meta device."""
        shapes: dict[str, list[torch.Tensor]] = {}
        for pattern, tensors in self._source.tensors.items():
            chosen = tensors[:1] if self.by_expert else tensors
            alone = self.by_expert and not self._one_tensor_each
            sizes = [(1, *tensor.shape[1:]) if alone else tensor.shape for tensor in chosen]
            shapes[pattern] = [torch.empty(size, dtype=self._parameter.dtype, device="meta") for size in sizes]
        return shapes


@dataclass(frozen=True, slots=True)
class _Shapes:
    """Stands in for the model where a conversion asks for its parameter's shape."""

    parameter: torch.Tensor

    def get_parameter(self, name: str) -> torch.Tensor:
        return self.parameter


def _keeps_experts_apart(operation: Any) -> bool:
    """Whether an operation on [experts, ...] treats each expert alone."""
    if type(operation) in (Chunk, Concatenate, Interleave):
        return bool(operation.dim != 0)
    if type(operation) is Transpose:
        return operation.dim0 != 0 and operation.dim1 != 0
    return False
