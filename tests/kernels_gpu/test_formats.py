"""What is said to be computed by a GPU is laid out for one, and nothing else."""

from dataclasses import replace
from typing import get_args

import pytest
import torch

from moehive.kernels.geometry import ExpertSpec, Format, LayerGeometry
from moehive.kernels.gpu.experts import GpuExperts
from moehive.kernels.gpu.planes import PlanesError

SPEC = ExpertSpec(hidden_size=256, intermediate_size=32, activation="silu")


@pytest.mark.parametrize("fmt", get_args(Format))
@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("gated", [False, True])
def test_a_spec_knows_whether_a_gpu_computes_it(fmt: Format, size: int, gated: bool) -> None:
    spec = replace(SPEC, format=fmt, intermediate_size=size, gated=gated)
    try:
        GpuExperts(torch.device("cpu")).load_blob(spec, torch.zeros(spec.nbytes, dtype=torch.uint8))
        computed = True
    except PlanesError:
        computed = False
    assert spec.on_gpu is computed is LayerGeometry(2, 1, spec).on_gpu
    mixed = LayerGeometry(2, 1, spec, (("bf16", "bf16"), ("bf16", fmt)))
    assert mixed.on_gpu is replace(spec, format="bf16", down_format=fmt).on_gpu
