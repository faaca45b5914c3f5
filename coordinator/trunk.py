"""Which trunk runs a checkpoint: a lean one where its config holds nothing unknown, else transformers' own model."""

import logging

from moehive.kernels.library import NativeLibraryError
from moehive.kernels.linear import LinearOps
from moehive.kernels.trunk_ops import TrunkOps

from .checkpoints.opening import ModelSource
from .models.base import Trunk
from .models.lean import families
from .models.lean.batch import Ops

log = logging.getLogger(__name__)


def load_trunk(checkpoint: ModelSource, threads: int) -> Trunk:
    """The trunk with its weights in memory; `threads`: cores for its native operations, at least 1.

    Raises CoordinatorError for tensors that are missing or do not fit.
    """
    config = checkpoint.config.get_text_config(decoder=True)
    reason = families.unknown(config)
    if reason is None:
        try:
            ops = Ops(LinearOps(threads), TrunkOps(threads))
        except NativeLibraryError as error:
            reason = str(error)
        else:
            log.info("The lean trunk runs %s", checkpoint.family)
            return families.build(config, checkpoint.trunk_tensors(), ops)
    log.info("Transformers' own model runs %s, slower than a lean trunk: %s", checkpoint.family, reason)
    from .models.generic import GenericTrunk  # here, as all that needs transformers' models: it takes seconds

    architecture = checkpoint.load_trunk()
    experts = tuple(layer.module for layer in architecture.experts)
    return GenericTrunk(architecture.model, experts, checkpoint.family, checkpoint.context_length)
