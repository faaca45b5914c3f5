"""The lean trunk on a GPU, beyond its logits: its segments can be recorded, quantized weights, the choice of it."""

import asyncio
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tape import TapeRecorder
from transformers import AutoConfig, AutoModelForCausalLM

from moehive.coordinator.bench.trunk_model import ModelTensors
from moehive.coordinator.checkpoints.checkpoint import Checkpoint
from moehive.coordinator.models.base import ExpertBackend, SequenceInput, Trunk
from moehive.coordinator.models.lean import families
from moehive.coordinator.models.lean.batch import Ops
from moehive.coordinator.models.lean.gpu.choice import LEAST_TOKENS, WORK_BYTES, NoGpu, cache_room, weight_bytes
from moehive.coordinator.models.lean.gpu.trial import disagreement
from moehive.coordinator.models.lean.gpu.trunk import GpuTrunk
from moehive.coordinator.models.lean.parts import Parts
from moehive.coordinator.models.lean.trunk import LeanTrunk
from moehive.coordinator.settings import CoordinatorSettings, SettingsError
from moehive.coordinator.trunk import load_trunk
from moehive.coordinator.types import CoordinatorError, NoRoom
from moehive.kernels.gpu.failures import why
from moehive.kernels.linear import LinearOps
from moehive.kernels.trunk_ops import TrunkOps

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FROM = 62  # tokens that are there when single ones begin, which soon need a new page


@pytest.mark.parametrize("family", ["gpt_oss", "glm4_moe", "qwen3_5_moe_text", "deepseek_v3"])
def test_a_replay_sees_new_tokens_and_pages(
    family: str,
    tiny_moe: Callable[[str], Path],
    gpu_trunk: Callable[[Checkpoint], GpuTrunk],
    reference_backend: Callable[[Checkpoint], ExpertBackend],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = Checkpoint.open(tiny_moe(family))
    experts = reference_backend(checkpoint)
    gpu, cpu = gpu_trunk(checkpoint), load_trunk(checkpoint, 1)
    recorder: Any = gpu._recorder
    if recorder is None:
        recorder = gpu._recorder = TapeRecorder(monkeypatch)  # type: ignore[assignment]
    tokens = torch.randint(3, 128, (FROM + 4,), generator=torch.Generator().manual_seed(1))
    passes = (tokens[:FROM], *tokens[FROM:].split(1))

    async def logits(trunk: Trunk) -> list[torch.Tensor]:
        cache = trunk.new_cache()
        return [(await trunk.forward([SequenceInput(some, cache)], experts))[0] for some in passes]

    for mine, his in zip(asyncio.run(logits(gpu)), asyncio.run(logits(cpu)), strict=True):
        assert (mine - his).abs().max() < 1e-4
    (step,) = gpu._free[1]
    assert len(step._graphs) == len(gpu._layers) + sum(layer.shares for layer, _ in gpu._layers)


def test_a_replay_runs_nothing_else(
    tiny_moe: Callable[[str], Path], gpu_trunk: Callable[[Checkpoint], GpuTrunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tape's own test: what it does not allow is seen."""
    recorder = TapeRecorder(monkeypatch)
    for call in (lambda: torch.ones(2).sum().item(), lambda: torch.ones(2).nonzero(), lambda: torch.tensor([1.0])):
        with pytest.raises(AssertionError):
            recorder.record(call)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def ops() -> Ops:
    return Ops(LinearOps(1), TrunkOps(1))


def quantized(families_module: ModuleType, family: str, fmt: str, ops: Ops, folder: Path) -> Parts:
    """A tiny model's parts, its matrices in a format."""
    families_module.make_checkpoint(family, folder, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return families.read(AutoConfig.from_pretrained(folder), ModelTensors(model, fmt), ops)


@pytest.mark.parametrize(
    ("family", "fmt"), [("qwen3_moe", "q8_0"), ("deepseek_v3", "q4_0"), ("mixtral", "fp8_block"), ("mixtral", "bf16")]
)
def test_quantized_trunks_say_what_the_cpu_s_say(
    families_module: ModuleType, family: str, fmt: str, ops: Ops, tmp_path: Path
) -> None:
    parts = quantized(families_module, family, fmt, ops, tmp_path)
    gpu = GpuTrunk(parts, ops, DEVICE)
    assert disagreement(gpu, LeanTrunk(parts, ops)) is None
    assert gpu._free.keys() == {1, 2, 4, 8, 16, 32}  # the trial compiled what passes of any size launch


def test_a_trunk_that_says_something_else_is_not_used(
    tiny_moe: Callable[[str], Path], gpu_trunk: Callable[[Checkpoint], GpuTrunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny_moe("mixtral"))
    gpu, cpu = gpu_trunk(checkpoint), load_trunk(checkpoint, 1)
    gpu._norm.neg_()
    complaint = disagreement(gpu, cpu)
    assert complaint is not None and "In pass 1 of a trial the GPU's logits were 200% away" in complaint
    monkeypatch.setattr(gpu, "_head", None)
    complaint = "Its first pass on the GPU failed: TypeError: 'NoneType' object is not callable."
    assert disagreement(gpu, cpu) == complaint


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate"), NoRoom, "The GPU's memory is full; end"),
        (
            torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might"),
            CoordinatorError,
            r"The GPU failed \(AcceleratorError: CUDA error: an illegal memory access was encountered\); restart",
        ),
    ],
)
def test_a_gpu_that_fails_later_ends_generations_with_a_sentence(
    tiny_moe: Callable[[str], Path],
    gpu_trunk: Callable[[Checkpoint], GpuTrunk],
    reference_backend: Callable[[Checkpoint], ExpertBackend],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: type[Exception],
    sentence: str,
) -> None:
    checkpoint = Checkpoint.open(tiny_moe("mixtral"))
    gpu = gpu_trunk(checkpoint)

    def wait(step: object) -> None:
        raise error

    monkeypatch.setattr("moehive.coordinator.models.lean.gpu.step.GpuStep.wait", wait)
    with pytest.raises(kind, match=sentence):
        asyncio.run(gpu.forward([SequenceInput(torch.tensor([3]), gpu.new_cache())], reference_backend(checkpoint)))


def test_what_failed_on_a_gpu_is_said_with_what_to_do() -> None:
    assert why(torch.OutOfMemoryError("CUDA out of memory.\nTried")) == "its memory is full"
    for error in (
        subprocess.CalledProcessError(1, ["gcc", "main.c"]),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
    ):
        assert "sudo apt install gcc python3-dev" in why(error)
    denied = PermissionError(13, "Permission denied", "/home/moehive/.triton")
    assert why(denied).startswith("Triton can't keep its kernels in /home/moehive/.triton (Permission denied)")
    assert why(RuntimeError()) == "RuntimeError"


def test_room_on_a_gpu(families_module: ModuleType, ops: Ops, tmp_path: Path) -> None:
    parts = quantized(families_module, "mixtral", "q8_0", ops, tmp_path)
    weights, cache = weight_bytes(parts), parts.cache.nbytes(1024, 1024)  # its whole context
    assert parts.context_length == 1024 < LEAST_TOKENS
    slab = parts.cache.slab_bytes  # in which the last page of the caches may be the only one in use
    assert (15 << 20) < slab <= (16 << 20)
    least = weights + WORK_BYTES + slab + cache
    assert cache_room(parts, 1 << 40, least) == cache
    assert cache_room(parts, 1 << 40, least + 5) == cache + 5
    assert cache_room(parts, 1 << 20, 1 << 40) == 1 << 20
    with pytest.raises(NoGpu, match=r"the GPU has 1\.6 GB free"):
        cache_room(parts, 1 << 40, least - 1)
    wider = tmp_path / "wider"
    q5 = quantized(families_module, "mixtral", "q5_0", ops, wider)
    with pytest.raises(NoGpu, match="no GPU kernel for weights in q5_0"):
        cache_room(q5, 1 << 20, 1 << 40)


def test_the_device_that_is_asked_for(tiny_moe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checkpoint = Checkpoint.open(tiny_moe("mixtral"))
    assert isinstance(load_trunk(checkpoint, 1, "auto", 1 << 30), LeanTrunk)
    with pytest.raises(CoordinatorError, match="can't run on a GPU, as trunk_device says: Torch finds no GPU here"):
        load_trunk(checkpoint, 1, "cuda", 1 << 30)
    with pytest.raises(CoordinatorError, match="without a lean trunk: there is none for the family dots1"):
        load_trunk(Checkpoint.open(tiny_moe("dots1")), 1, "cuda", 1 << 30)
    with pytest.raises(SettingsError, match="trunk_device must be auto, cpu or cuda"):
        CoordinatorSettings(model="m", trunk_device="tpu")
    with pytest.raises(SettingsError, match="trunk_device must be cpu with deterministic"):
        CoordinatorSettings(model="m", trunk_device="cuda", deterministic=True)


def test_a_gpu_that_fails_leaves_the_trunk_on_the_cpu(
    tiny_moe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    checkpoint = Checkpoint.open(tiny_moe("mixtral"))

    def check(sentence: str) -> None:
        assert isinstance(load_trunk(checkpoint, 1, "auto", 1 << 30), LeanTrunk)
        with pytest.raises(CoordinatorError, match=f"can't run on a GPU, as trunk_device says: {sentence}"):
            load_trunk(checkpoint, 1, "cuda", 1 << 30)

    def broken(*arguments: object) -> GpuTrunk:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("moehive.coordinator.models.lean.gpu.trunk.GpuTrunk", broken)
    check("Moving it to the GPU failed: RuntimeError: CUDA error: an illegal memory access was encountered.")
    # One that can be moved there, and has no pass that succeeds.
    monkeypatch.setattr("moehive.coordinator.models.lean.gpu.trunk.GpuTrunk", lambda *arguments: object())
    check("Its first pass on the GPU failed: AttributeError")
