"""Files that llama.cpp's own converter, quantizer and splitter wrote (llama_cpp/make.py): the gguf package's numbers,
and the tokens and logits of llama.cpp itself.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest
import torch
from by_path import load

from moehive.coordinator.checkpoints.gguf.checkpoint import GgufCheckpoint
from moehive.coordinator.checkpoints.opening import ModelSource, open_model, trunk_of
from moehive.coordinator.checkpoints.pack.convert import convert
from moehive.coordinator.models.lean.trunk import LeanTrunk
from moehive.coordinator.trunk import load_trunk
from moehive.kernels.geometry import ExpertId

HERE = Path(__file__).with_name("llama_cpp")
make, archives = load(HERE / "make.py"), load(HERE / "archives.py")
CASES = [(family, kind) for family, kinds in make.OF_FAMILY.items() for kind in ("F32", *kinds)]
EXPANDED = ("IQ3_XXS", "dynamic")  # experts of types that no kernel has, or gate and up of two types
# Matrices whose rows and columns are where transformers has them.
TRUNK = {
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in ("v", "q_a", "q_b")},
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    **{
        f"mlp.shared_expert{s}.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down") for s in ("", "s")
    },
    "self_attn.o_proj": "attn_output",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
}
Files = Callable[[str], Path]

# llama.cpp rounds what a matrix is multiplied with to 8 bits in blocks of 256 or 32 columns, Moehive in blocks of 32,
# and keeps hidden states in bf16. Largest number by 127 by the root of 12: some 0.7 % of what a matrix gives for one
# and 0.5 % for the other. Nine matrices follow each other, so logits of deviation 2 differ by some 0.05 (measured:
# 0.03 for types of 32 columns, 0.07 for those of 256), and half the square of that is 0.0013 nats (0.0001 to 0.0020).
# DeepSeek-V3's queries, keys and values go through four more, with which llama.cpp multiplies what it rounded: up to
# 0.0063 nats. A wrong scale, row or type costs 0.1 and more.
DIVERGENCE, DIVERGENCE_LATENT = 4e-3, 1e-2
STEPS = 6  # tokens that are decoded
SURE = 0.5  # nats between the two likeliest tokens, five deviations of the difference of two logits


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Gives the folder with a family's files; do not write to it."""
    found: dict[str, Path] = {}

    def unpack(family: str) -> Path:
        if family not in found:
            found[family] = archives.unpack(family, tmp_path_factory.mktemp(family))
        return found[family]

    return unpack


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_tokens_and_logits_are_llama_cpps(family: str, kind: str, files: Files, reading: ModuleType) -> None:
    checkpoint = open_model(str(files(family) / f"{kind}.gguf"))
    assert isinstance(checkpoint, GgufCheckpoint) and checkpoint.family == family
    assert checkpoint.computed_as_stored == (kind not in EXPANDED)
    if family == "gpt_oss" and kind == "F32":
        # llama.cpp rounds the bounds between which yarn turns rope; the publisher and transformers do not.
        checkpoint.config.rope_parameters["truncate"] = True
    said = np.load(files(family) / "logits.npz")
    tokenizer, _ = checkpoint.tokenizer()
    for number, text in enumerate(said["texts"].tolist()):
        tokens = said[f"tokens {number}"].tolist()
        assert tokenizer(text)["input_ids"] == tokens
        theirs = torch.from_numpy(said[f"{kind} {number}"]).float()
        ours, continued = reading.passes(checkpoint, tokens, 0 if number else STEPS)
        if kind == "F32":
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
            torch.testing.assert_close(continued, theirs[len(theirs) - len(continued) :], atol=1e-3, rtol=0)
            continue
        ours, continued, theirs = (rows.log_softmax(-1) for rows in (ours, continued, theirs))
        bound = DIVERGENCE_LATENT if family == "deepseek_v3" else DIVERGENCE
        assert (theirs.exp() * (theirs - ours)).sum(-1).mean() < bound
        top = theirs.topk(2, -1).values
        sure = (top[:, 0] - top[:, 1]) > SURE
        assert sure.sum() > len(sure) // 2
        assert torch.equal(ours.argmax(-1)[sure], theirs.argmax(-1)[sure])
        if not number:  # as a greedy text is made: the token after each of the last ones, which come one by one
            theirs, sure = theirs[-STEPS:], sure[-STEPS:]
            assert sure.any() and (theirs.exp() * (theirs - continued)).sum(-1).mean() < 2 * bound  # of a few tokens
            assert torch.equal(continued.argmax(-1)[sure], theirs.argmax(-1)[sure])


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_numbers_are_the_gguf_packages(family: str, kind: str, files: Files, reading: ModuleType) -> None:
    path = files(family) / f"{kind}.gguf"
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def meant(format: str, *names: str) -> torch.Tensor:
        """The tensors of these names side by side, as they are computed in `format`."""
        found = [stored[f"blk.{name}"] for name in names]
        kept = {tensor.tensor_type.name.lower() for tensor in found} == {format}
        assert kept or (kind in EXPANDED and format == "bf16")
        numbers = [gguf.dequantize(t.data, t.tensor_type).reshape(*t.shape[::-1]) for t in found]
        joined = torch.from_numpy(np.concatenate(numbers, -2 if numbers[0].ndim > 2 else -1))
        return joined if kept else joined.bfloat16().float()

    checkpoint = open_model(str(path))
    dense = checkpoint.config.num_hidden_layers - len(checkpoint.manifest.layers)
    for layer, geometry in enumerate(checkpoint.manifest.layers):
        block, spec = layer + dense, geometry.spec
        gate, up = f"{block}.ffn_gate_exps", f"{block}.ffn_up_exps"
        wanted = {
            "up": meant(spec.format, f"{gate}.weight", f"{up}.weight"),
            "down": meant(spec.back_format, f"{block}.ffn_down_exps.weight"),
        }
        if spec.bias:
            wanted["up_bias"] = meant("f32", f"{gate}.bias", f"{up}.bias")
            wanted["down_bias"] = meant("f32", f"{block}.ffn_down_exps.bias")
        for expert in range(geometry.experts):
            found = reading.decoded(checkpoint, ExpertId(layer, expert))
            assert found.keys() == wanted.keys()
            for name, numbers in wanted.items():
                torch.testing.assert_close(found[name], numbers[expert], rtol=1e-6, atol=1e-7)
    trunk, compared = trunk_of(checkpoint).trunk_tensors(), 0
    for block in range(checkpoint.config.num_hidden_layers):
        for ours, theirs in TRUNK.items():
            name = f"model.layers.{block}.{ours}.weight"
            if name in trunk and f"blk.{block}.{theirs}.weight" in stored:
                matrix = trunk.linear(name)
                numbers = meant(matrix.format, f"{block}.{theirs}.weight")
                torch.testing.assert_close(matrix.matrix, numbers, rtol=1e-6, atol=1e-7)
                compared += 1
    assert compared > 3


@pytest.mark.parametrize("kind", list(make.SPLITS))
def test_a_split_file_is_the_whole_one(kind: str, files: Files, reading: ModuleType) -> None:
    parts = sorted(files("mixtral").glob(f"split-{kind}-*-of-*.gguf"))
    assert len(parts) > 2
    whole, tokens = open_model(str(files("mixtral") / f"{kind}.gguf")), list(range(20, 40))
    assert isinstance(load_trunk(whole, 1), LeanTrunk)
    wanted = reading.logits(whole, tokens)
    for part in parts[:2]:
        split = open_model(str(part))
        assert [layer.spec for layer in split.manifest.layers] == [layer.spec for layer in whole.manifest.layers]
        assert torch.equal(reading.logits(split, tokens), wanted)


@pytest.mark.parametrize("kind", ["Q4_K_M", "MXFP4_MOE", "dynamic"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_pack_says_the_same(kind: str, copied: bool, files: Files, reading: ModuleType, tmp_path: Path) -> None:
    source: ModelSource = open_model(str(files("qwen3_moe") / f"{kind}.gguf"))
    if kind == "Q4_K_M":  # more bits where llama-quantize gives them
        assert [layer.spec.back_format for layer in source.manifest.layers] == ["q4_k", "q6_k"]
    convert(source, tmp_path / "pack", "keep" if copied else None, workers=1)
    pack = open_model(str(tmp_path / "pack"))
    tokens = list(range(20, 40))
    assert torch.equal(reading.logits(pack, tokens), reading.logits(source, tokens))
