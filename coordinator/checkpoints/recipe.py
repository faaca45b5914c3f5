"""How stored tensors become one expert's part of a model's parameter, as plain data.

transformers' converters for experts are chains of a few operations on tensors with all experts, [experts, ...]. Those
that treat each expert alone are written down here as steps, and run on one expert, [1, ...].
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch

# ("stack",): tensors of one expert each become [1, ...].
# ("concatenate", dim): of all patterns, in their order.
# ("transpose", dim, other)
# ("interleave", dim, inverse): from pairs beside each other to halves, or back.
# ("chunk", dim, parts, which): one of so many equal parts.
Kind: TypeAlias = Literal["stack", "concatenate", "transpose", "interleave", "chunk"]
Step: TypeAlias = tuple[Any, ...]
Recipe: TypeAlias = tuple[Step, ...]


def apply(recipe: Recipe, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One expert's part of a parameter, [1, ...], of its stored tensors, one for each pattern.

    The tensors have shapes that `shape_of` accepts.
    """
    current = list(tensors)
    for kind, *numbers in recipe:
        if kind == "stack":
            current = [tensor[None] for tensor in current]
        elif kind == "concatenate":
            current = [torch.cat(current, dim=numbers[0])]
        else:
            (tensor,) = current
            current = [_of_one(kind, numbers, tensor)]
    (result,) = current
    return result


def shape_of(recipe: Recipe, sizes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of what `apply` makes of tensors with these shapes; no tensor is needed.

    torch's meta device would say the same, but imports its compiler for it, which takes seconds. Raises ValueError
    for tensors that do not fit.
    """
    current = list(sizes)
    for kind, *numbers in recipe:
        if kind == "stack":
            current = [(1, *size) for size in current]
            continue
        dim = numbers[0]
        if any(not dim < len(size) for size in current):
            raise ValueError(f"a tensor of the shape {list(current[0])} has no dimension {dim}")
        first = current[0]
        if kind == "concatenate":
            if len({(len(size), size[:dim], size[dim + 1 :]) for size in current}) != 1:
                raise ValueError(
                    f"tensors of the shapes {', '.join(str(list(s)) for s in current)} do not fit together"
                )
            current = [(*first[:dim], sum(size[dim] for size in current), *first[dim + 1 :])]
        elif len(current) != 1:
            raise ValueError(f"{len(current)} tensors are given where one is expected")
        elif kind == "transpose":
            if numbers[1] >= len(first):
                raise ValueError(f"a tensor of the shape {list(first)} has no dimension {numbers[1]}")
            turned = list(first)
            turned[dim], turned[numbers[1]] = first[numbers[1]], first[dim]
            current = [tuple(turned)]
        elif kind == "chunk":
            if first[dim] % numbers[1]:
                raise ValueError(f"a tensor of the shape {list(first)} has no {numbers[1]} equal parts")
            current = [(*first[:dim], first[dim] // numbers[1], *first[dim + 1 :])]
        elif first[dim] % 2:
            raise ValueError(f"a tensor of the shape {list(first)} has no pairs")
    if len(current) != 1:
        raise ValueError(f"{len(current)} tensors are given where one is expected")
    return current[0]


def _of_one(kind: Kind, numbers: Sequence[int], tensor: torch.Tensor) -> torch.Tensor:
    dim = numbers[0]
    if kind == "transpose":
        return tensor.transpose(dim, numbers[1]).contiguous()
    if kind == "chunk":
        return tensor.chunk(numbers[1], dim=dim)[numbers[2]].contiguous()
    pairs = (2, tensor.shape[dim] // 2) if numbers[1] else (tensor.shape[dim] // 2, 2)
    shape = (*tensor.shape[:dim], *pairs, *tensor.shape[dim + 1 :])
    return tensor.reshape(shape).transpose(dim, dim + 1).reshape(tensor.shape).contiguous()
