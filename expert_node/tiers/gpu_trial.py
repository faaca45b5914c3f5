"""A kind of expert's first requests on a GPU, beside the CPU's: kernels are compiled for the GPU at hand.

So experts move there only once it has said what the CPU says. The requests also compile the kernels in all their
shapes, for which later ones would otherwise wait.
"""

import logging

import numpy as np
import torch

from moehive.kernels.gpu.decode import DecodeLayer
from moehive.kernels.gpu.experts import GpuExperts
from moehive.kernels.gpu.failures import why
from moehive.kernels.gpu.planes import PlanesError
from moehive.kernels.ops import ExpertOps, ExpertWeights, Reduction

log = logging.getLogger(__name__)

TOKENS = (1, 16, 40)  # of one expert, for each size of the kernels' tiles
ONE_TOKEN = 3  # calls: launched, recorded and replayed
# Of the results' norm: both round inputs of products to some 8 bits. Something that is wrong is off by half and more.
TOLERANCE = 0.1


def disagreement(gpu: GpuExperts, cpu: ExpertOps, weights: ExpertWeights) -> str | None:
    """Why a GPU can't compute experts like this one, in a sentence; None when it says what the CPU says.

    Raises PlanesError for a kind without a GPU kernel.
    """
    spec = weights.spec
    x = torch.randn(max(TOKENS), spec.hidden_size, generator=torch.Generator().manual_seed(0))
    experts, factors = np.zeros(len(x), dtype=np.uint32), np.ones(len(x), dtype=np.float32)
    try:
        held = {0: gpu.load_blob(spec, weights.blob)}
        mine = []
        for n in TOKENS:
            offsets = np.arange(n + 1, dtype=np.uint32)
            rows = gpu.moe_layer(spec, held, x[:n], offsets, experts[:n], factors[:n], Reduction.PER_EXPERT)
            mine.append(rows.cpu())
        if spec.post_norm_eps is None:
            decode = DecodeLayer(gpu, spec, 1)
            for _ in range(ONE_TOKEN):
                mine.append(decode(held, x[:1], experts[:1], factors[:1], Reduction.PER_EXPERT).cpu())
    except PlanesError:
        raise
    except Exception as error:  # of torch, Triton or the driver: their kinds are many
        log.debug("The first request on the GPU failed", exc_info=error)
        return f"Their first request on the GPU failed: {why(error)}."
    offsets = np.arange(len(x) + 1, dtype=np.uint32)
    expected = cpu.moe_layer(spec, {0: weights}, x, offsets, experts, factors, Reduction.PER_EXPERT)
    for one in mine:
        other = expected[: len(one)]
        distance = float((one - other).norm() / other.norm().clamp(min=1e-30))
        if not distance <= TOLERANCE:
            return f"In a trial of {len(one)} tokens the GPU's results were {distance:.0%} away from the CPU's."
    return None
