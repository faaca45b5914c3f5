"""Random experts whose numbers have the size that trained ones have."""

from collections.abc import Callable, Iterator

import pytest
import torch

from moehive.kernels.blob import build_blob
from moehive.kernels.geometry import ExpertSpec
from moehive.kernels.ops import ExpertWeights, load_expert

MakeExpert = Callable[[ExpertSpec, int], ExpertWeights]


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_expert() -> MakeExpert:
    """(spec, seed) → an expert with weights of variance 1 / columns, so that each layer keeps its input's size."""

    def make(spec: ExpertSpec, seed: int) -> ExpertWeights:
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for place in spec.tensors:
            numbers = torch.randn(place.shape, generator=generator)
            if len(place.shape) == 2:
                numbers /= place.shape[1] ** 0.5
            tensors[place.name] = numbers
        return load_expert(spec, build_blob(spec, tensors))

    return make
