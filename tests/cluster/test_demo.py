"""The demo model through a cluster of three node processes says what the dense model says."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from moehive.coordinator.demo import dense, package
from moehive.coordinator.models.base import SequenceInput

MAX_KL = 0.01  # nats a token; the experts are the dense layer in bf16, so only rounding is left
CHATS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How does a refrigerator keep food cold?", "A refrigerator moves heat from its inside to the room behind it."),
    ("Write a haiku about the sea.", "Waves upon the shore,\nwhispering of distant lands,\nreturn to the deep."),
)


def test_kl_to_the_dense_model_and_the_text(demo_model: Path, new_cluster: Any, ask: Callable[..., Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    rows: list[torch.Tensor] = []
    for question, answer in CHATS:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(torch.tensor(tokenizer.apply_chat_template(messages)["input_ids"]))

    async def run() -> tuple[list[torch.Tensor], str]:
        async with new_cluster().coordinator(demo_model, nodes=3) as coordinator:
            trunk = coordinator.trunk
            logits: list[torch.Tensor] = []
            for ids in rows:
                batch = [SequenceInput(ids, trunk.new_cache(), all_logits=True)]
                logits += await trunk.forward(batch, coordinator.dispatcher)
            # The answer's first word is nearly a tie in this model, so the sentence is begun for it.
            chat = [{"role": "user", "content": CHATS[0][0]}]
            begun = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            begun += "The capital of France is"
            text = await ask(coordinator, lambda c: c.generate(prompt=begun, max_tokens=4, temperature=0).text)
            return logits, text

    found, text = asyncio.run(run())
    path = package.find(Path("/nonexistent"))
    assert path is not None
    model = dense.dense_model(path)
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, logits in zip(rows, found, strict=True):
            wanted = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
            kl = (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1)
            total, count = total + float(kl.sum()), count + len(kl)
    assert total / count <= MAX_KL, total / count
    assert "Paris" in text
