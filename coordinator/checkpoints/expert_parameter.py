"""One fused parameter of a layer's experts, [experts, ...], read from the stored tensors that make it up."""

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch

from ..types import CoordinatorError
from .outline import ParameterOutline
from .quantized.tensor import AnyTensor
from .recipe import apply, shape_of

# Converts the whole parameter of its tensors by pattern, cast already.
WholeConversion: TypeAlias = Callable[[dict[str, list[torch.Tensor]]], torch.Tensor]


class ExpertParameter:
    """A parameter that is readable expert by expert where it has a recipe, else whole (`whole`)."""

    def __init__(
        self, outline: ParameterOutline, tensors: Mapping[str, AnyTensor], whole: WholeConversion | None = None
    ) -> None:
        """`tensors` are the checkpoint's, by name.

        Raises CoordinatorError when they do not make up the parameter, for shapes alone are tried here.
        """
        self.name = outline.name
        self.by_expert = outline.recipe is not None
        self._outline = outline
        self._whole = whole
        self._tensors = {p: [tensors[name] for name in names] for p, names in outline.tensors.items()}
        self._one_tensor_each = outline.recipe is not None and outline.recipe[:1] == (("stack",),)
        if self.by_expert:
            self._check()

    def read(self, expert: int) -> torch.Tensor:
        """One expert's part, [1, ...] in the parameter's dtype. Only where `by_expert`."""
        return self._apply(
            [
                self._cast(tensors[expert].read() if self._one_tensor_each else tensors[0].read(expert, expert + 1))
                for tensors in self._tensors.values()
            ]
        )

    def read_all(self) -> torch.Tensor:
        """The whole parameter, in its dtype. Only where it is not converted, or not `by_expert`."""
        if self._outline.recipe == ():
            return self._cast(next(iter(self._tensors.values()))[0].read())
        assert self._whole is not None
        return self._whole({p: [self._cast(t.read()) for t in tensors] for p, tensors in self._tensors.items()})

    @property
    def sources(self) -> list[list[AnyTensor]]:
        """The stored tensors of each pattern, in the order that `origins` counts in."""
        return list(self._tensors.values())

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for parameters that are converted alike, and so have equal `origins`. Only `by_expert`."""
        return (self._outline.recipe, self.name.rpartition(".")[2], tuple(self._sizes()))

    def tensor_of(self, pattern: int, expert: int) -> tuple[AnyTensor, int | None]:
        """Where an expert's part of a pattern lies: a tensor, and the expert's place if it is a stack."""
        tensors = self.sources[pattern]
        return (tensors[expert], None) if self._one_tensor_each else (tensors[0], expert)

    def origins(self) -> torch.Tensor:
        """Where each number of one expert's part comes from: the conversion of numbered entries. Only `by_expert`.

        int32 [1, ...]; entries are counted through the patterns' tensors of one expert, one after the other.
        """
        numbered: list[torch.Tensor] = []
        start = 0
        for size in self._sizes():
            count = math.prod(size)
            if start + count > 2**31:
                raise CoordinatorError(f"The experts of {self.name} are too large.")
            numbered.append(torch.arange(start, start + count, dtype=torch.int32).view(size))
            start += count
        return self._apply(numbered)

    def _sizes(self) -> list[tuple[int, ...]]:
        """Shapes of one expert's tensors, pattern by pattern, as the conversion takes them."""
        alone = not self._one_tensor_each
        return [
            (1, *tensors[0].shape[1:]) if alone else tuple(tensors[0].shape) for tensors in self._tensors.values()
        ]

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._outline.dtype)

    def _apply(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        assert self._outline.recipe is not None
        return apply(self._outline.recipe, tensors)

    def _check(self) -> None:
        """Runs the conversion on shapes alone, so that a checkpoint that does not fit fails when it is opened."""
        wanted = self._outline.shape
        if self._outline.recipe == ():
            shape = tuple(next(iter(self._tensors.values()))[0].shape)
        else:
            wanted = (1, *wanted[1:])
            try:
                shape = shape_of(self._outline.recipe or (), self._sizes())
            except ValueError as error:
                raise CoordinatorError(f"The checkpoint's tensors do not make up {self.name}: {error}.") from error
        if shape != wanted:
            raise misfit(
                self._outline, f"give {self.name} the shape {list(shape)}, but its config says {list(wanted)}"
            )


def misfit(outline: ParameterOutline, what: str) -> CoordinatorError:
    """The error for tensors that do not make up a parameter."""
    found = [f"{len(names)} of {pattern or 'it'}" for pattern, names in outline.tensors.items()]
    return CoordinatorError(
        f"The checkpoint's tensors ({', '.join(found)}) {what}; a tensor is missing or is another model's."
    )
