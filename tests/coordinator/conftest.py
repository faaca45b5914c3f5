"""Tiny random checkpoints, and experts computed in this process from their blobs."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from by_path import load

from moehive.coordinator.checkpoints.checkpoint import Checkpoint
from moehive.coordinator.models.generic import GenericTrunk
from moehive.coordinator.models.lean import families
from moehive.coordinator.models.lean.batch import Ops
from moehive.coordinator.models.lean.gpu.trunk import GpuTrunk
from moehive.kernels.blob import tensor_views
from moehive.kernels.geometry import ExpertId
from moehive.kernels.linear import LinearOps
from moehive.kernels.reference import expert_forward
from moehive.kernels.trunk_ops import TrunkOps

tiny = load(Path(__file__).with_name("families.py"))


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def families_module() -> ModuleType:
    """The module families.py, to make a tiny checkpoint with a config of one's own."""
    return tiny


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the directory of a family's tiny f32 checkpoint, made once a session; do not write to it."""
    made: dict[str, Path] = {}

    def checkpoint_of(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / family
            tiny.make_checkpoint(family, folder)
            made[family] = folder
        return made[family]

    return checkpoint_of


class ReferenceBackend:
    """`ExpertBackend` in this process: the kernels' plain reference on the checkpoint's blobs."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._experts: dict[ExpertId, dict[str, torch.Tensor]] = {}

    async def submit(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        await asyncio.sleep(0)  # other sequences run here, as they would while nodes work
        geometry = self.checkpoint.manifest.layers[layer]
        assert ids.shape == weights.shape == (hidden.shape[0], geometry.top_k)
        total = torch.zeros(hidden.shape)
        for expert in ids.unique().tolist():
            if expert >= geometry.experts:
                continue
            token, choice = torch.where(ids == expert)
            y = expert_forward(geometry.spec, self._tensors(ExpertId(layer, expert)), hidden[token])
            total.index_add_(0, token, y * weights[token, choice, None].float())
        return total.to(hidden.dtype)

    def _tensors(self, expert: ExpertId) -> dict[str, torch.Tensor]:
        if expert not in self._experts:
            spec = self.checkpoint.manifest.layers[expert.layer].spec
            self._experts[expert] = tensor_views(spec, self.checkpoint.expert_blob(expert))
        return self._experts[expert]


@pytest.fixture(scope="session")
def reference_backend() -> type[ReferenceBackend]:
    """The class of a backend in this process: `reference_backend(checkpoint)`."""
    return ReferenceBackend


@pytest.fixture(scope="session")
def gpu_trunk() -> Callable[[Checkpoint], GpuTrunk]:
    """Loads a checkpoint's trunk on the GPU, or in Triton's interpreter."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def load(checkpoint: Checkpoint) -> GpuTrunk:
        ops = Ops(LinearOps(1), TrunkOps(1))
        config = checkpoint.config.get_text_config(decoder=True)
        return GpuTrunk(families.read(config, checkpoint.trunk_tensors(), ops), ops, device)

    return load


@pytest.fixture(scope="session")
def make_trunk() -> Callable[[Checkpoint], GenericTrunk]:
    """Loads a checkpoint's trunk."""

    def load(checkpoint: Checkpoint) -> GenericTrunk:
        architecture = checkpoint.load_trunk()
        experts = tuple(layer.module for layer in architecture.experts)
        return GenericTrunk(architecture.model, experts, checkpoint.family, checkpoint.context_length)

    return load
