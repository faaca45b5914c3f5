"""Quantized checkpoints over real node processes: transformers' greedy text of what they mean."""

import asyncio
import itertools
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from by_path import load
from safetensors.torch import load_file

from moehive.coordinator.checkpoints.opening import open_model
from moehive.coordinator.checkpoints.pack.convert import Chosen, convert
from moehive.coordinator.precision.encode import encode
from moehive.kernels.blob import decode_tensor, tensor_views
from moehive.kernels.geometry import ExpertId

TOLERANCE = 0.1  # nats: activations are rounded to 8 bits or bf16 on the way


CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
quantizers, reading, types = (
    load(CHECKPOINTS / f"{name}.py") for name in ("quantizers", "reading", "test_gguf_types")
)


def check(model: Any, source: Path, cluster: Any, ask: Callable[..., Any]) -> None:
    """Each token is the model's first choice after those before it, or nearly a tie with it, and as likely."""

    async def run() -> Any:
        async with cluster.coordinator(source, nodes=2) as coordinator:
            return await ask(
                coordinator,
                lambda client: client.generate(
                    token_ids=reading.PROMPT, max_tokens=reading.STEPS, temperature=0, logprobs=1
                ),
            )

    answer = asyncio.run(run())
    assert len(answer.token_ids) == reading.STEPS
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*reading.PROMPT, *answer.token_ids[:-1]]])).logits[0]
    said = logits[-reading.STEPS :].log_softmax(-1)
    chosen = said.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
    assert answer.logprobs == pytest.approx(chosen.tolist(), abs=TOLERANCE)
    assert (said.amax(1) - chosen < TOLERANCE).all()


@pytest.mark.parametrize("method", ["fp8", "int4, groups of 32"])
def test_safetensors(
    method: str, cluster: Any, families: ModuleType, ask: Callable[..., Any], tmp_path: Path
) -> None:
    quantizers.make_wide(families, "qwen3_moe", tmp_path / "wide")
    means = quantizers.write(quantizers.METHODS[method], tmp_path / "wide", tmp_path / "quantized")
    model = quantizers.reference(means, tmp_path / "wide", tmp_path / "reference")
    check(model, tmp_path / "quantized", cluster, ask)


def test_a_split_gguf_of_mixed_types(cluster: Any, ask: Callable[..., Any], tmp_path: Path) -> None:
    kinds = iter(["Q4_K", "Q6_K", "IQ4_XS", "MXFP4", "Q5_K", "Q3_K", "Q2_K"] * 8)
    chosen: dict[str, str] = {}

    def kind(name: str) -> str:
        return chosen.setdefault(name.replace("_up_exps", "_gate_exps"), next(kinds))

    model, _ = types.make(kind, tmp_path / "x.gguf", split=9)
    check(model, min(tmp_path.glob("x-*.gguf")), cluster, ask)


def test_a_split_file_of_llama_cpp(cluster: Any, ask: Callable[..., Any], tmp_path: Path) -> None:
    """Of its quantizer and its splitter; the next token is its own."""
    archive = Path(__file__).parents[1] / "checkpoints" / "llama_cpp" / "mixtral.tar.xz"
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    said = np.load(tmp_path / "logits.npz")
    prompt, expected = said["tokens 0"].tolist(), torch.from_numpy(said["Q4_K_M 0"][-1]).log_softmax(0)
    part = min(tmp_path.glob("split-Q4_K_M-*.gguf"))

    async def run() -> Any:
        async with cluster.coordinator(part, nodes=2) as coordinator:
            return await ask(
                coordinator,
                lambda client: client.generate(token_ids=prompt, max_tokens=1, temperature=0, logprobs=1),
            )

    answer = asyncio.run(run())
    assert answer.token_ids[0] == int(expected.argmax())
    assert answer.logprobs[0] == pytest.approx(float(expected.max()), abs=TOLERANCE)


def test_a_pack_whose_experts_differ_in_their_formats(
    cluster: Any, families: ModuleType, ask: Callable[..., Any], tmp_path: Path
) -> None:
    wide, pack = tmp_path / "wide", tmp_path / "pack"
    quantizers.make_wide(families, "qwen3_moe", wide)
    source = open_model(str(wide))
    pairs = itertools.cycle([("q4_k", "q8_0"), ("bf16", "bf16"), ("q8_0", "q6_k"), ("q5_k", "q5_k")])
    layers = tuple(
        replace(layer, formats=tuple(next(pairs) for _ in range(layer.experts))) for layer in source.manifest.layers
    )
    means = {name: tensor.float() for name, tensor in load_file(wide / "model.safetensors").items()}

    def encoded(expert: ExpertId, blob: torch.Tensor) -> torch.Tensor:
        old, new = (of[expert.layer].spec_of(expert.expert) for of in (source.manifest.layers, layers))
        return encode(old, blob, new, None)

    convert(source, pack, Chosen(layers, encoded), workers=1)
    made = open_model(str(pack))
    for layer, geometry in enumerate(layers):
        for number in range(geometry.experts):
            spec = geometry.spec_of(number)
            views = tensor_views(spec, made.expert_blob(ExpertId(layer, number)))
            up, down = (decode_tensor(place, views[place.name]) for place in spec.tensors)
            for part, tensor in zip(("gate", "up", "down"), (*up.chunk(2), down), strict=True):
                name = f"model.layers.{layer}.mlp.experts.{number}.{part}_proj.weight"
                assert name in means
                means[name] = tensor.contiguous()
    check(quantizers.reference(means, wide, tmp_path / "reference"), pack, cluster, ask)
