"""Which trunk runs a checkpoint: a lean one where its config holds nothing unknown, else transformers' own model."""

import errno
import logging
from typing import Any

import torch

from moehive.kernels.geometry import GeometryError
from moehive.kernels.gpu.failures import why
from moehive.kernels.library import NativeLibraryError
from moehive.kernels.linear import LinearOps
from moehive.kernels.trunk_ops import TrunkOps

from .checkpoints.opening import ModelSource
from .models.base import Trunk
from .models.lean import families
from .models.lean.batch import Ops
from .models.lean.gpu.choice import NoGpu, cache_room
from .models.lean.gpu.trial import disagreement
from .models.lean.parts import Parts
from .models.lean.trunk import LeanTrunk
from .types import CoordinatorError

log = logging.getLogger(__name__)


def load_trunk(checkpoint: ModelSource, threads: int, device: str = "cpu", kv_bytes: int = 0) -> Trunk:
    """The trunk with its weights in memory; `threads`: cores for its native operations, at least 1.

    `device`: cpu, cuda, or auto, which is a GPU where there is one that has room for a lean trunk and for `kv_bytes`
    of caches, or fewer (see `Trunk.cache_room`). Raises CoordinatorError for tensors that are missing or do not fit,
    for too little memory, and for a GPU that is asked for and can't be used.
    """
    try:
        return _load(checkpoint, threads, device, kv_bytes)
    except (MemoryError, OSError, RuntimeError) as error:
        if not _is_shortage(error):
            raise
        raise CoordinatorError(
            f"This machine has too little memory left for the trunk of {checkpoint.path}; end other programs, use a "
            "machine with more as the coordinator, or make the model smaller with moehive convert --budget."
        ) from error


def _load(checkpoint: ModelSource, threads: int, device: str, kv_bytes: int) -> Trunk:
    config = checkpoint.config.get_text_config(decoder=True)
    reason = families.unknown(config)
    if reason is None:
        try:
            ops = Ops(LinearOps(threads), TrunkOps(threads))
        except NativeLibraryError as error:
            reason = str(error)
        else:
            return _lean(checkpoint, _read(checkpoint, config, ops), ops, device, kv_bytes)
    if device == "cuda":
        raise CoordinatorError(f"The trunk can't run on a GPU, as trunk_device says, without a lean trunk: {reason}.")
    log.info("Transformers' own model runs %s, slower than a lean trunk: %s", checkpoint.family, reason)
    from .models.generic import GenericTrunk  # here, as all that needs transformers' models: it takes seconds

    architecture = checkpoint.load_trunk()
    experts = tuple(layer.module for layer in architecture.experts)
    return GenericTrunk(architecture.model, experts, checkpoint.family, checkpoint.context_length)


def _read(checkpoint: ModelSource, config: Any, ops: Ops) -> Parts:
    """A lean trunk's parts, for a config that `families.unknown` says nothing of. Raises as `load_trunk` does."""
    try:
        return families.read(config, checkpoint.trunk_tensors(), ops)
    except GeometryError as error:
        raise CoordinatorError(f"{checkpoint.path}: {error}") from error
    except (TypeError, ValueError, ArithmeticError) as error:  # of a config's odd values
        raise CoordinatorError(
            f"{checkpoint.path} does not describe a {checkpoint.family} model: {_first_line(error)}."
        ) from error
    except RuntimeError as error:  # torch's, of sizes that do not fit or of a failure of its own
        if _is_shortage(error):
            raise
        raise CoordinatorError(f"The trunk of {checkpoint.path} can't be made: {_first_line(error)}.") from error


def _first_line(error: Exception) -> str:
    """What it says, for the end of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _is_shortage(error: Exception) -> bool:
    """Whether memory was asked for that is not there: of Python, of the system (mmap), or of torch."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return "DefaultCPUAllocator: can't allocate memory" in str(error)  # a plain RuntimeError


def _lean(checkpoint: ModelSource, parts: Parts, ops: Ops, device: str, kv_bytes: int) -> Trunk:
    try:
        trunk = None if device == "cpu" else _on_gpu(parts, ops, kv_bytes)
    except NoGpu as error:
        if device == "cuda":
            raise CoordinatorError(f"The trunk can't run on a GPU, as trunk_device says: {error}") from error
        log.info("The trunk runs on the CPU: %s", error)
        trunk = None
    if trunk is None:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # of a trunk that was tried there; others may use it
        log.info("The lean trunk runs %s", checkpoint.family)
        return LeanTrunk(parts, ops)
    log.info("The lean trunk runs %s on the GPU", checkpoint.family)
    return trunk


def _on_gpu(parts: Parts, ops: Ops, kv_bytes: int) -> Trunk:
    """Raises NoGpu."""
    if not torch.cuda.is_available():
        raise NoGpu("Torch finds no GPU here.")
    try:
        from .models.lean.gpu.trunk import GpuTrunk  # needs Triton, which comes with torch for a GPU
    except ImportError as error:
        raise NoGpu(f"Triton, which compiles the GPU's kernels, can't be imported: {error}.") from error
    try:
        device = torch.device("cuda", torch.cuda.current_device())
        trunk = GpuTrunk(parts, ops, device, cache_room(parts, kv_bytes, torch.cuda.mem_get_info(device)[0]))
    except NoGpu:
        raise
    except Exception as error:  # of torch or the driver: their kinds are many
        log.debug("The trunk can't be moved to the GPU", exc_info=error)
        raise NoGpu(f"Moving it to the GPU failed: {why(error)}.") from error
    if (complaint := disagreement(trunk, LeanTrunk(parts, ops))) is not None:
        raise NoGpu(complaint)
    return trunk
