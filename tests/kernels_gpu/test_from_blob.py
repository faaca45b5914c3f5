"""An expert's blob, in the CPU's layout, moved to the GPU, where it computes what the reference does."""

import numpy as np
import pytest
import torch

from moehive.kernels.blob import build_blob, decode_tensor, pack_blob, tensor_views
from moehive.kernels.formats.registry import FORMATS
from moehive.kernels.geometry import ExpertSpec
from moehive.kernels.gpu.decode import DecodeLayer
from moehive.kernels.gpu.experts import GpuExperts
from moehive.kernels.gpu.from_blob import expert_sources
from moehive.kernels.gpu.planes import BLOCK_COLUMNS, PlanesError
from moehive.kernels.ops import Reduction
from moehive.kernels.reference import expert_forward, intermediate, post_norm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FILE_BLOCKS = {"q4_k": (144, (0, 2)), "q6_k": (210, (208,))}  # bytes of a block, and where its f16 factors stand


def random_blob(spec: ExpertSpec, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tensors = {t.name: torch.randn(t.shape, generator=generator) / t.shape[-1] ** 0.5 for t in spec.tensors}
    if spec.format not in FILE_BLOCKS:
        return build_blob(spec, tensors)
    rng = np.random.default_rng(seed)
    block, factors = FILE_BLOCKS[spec.format]

    def rows(count, columns):  # the gguf package does not write these types
        data = rng.integers(0, 256, (count, columns // 256, block), dtype=np.uint8)
        for at in factors:
            scales = rng.uniform(0.0001, 0.001, data.shape[:2]).astype(np.float16)
            data[:, :, at : at + 2] = scales[:, :, None].view(np.uint8)
        return torch.from_numpy(data.reshape(count, -1))

    up = [rows(spec.intermediate_size, spec.hidden_size) for _ in range(2 if spec.gated else 1)]
    down = [rows(spec.hidden_size, spec.intermediate_size)]
    floats = {name: tensors[name] for name in tensors if name not in ("up", "down")}
    return pack_blob(spec, {"up": up, "down": down}, floats)


@pytest.mark.parametrize("fmt", BLOCK_COLUMNS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_blob_on_the_gpu(fmt, tokens):
    sizes = (256, 256) if fmt in FILE_BLOCKS else (128, 128)
    spec = ExpertSpec(
        hidden_size=sizes[0], intermediate_size=sizes[1], activation="silu", format=fmt, bias=tokens == 1,
        post_norm_eps=1e-5 if tokens == 5 else None,
    )  # fmt: skip
    gpu = GpuExperts(DEVICE)
    blobs = {number: random_blob(spec, number) for number in range(2)}
    held = {number: gpu.load_blob(spec, blob) for number, blob in blobs.items()}
    x = torch.randn(tokens, sizes[0], generator=torch.Generator().manual_seed(1))
    experts = (np.arange(2 * tokens) % 2).astype(np.uint32)
    offsets = np.arange(0, 2 * tokens + 1, 2, dtype=np.uint32)
    factors = np.ones(2 * tokens, dtype=np.float32)
    rows = gpu.moe_layer(spec, held, x, offsets, experts, factors, Reduction.PER_EXPERT).cpu()
    for pair, number in enumerate(experts.tolist()):
        views = tensor_views(spec, blobs[number])
        plain = {t.name: decode_tensor(t, views[t.name]) for t in spec.tensors}
        token = x[pair // 2 : pair // 2 + 1]
        middle = intermediate(spec, torch.nn.functional.linear(token, plain["up"], plain.get("up_bias")))
        wanted = torch.nn.functional.linear(middle, plain["down"], plain.get("down_bias"))
        wanted = post_norm(spec, plain, wanted)[0]
        torch.testing.assert_close(wanted, expert_forward(spec, views, token, rounded=False)[0], rtol=1e-4, atol=1e-4)
        # Several tokens go to the tensor cores in bf16, which the interpreter cuts: 2^-7 of each factor, twice.
        bound = 4 * 2.0**-7 if tokens > 1 and fmt != "f32" else 1e-4
        assert (rows[pair] - wanted).abs().max() <= bound * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("fmt", BLOCK_COLUMNS)
def test_the_recorded_layer_in_each_format(fmt):
    size = max(32, BLOCK_COLUMNS[fmt])
    spec = ExpertSpec(hidden_size=size, intermediate_size=size, activation="relu2", gated=False, format=fmt)
    gpu = GpuExperts(DEVICE)
    held = {number: gpu.load_blob(spec, random_blob(spec, number)) for number in range(2)}
    hidden = torch.randn(1, size, generator=torch.Generator().manual_seed(0))
    experts, factors = np.array([1, 0], dtype=np.uint32), np.array([0.3, 0.7], dtype=np.float32)
    got = DecodeLayer(gpu, spec, 2)(held, hidden, experts, factors, Reduction.PARTIAL_SUM).cpu()
    offsets = np.array([0, 2], dtype=np.uint32)
    wanted = gpu.moe_layer(spec, held, hidden, offsets, experts, factors, Reduction.PARTIAL_SUM).cpu()
    assert got.abs().max() > 0 and torch.equal(got, wanted)


@pytest.mark.parametrize("fmt", ["int4_g32", "int4_g128", "mxfp4", "fp8_block"])
@pytest.mark.parametrize("shape", [(16, 128), (37, 200), (200, 300)])
def test_formats_unpack_what_they_packed(fmt, shape):
    from moehive.kernels.geometry import tensor_bytes

    known = FORMATS[fmt]
    stored = torch.zeros(tensor_bytes(fmt, *shape), dtype=torch.uint8)
    known.encode(torch.randn(shape, generator=torch.Generator().manual_seed(2)), stored)
    again = torch.zeros_like(stored)
    known.pack(known.unpack(stored, shape), again)
    assert torch.equal(again, stored)


def test_what_a_gpu_does_not_compute():
    spec = ExpertSpec(hidden_size=128, intermediate_size=64, activation="silu", format="fp8_block")
    with pytest.raises(PlanesError, match="multiple of 128"):
        expert_sources(spec, random_blob(spec, 0))
    spec = ExpertSpec(hidden_size=128, intermediate_size=64, activation="silu", format="q5_0")
    with pytest.raises(PlanesError, match="q5_0"):
        GpuExperts(DEVICE).load_blob(spec, random_blob(spec, 0))
