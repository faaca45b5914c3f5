"""Compiles the kernels for GPUs on a machine that has none, as far as assembly.

    python compile_kernels.py 80                        # compute capability 8.0; half a minute
    python compile_kernels.py --every 80 90 gfx942      # and AMD's CDNA 3, all formats in all tiles; five minutes
    python compile_kernels.py --anchored gfx942         # those that follow addresses alone

Run without TRITON_INTERPRET. The launches are a trunk's and a node's, of real shapes; each is compiled, none is run.
Prints the kernels that were compiled for all of them.
"""

import re
import sys
from collections import defaultdict
from typing import Any, get_args

import torch
import triton.backends.nvidia.compiler as nvidia
from triton.backends.amd.compiler import HIPBackend
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moehive.kernels.blob import empty_blob
from moehive.kernels.delta_net import DeltaNetLayer
from moehive.kernels.geometry import Activation, ExpertSpec, Format, tensor_bytes
from moehive.kernels.gpu.attention import GpuAttention
from moehive.kernels.gpu.batch import DeviceBatch, Rows
from moehive.kernels.gpu.delta_net import GpuDeltaNet
from moehive.kernels.gpu.experts import GpuExperts
from moehive.kernels.gpu.latent import GpuLatentAttention
from moehive.kernels.gpu.linear import GpuLinears
from moehive.kernels.gpu.planes import BLOCK_COLUMNS
from moehive.kernels.gpu.rows import add_norm, gate, route
from moehive.kernels.linear import LinearWeights
from moehive.kernels.mla import MlaLayer
from moehive.kernels.trunk_ops import AttentionLayer, RouterLayer

CPU = torch.device("cpu")
WAVES = {
    "gfx942": 64,
    "gfx1100": 32,
}  # threads of a wave: CDNA 3, RDNA 3
TILES = (1, 16, 64)
# Bytes of shared memory that a program may have: of compute capabilities 8.6, 8.9 and 12.0; AMD's of a compute unit.
NVIDIA_SHARED, AMD_SHARED = 101_376, 65_536
NARROW_LOADS = 12  # of one or two bytes, in a kernel that multiplies weights: for what they share
compiled: dict[str, set[str]] = defaultdict(set)  # the kernels, by architecture


class Driver:
    """Stands for a GPU of one kind."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._target = GPUTarget("cuda", int(name), 32) if name.isdecimal() else GPUTarget("hip", name, WAVES[name])

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return self.name  # kernels are kept by device

    def get_current_stream(self, device: str) -> int:
        return 0


def up_to_assembly() -> None:
    """Leaves out what makes machine code of it, and the question which version of NVIDIA's assembler there is."""
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        on_nvidia = driver.active.name.isdecimal()
        assert b".visible .entry" in kernel.asm["ptx"] if on_nvidia else b".amdhsa_kernel" in kernel.asm["amdgcn"]
        assert kernel.metadata.shared <= (NVIDIA_SHARED if on_nvidia else AMD_SHARED), (self.fn.__name__, kwargs)
        if on_nvidia and "FMT" in kwargs:
            assert len(re.findall(rb"ld\.global\.b(?:8|16)\b", kernel.asm["ptx"])) <= NARROW_LOADS, kwargs
        # What is addressed from a small tensor may lie anywhere: 32 bits are too few for the difference.
        for anchor in re.findall(r"%(?:arena|base): [^%]*", re.search(r"tt\.func public .*", kernel.asm["ttir"])[0]):
            assert "pointer_range" not in anchor, self.fn.__name__
        compiled[driver.active.name].add(self.fn.__name__)

    for backend, machine_code, assembly in ((CUDABackend, "cubin", "ptx"), (HIPBackend, "hsaco", "amdgcn")):
        leave_out(backend, machine_code, assembly)
    nvidia.get_ptx_version_from_options = lambda options, arch: 84 if arch < 100 else 87
    JITFunction.run = compile_only


def leave_out(backend: Any, last: str, before: str) -> None:
    """Ends a backend's stages one before the last."""
    stages, begin = backend.add_stages, backend.__init__

    def add_stages(self: Any, found: Any, options: Any, language: Any) -> None:
        stages(self, found, options, language)
        del found[last]

    def init(self: Any, target: Any) -> None:
        begin(self, target)
        self.binary_ext = before

    backend.add_stages, backend.__init__ = add_stages, init


def batch(tokens: int, whole: bool, angles: int) -> DeviceBatch:
    """Tokens of one sequence."""
    zeros = torch.zeros(tokens, dtype=torch.int64)
    return DeviceBatch(
        base=torch.zeros(128, dtype=torch.uint8),
        sequences=zeros,
        positions=zeros,
        firsts=zeros[:1],
        counts=zeros[:1],
        tables=[torch.zeros(1, 64, dtype=torch.int64)],
        states=torch.zeros(1, 2, dtype=torch.int64),
        cos=torch.zeros(tokens, angles),
        sin=torch.zeros(tokens, angles),
        whole=[Rows(0, tokens, 0)] if whole else None,
    )


def single_rows() -> None:
    hidden, norm, share = torch.zeros(2, 2048), torch.zeros(2048), torch.zeros(2, 1)
    half = torch.zeros(2, 2048, dtype=torch.bfloat16)
    add_norm(hidden, norm, 1e-6, hidden, half, hidden, share[:, 0], half)
    add_norm(hidden, norm, 1e-6, hidden)
    gate(torch.zeros(2, 1024), "silu", torch.zeros(2, 512))
    ids, weights = torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8)
    softmax = RouterLayer(experts=512, top_k=8, scores="softmax", renormalize=True)
    grouped = RouterLayer(experts=256, top_k=8, scores="sigmoid", renormalize=True, groups=8, top_groups=4)
    chosen = RouterLayer(experts=128, top_k=4, scores="chosen_softmax", renormalize=True)
    route(softmax, None, torch.zeros(2, 512), ids, weights)
    route(grouped, torch.zeros(256), torch.zeros(2, 256), ids, weights)
    route(chosen, None, torch.zeros(2, 128), ids[:, :4].contiguous(), weights[:, :4].contiguous())


def mixers(*dtypes: torch.dtype) -> None:
    for dtype in dtypes:
        gated = AttentionLayer(
            heads=16, kv_heads=2, head_dim=256, rotary=64, scale=0.06, page_at=0, dtype=dtype, gated=True,
            query_norm=torch.zeros(256), key_norm=torch.zeros(256),
        )  # fmt: skip
        windowed = AttentionLayer(
            heads=64, kv_heads=8, head_dim=64, rotary=64, scale=0.1, page_at=0, dtype=dtype, window=128,
            sinks=torch.zeros(64),
        )  # fmt: skip
        for layer in (gated, windowed):
            attention = GpuAttention(layer, 0, CPU)
            attention(torch.zeros(2, layer.row), batch(2, False, layer.rotary // 2))
        attention(torch.zeros(2, layer.row), batch(2, True, layer.rotary // 2))
        # DeepSeek's latents in f32 are more than most GPUs' shared memory; their checkpoints have none.
        rank = 512 if dtype == torch.bfloat16 else 256
        mla = MlaLayer(
            heads=64, nope=128, rope=64, rank=rank, value=128, scale=0.1, up=torch.zeros(64 * 256, rank, dtype=dtype),
            norm=torch.zeros(rank), norm_eps=1e-6, page_at=0, dtype=dtype, interleaved=True,
        )  # fmt: skip
        GpuLatentAttention(mla, 0, CPU)(torch.zeros(2, 64 * 192), torch.zeros(2, rank + 64), batch(2, False, 32))
    net = DeltaNetLayer(
        key_heads=16, value_heads=32, key_dim=128, value_dim=128, grouped=False, conv=torch.zeros(4, 8192),
        decay=torch.zeros(32), dt_bias=torch.zeros(32), norm=torch.zeros(128), norm_eps=1e-6,
    )  # fmt: skip
    GpuDeltaNet(net, (0, 1), CPU)(torch.zeros(2, net.row), batch(2, False, 0))


def linears(every: bool) -> None:
    for fmt in BLOCK_COLUMNS:
        weights = LinearWeights(fmt, 64, 256, empty_blob(tensor_bytes(fmt, 64, 256)).zero_(), torch.zeros(64))
        for tile in TILES if every else TILES[:2]:
            GpuLinears([weights], CPU)(torch.zeros(tile, 256))


def project(spec: ExpertSpec, tile: int) -> None:
    x, numbers = torch.zeros(tile, spec.hidden_size), torch.zeros(2, tile, dtype=torch.int64)
    tiles, weights = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(tile)
    GpuExperts(CPU).project(spec, x, tile, tiles, numbers, weights, torch.zeros(tile, spec.hidden_size))


def qwen3(fmt: Format) -> ExpertSpec:
    return ExpertSpec(hidden_size=2048, intermediate_size=768, activation="silu", format=fmt)


def experts(every: bool) -> None:
    """Both projections in each format, in tiles of each size if `every` kernel counts, else of one in turn."""
    for number, fmt in enumerate(get_args(Format)):
        if fmt in BLOCK_COLUMNS:
            for tile in TILES if every else (TILES[number % 3],):
                project(qwen3(fmt), tile)
    gpt_oss = ExpertSpec(
        hidden_size=2880, intermediate_size=2880, activation="silu", format="mxfp4", alpha=1.702, limit=7.0,
        up_offset=1.0, bias=True,
    )  # fmt: skip
    project(gpt_oss, 1)
    for activation in get_args(Activation):
        project(ExpertSpec(hidden_size=64, intermediate_size=64, activation=activation, gated=False), 1)
    GpuExperts(CPU).add_up(torch.zeros(2, 2048), torch.zeros(2, dtype=torch.int64), torch.zeros(1, 2048))


if __name__ == "__main__":
    up_to_assembly()
    every, anchored = "--every" in sys.argv, "--anchored" in sys.argv
    for name in sys.argv[1 + every + anchored :]:
        driver.set_active(Driver(name))
        if anchored:
            mixers(torch.bfloat16)
            project(qwen3("q4_0"), 1)
            continue
        single_rows()
        mixers(torch.float32, torch.bfloat16)
        linears(every)
        experts(every)
    print(" ".join(sorted(set.intersection(*compiled.values()))))
