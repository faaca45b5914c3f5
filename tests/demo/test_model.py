"""The demo model is what docs/demo_model.md says: a plain Mixtral with the dense model's function."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from moehive.coordinator.demo import build as builder
from moehive.coordinator.demo import dense, package

TEXTS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    (
        "Explain why the sky is blue in two sentences.",
        "The sky is blue because of a process called Rayleigh scattering: molecules of air deflect blue light more "
        "than red light. So it reaches our eyes from all directions.",
    ),
    (
        "Write a Python function that adds two numbers.",
        "```python\ndef add(a, b):\n    return a + b\n```\nFor example, `add(2, 3)` returns 5.",
    ),
)


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="module")
def loaded(demo_model: Path) -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # Where a processor multiplies no bf16, f32 takes a third of the time.
    model, info = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    yield model.eval()
    torch.set_num_threads(threads)


def chat(tokenizer: Any, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    return ids


def test_config_and_shards(demo_model: Path) -> None:
    config = json.loads((demo_model / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (builder.EXPERTS, builder.TOP_K)
    index = json.loads((demo_model / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for shard in sorted(demo_model.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            found |= dict.fromkeys(file.keys(), shard.name)
    assert found == index
    experts = config["num_hidden_layers"] * builder.EXPERTS
    assert sum(".block_sparse_moe.experts." in name for name in found) == 3 * experts
    assert sum(path.stat().st_size for path in demo_model.iterdir()) < 1.1e9


def test_experts_are_the_same_neurons_in_other_orders(demo_model: Path) -> None:
    prefix = "model.layers.7.block_sparse_moe.experts."
    with safe_open(demo_model / "model-00002-of-00006.safetensors", "pt") as file:
        first, second = ({w: file.get_tensor(f"{prefix}{e}.{w}.weight") for w in ("w1", "w2", "w3")} for e in (0, 5))
    assert not torch.equal(first["w1"], second["w1"])
    for whole in (first, second):
        rows = torch.cat([whole["w1"], whole["w3"], whole["w2"].T], dim=1).float()  # one neuron a row
        whole["sorted"] = rows[rows[:, 0].argsort(stable=True)]
    # Equal first weights may lie in any order, so only neurons with a first weight of their own are compared.
    values, counts = first["sorted"][:, 0].unique(return_counts=True)
    alone = torch.isin(first["sorted"][:, 0], values[counts == 1])
    assert alone.sum() > 100
    assert torch.equal(first["sorted"][alone], second["sorted"][alone])


def test_says_what_the_dense_model_says(tmp_path: Path, tokenizer: Any, loaded: Any) -> None:
    path = package.find(tmp_path)
    assert path is not None
    reference = dense.dense_model(path)
    for question, answer in TEXTS:
        ids = torch.tensor([chat(tokenizer, question) + tokenizer(answer).input_ids])
        with torch.no_grad():
            wanted = reference(ids).logits.log_softmax(-1)
            got = loaded(ids).logits.float().log_softmax(-1)
        divergence = (wanted.exp() * (wanted - got)).sum(-1).mean()
        assert 0 <= divergence < 0.01, question


def test_greedy_text_is_sensible(tokenizer: Any, loaded: Any) -> None:
    ids = torch.tensor([chat(tokenizer, "What is the capital of France?")])
    answer = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
    assert text == "The capital of France is Paris."


def test_routing_depends_on_the_token_and_uses_every_expert(tokenizer: Any, loaded: Any) -> None:
    ids = torch.tensor([tokenizer(builder.CALIBRATION.read_text()).input_ids[:256]])
    chosen: list[torch.Tensor] = []
    with torch.no_grad():
        inputs: list[torch.Tensor] = []
        hooks = [
            layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
            for layer in loaded.model.layers
        ]
        loaded.model(ids)
        for hook in hooks:
            hook.remove()
        for layer, hidden in zip(loaded.model.layers, inputs, strict=True):
            logits = hidden.float() @ layer.mlp.gate.weight.float().T
            chosen.append(logits.topk(builder.TOP_K).indices.flatten())
    counts = torch.stack([torch.bincount(layer, minlength=builder.EXPERTS) for layer in chosen])
    assert (counts > 0).sum() > 0.95 * counts.numel()
    fair = ids.numel() * builder.TOP_K / builder.EXPERTS
    assert counts.max() < 2.9 * fair  # three times would be: chosen by every token
    assert counts.max() > 1.5 * fair  # uneven, as a trained model's routing is
