"""Compiles the trunk's kernels for NVIDIA GPUs on a machine that has none, as far as the driver's own assembler.

    python compile_kernels.py 80 90      # for these compute capabilities

Run without TRITON_INTERPRET. The launches are a trunk's, of real shapes; each is compiled, none is run.
"""

import sys
from typing import Any

import torch
import triton.backends.nvidia.compiler as nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moehive.kernels.blob import empty_blob
from moehive.kernels.delta_net import DeltaNetLayer
from moehive.kernels.geometry import tensor_bytes
from moehive.kernels.gpu.attention import GpuAttention
from moehive.kernels.gpu.batch import DeviceBatch, Rows
from moehive.kernels.gpu.delta_net import GpuDeltaNet
from moehive.kernels.gpu.latent import GpuLatentAttention
from moehive.kernels.gpu.linear import GpuLinears
from moehive.kernels.gpu.planes import BLOCK_COLUMNS
from moehive.kernels.gpu.rows import add_norm, gate, route
from moehive.kernels.linear import LinearWeights
from moehive.kernels.mla import MlaLayer
from moehive.kernels.trunk_ops import AttentionLayer, RouterLayer

CPU = torch.device("cpu")
compiled: set[str] = set()


class Driver:
    """Stands for a GPU of one kind."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def without_assembler() -> None:
    """Leaves out the last step, and the question which version of the assembler there is."""
    stages, begin, run = nvidia.CUDABackend.add_stages, nvidia.CUDABackend.__init__, JITFunction.run

    def add_stages(self: Any, found: Any, options: Any, language: Any) -> None:
        stages(self, found, options, language)
        del found["cubin"]

    def init(self: Any, target: Any) -> None:
        begin(self, target)
        self.binary_ext = "ptx"

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert b".visible .entry" in kernel.asm["ptx"]
        compiled.add(self.fn.__name__)

    nvidia.CUDABackend.add_stages, nvidia.CUDABackend.__init__ = add_stages, init
    nvidia.get_ptx_version_from_options = lambda options, arch: 84
    JITFunction.run = compile_only


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


def mixers() -> None:
    for dtype in (torch.float32, torch.bfloat16):
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
        mla = MlaLayer(
            heads=64, nope=128, rope=64, rank=512, value=128, scale=0.1, up=torch.zeros(64 * 256, 512, dtype=dtype),
            norm=torch.zeros(512), norm_eps=1e-6, page_at=0, dtype=dtype, interleaved=True,
        )  # fmt: skip
        GpuLatentAttention(mla, 0, CPU)(torch.zeros(2, 64 * 192), torch.zeros(2, 576), batch(2, False, 32))
    net = DeltaNetLayer(
        key_heads=16, value_heads=32, key_dim=128, value_dim=128, grouped=False, conv=torch.zeros(4, 8192),
        decay=torch.zeros(32), dt_bias=torch.zeros(32), norm=torch.zeros(128), norm_eps=1e-6,
    )  # fmt: skip
    GpuDeltaNet(net, (0, 1), CPU)(torch.zeros(2, net.row), batch(2, False, 0))


def linears() -> None:
    for fmt in BLOCK_COLUMNS:
        weights = LinearWeights(fmt, 64, 256, empty_blob(tensor_bytes(fmt, 64, 256)).zero_(), torch.zeros(64))
        for tokens in (1, 2):
            GpuLinears([weights], CPU)(torch.zeros(tokens, 256))


if __name__ == "__main__":
    without_assembler()
    for capability in sys.argv[1:]:
        driver.set_active(Driver(int(capability)))
        single_rows()
        mixers()
        linears()
    print(" ".join(sorted(compiled)))
