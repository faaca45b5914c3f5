"""Which of a checkpoint's tensors make up what of the model, and how: transformers' own conversion, as an outline.

transformers keeps, for each family, renamings and converters from the names in checkpoints to its modules' fused
parameters ([experts, out, in]). Nearly all of its converters treat each expert alone (stack, concatenate, transpose,
de-interleave), so they become a recipe for one expert (recipe.py). The others convert a whole layer at once.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
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
from .architecture import Architecture, ExpertsModule
from .expert_parameter import WholeConversion, misfit
from .experts import layout_of
from .outline import ExpertsOutline, Outline, ParameterOutline
from .quantized.tensor import AnyTensor
from .recipe import Recipe, Step, shape_of

# Types of numbers that mean nothing without a scale.
_CODES = (torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(slots=True)
class _Source:
    """The stored tensors of one of the model's parameters, by the converter's patterns (one, unnamed, without it)."""

    converter: WeightConverter | None
    first_target: str  # the full name under which the converter is applied
    tensors: dict[str, list[str]] = field(default_factory=dict)


def outline_of(
    path: Path, architecture: Architecture, tensors: Mapping[str, AnyTensor], with_experts: bool
) -> tuple[Outline, dict[str, WholeConversion]]:
    """The outline of a checkpoint's `tensors`; and how parameters without a recipe are converted, by full name.

    `path` is for errors. Without experts, as in the trunk of a pack, layers have no parameters. Raises
    CoordinatorError.
    """
    model = architecture.model
    sources, trunk = _sources(architecture, tensors)
    experts = tuple(f"{layer.name}." for layer in architecture.experts)
    used = {name for source in sources.values() for names in source.tensors.values() for name in names}
    finder = _Finder(path, architecture, tensors, sources)
    outline = Outline(
        layers=tuple(map(finder.layer if with_experts else finder.described, architecture.experts)),
        shapes={name: tuple(tensor.shape) for name, tensor in model.named_parameters()},
        trunk_bytes=_trunk_bytes(architecture),
        plain={
            name: source.tensors[""][0]
            for name, source in sources.items()
            if source.converter is None and not name.startswith(experts)
        },
        trunk=tuple(trunk),
        unused=tuple(name for name in trunk if name not in used),
    )
    return outline, finder.whole


def _sources(architecture: Architecture, tensors: Mapping[str, AnyTensor]) -> tuple[dict[str, _Source], list[str]]:
    """Each parameter's source, found as transformers' loader does (`convert_and_load_state_dict_in_model`).

    And the names of the tensors that belong to no expert.
    """
    model = architecture.model
    known = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    experts = tuple(f"{layer.name}." for layer in architecture.experts)

    sources: dict[str, _Source] = {}
    trunk: list[str] = []
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, known)
        converter = by_pattern[pattern] if pattern is not None else None
        targets = [target] if converter is None else _targets(converter, target)
        for each in targets:
            source = sources.setdefault(each, _Source(converter, target))
            source.tensors.setdefault(pattern or "", []).append(name)
            if tensors[name].dtype in _CODES and each in known and known[each].is_floating_point():
                raise CoordinatorError(
                    f"The checkpoint holds {name} as {tensors[name].get_dtype()} without its scales, so what it means"
                    " is not known; download it again."
                )
        if not all(each.startswith(experts) for each in targets):
            trunk.append(name)
    return {name: source for name, source in sources.items() if name in known}, trunk


def _targets(converter: WeightConverter, first: str) -> list[str]:
    return [first.replace(converter.target_patterns[0], target) for target in converter.target_patterns]


@dataclass(frozen=True, slots=True)
class _Finder:
    """What makes up a checkpoint's experts. `whole`: conversions of parameters without a recipe, by full name."""

    path: Path  # for errors
    architecture: Architecture
    tensors: Mapping[str, AnyTensor]
    sources: Mapping[str, _Source]
    whole: dict[str, WholeConversion] = field(default_factory=dict)

    def described(self, layer: ExpertsModule) -> ExpertsOutline:
        layout = layout_of(self.architecture.family, layer, self.architecture.dtype)
        return ExpertsOutline(layer.name, layer.module.num_experts, layer.top_k, layout)

    def layer(self, layer: ExpertsModule) -> ExpertsOutline:
        found = self.described(layer)
        parameters: dict[str, ParameterOutline] = {}
        for short in found.layout.names:
            full = f"{layer.name}.{short}"
            source = self.sources.get(full)
            if source is None:
                raise CoordinatorError(f"{self.path} has no tensors for {full}; download the checkpoint again.")
            parameters[short] = self._parameter(full, source)
        return replace(found, parameters=parameters)

    def _parameter(self, name: str, source: _Source) -> ParameterOutline:
        parameter, config = self.architecture.model.get_parameter(name), self.architecture.config
        outline = ParameterOutline(name, tuple(parameter.shape), parameter.dtype, (), source.tensors)
        if source.converter is None:
            return outline
        order = source.converter.source_patterns.index
        outline = replace(outline, tensors={p: source.tensors[p] for p in sorted(source.tensors, key=order)})
        stored = [[self.tensors[each] for each in names] for names in outline.tensors.values()]
        recipe = _recipe(outline, source.converter, source.first_target, stored, config)
        if recipe is None:
            self.whole[name] = _Whole(source.converter, source.first_target, name, parameter, config)
            _check_whole(outline, source.converter, self.tensors, self.whole[name])
        return replace(outline, recipe=recipe)


def _recipe(
    outline: ParameterOutline,
    converter: WeightConverter,
    first_target: str,
    stored: list[list[AnyTensor]],
    config: PreTrainedConfig,
) -> Recipe | None:
    """The conversion as it is for one expert alone; None if that is not a part of the whole conversion."""
    operations: list[Any] = list(converter.operations)
    experts = outline.shape[0]
    steps: list[Step] = []
    if operations and type(operations[0]) is MergeModulelist:
        if operations.pop(0).dim != 0 or not all(len(pattern) == experts for pattern in stored):
            return None
        steps.append(("stack",))
        sizes = [tuple(pattern[0].shape) for pattern in stored]
    elif all(len(pattern) == 1 and pattern[0].shape[:1] == (experts,) for pattern in stored):
        sizes = [(1, *pattern[0].shape[1:]) for pattern in stored]
    else:
        return None
    for number, operation in enumerate(operations):
        last = number == len(operations) - 1
        if type(operation) is Concatenate and operation.dim != 0:
            steps.append(("concatenate", operation.dim))
        elif type(operation) is Interleave and operation.dim != 0:
            steps.append(("interleave", operation.dim, bool(operation.inverse)))
        elif type(operation) is Chunk and operation.dim != 0 and last:
            targets = operation.get_target_patterns(converter.target_patterns, config=config)
            names = [first_target.replace(converter.target_patterns[0], target) for target in targets]
            if outline.name not in names:
                return None
            steps.append(("chunk", operation.dim, len(targets), names.index(outline.name)))
        elif type(operation) is Transpose and operation.dim0 != 0 and operation.dim1 != 0:
            try:
                shape = shape_of(tuple(steps), sizes)
            except ValueError:
                return None
            if not (operation.check_dims and shape == (1, *outline.shape[1:])):
                steps.append(("transpose", operation.dim0, operation.dim1))
        else:
            return None
    return tuple(steps) if len(sizes) == 1 or any(step[0] == "concatenate" for step in steps) else None


@dataclass(frozen=True, slots=True)
class _Whole:
    """transformers' converter on a whole parameter."""

    converter: WeightConverter
    first_target: str
    name: str
    parameter: torch.Tensor
    config: PreTrainedConfig

    def __call__(self, collected: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        converter: Any = deepcopy(self.converter)
        converter.collected_tensors.update(collected)
        value = converter.convert(self.first_target, model=self, config=self.config)[self.name]
        tensor: torch.Tensor = value[0] if isinstance(value, list) else value
        return tensor

    def get_parameter(self, name: str) -> torch.Tensor:
        """Stands in for the model where a conversion asks for its parameter's shape."""
        return self.parameter


def _check_whole(
    outline: ParameterOutline, converter: WeightConverter, tensors: Mapping[str, AnyTensor], whole: WholeConversion
) -> None:
    """Runs the conversion on shapes alone, so that a checkpoint that does not fit fails when it is opened."""
    name, experts = outline.name, outline.shape[0]
    counts = {len(names) for names in outline.tensors.values()}
    shared = len(converter.target_patterns) > 1  # with another parameter's experts
    one_tensor_each = bool(converter.operations) and type(converter.operations[0]) is MergeModulelist
    if one_tensor_each and not (len(counts) == 1 and (shared or counts == {experts})):
        raise misfit(outline, f"make up {name} for {experts} experts only in part")
    empty = {
        pattern: [torch.empty(tensors[each].shape, dtype=outline.dtype, device="meta") for each in names]
        for pattern, names in outline.tensors.items()
    }
    try:
        shape = tuple(whole(empty).shape)
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise CoordinatorError(
            f"The checkpoint's tensors do not make up {name}: {str(error).splitlines()[0]}."
        ) from error
    if shape != outline.shape:
        raise misfit(outline, f"give {name} the shape {list(shape)}, but its config says {list(outline.shape)}")


def _trunk_bytes(architecture: Architecture) -> int:
    model = architecture.model
    experts = tuple(f"{layer.name}." for layer in architecture.experts)
    tied = model.all_tied_weights_keys
    return sum(
        tensor.nbytes
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if name not in tied and not name.startswith(experts)
    )
