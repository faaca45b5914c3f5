"""A GPU's first passes, beside the CPU's: kernels are compiled for the GPU at hand, which may be a new one to them.

So the trunk is used only once it has said what the CPU says. The passes also compile the kernels in all shapes that
passes have, for which generations would otherwise wait, and record those of one token.
"""

import asyncio
import logging

import torch

from moehive.kernels.gpu.failures import why
from moehive.kernels.linear import FEW_TOKENS

from ...base import NoExperts, SequenceInput, Trunk

log = logging.getLogger(__name__)

# Tokens: a prompt, single ones, which are launched, recorded and replayed, and one pass for each size of step.
PASSES = (40, 1, 1, 1, *(1 << n for n in range(1, FEW_TOKENS.bit_length())))
# Of the logits' norm: the GPU rounds inputs of products to 8 bits in each of some dozens of layers. Something that is
# wrong is off by half and more.
TOLERANCE = 0.1


def disagreement(trunk: Trunk, cpu: Trunk) -> str | None:
    """Why `trunk` can't be trusted, in a sentence; None when its logits are those of `cpu`. Not on a running loop.

    Routed experts give nothing here, so that it does not matter which ones a near tie chooses.
    """
    try:
        mine, reference = (asyncio.run(_logits(one)) for one in (trunk, cpu))
    except Exception as error:  # of torch, Triton or the driver: their kinds are many
        log.debug("The trunk's first pass on the GPU failed", exc_info=error)
        return f"Its first pass on the GPU failed: {why(error)}."
    for number, (one, other) in enumerate(zip(mine, reference, strict=True)):
        distance = float((one - other).norm() / other.norm())
        if not distance <= TOLERANCE:
            return f"In pass {number + 1} of a trial the GPU's logits were {distance:.0%} away from the CPU's."
    return None


async def _logits(trunk: Trunk) -> list[torch.Tensor]:
    """Those of each pass's last token."""
    cache, logits = trunk.new_cache(), []
    generator = torch.Generator().manual_seed(0)
    for count in PASSES:
        tokens = torch.randint(trunk.vocab_size, (min(count, trunk.prefill_chunk),), generator=generator)
        logits += await trunk.forward([SequenceInput(tokens, cache)], NoExperts())
    trunk.free_cache(cache)
    return logits
