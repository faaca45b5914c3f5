"""Tiny models to convert: safetensors of transformers' own writing, and GGUFs as llama.cpp's converter makes them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from by_path import load

from moehive.coordinator.checkpoints.opening import ModelSource
from moehive.kernels.geometry import ExpertId

gguf_writer = load(Path(__file__).parents[1] / "coordinator" / "gguf_writer.py")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def safetensors_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE in bf16, as save_pretrained writes it, with a tokenizer's file beside; do not write to it."""
    folder = tmp_path_factory.mktemp("safetensors") / "tiny"
    _tiny(experts=6).to(torch.bfloat16).save_pretrained(folder, max_shard_size="300KB")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture(scope="session")
def gguf_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a GGUF in q4_0; do not write to it."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model = _tiny(experts=6)
    gguf_writer.write(model, model.config, path, "Q4_0")
    return path


@pytest.fixture(scope="session")
def many_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF of 192 experts; do not write to it."""
    path = tmp_path_factory.mktemp("many") / "many.gguf"
    model = _tiny(experts=64)
    gguf_writer.write(model, model.config, path, "Q8_0")
    return path


def _tiny(experts: int) -> Any:
    config = transformers.Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, moe_intermediate_size=96, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=experts, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="session")
def blobs() -> Callable[[ModelSource], dict[ExpertId, bytes]]:
    """Every expert's bytes as a node would get them."""

    def read(source: ModelSource) -> dict[ExpertId, bytes]:
        experts = [ExpertId(n, e) for n, layer in enumerate(source.manifest.layers) for e in range(layer.experts)]
        return {expert: source.expert_blob(expert).numpy().tobytes() for expert in experts}

    return read


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Mixtral in bf16 that reads text, a token for each byte; do not write to it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("chat") / "small"
    config = MixtralConfig(
        vocab_size=256, hidden_size=256, intermediate_size=128, num_hidden_layers=2, num_local_experts=3,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    torch.manual_seed(6)
    model: Any = MixtralForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder
