"""Text and messages to tokens and back, with the tokenizer and chat template of a checkpoint's directory."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from moehive.coordinator.checkpoints.tokenizer import load_tokenizer
from moehive.coordinator.serving.text import INLINE_CHARACTERS, Text
from moehive.coordinator.types import InvalidRequest


def write(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(values))


def test_a_checkpoint_with_a_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(tmp_path)
    write(tmp_path / "config.json", model_type="mixtral", eos_token_id=2)
    text = Text(*load_tokenizer(tmp_path))
    assert text.has_tokenizer and text.stop_tokens == {2}
    written = "The capital of France. " * (INLINE_CHARACTERS // 10)  # on a worker
    assert text.decode(asyncio.run(text.encode(written))) == written
    chat = asyncio.run(text.encode_chat([{"role": "user", "content": "<|im_end|>Hi"}]))
    assert tokenizer.decode(chat) == "<|im_start|>user\n<|im_end|>Hi<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(InvalidRequest, match="no such role: x"):
        asyncio.run(text.encode_chat([{"role": "x", "content": ""}]))
    with pytest.raises(InvalidRequest, match="empty"):
        asyncio.run(text.encode(""))


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m.content }}", "{{ messages | nosuch }}"])
def test_a_broken_template_is_not_the_clients_fault(template: str, tokenizer: PreTrainedTokenizerFast) -> None:
    broken = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=template)
    with pytest.raises(InvalidRequest, match=r"chat template is broken.*send a prompt instead"):
        asyncio.run(Text(broken, frozenset()).encode_chat([{"role": "user", "content": "x"}]))


def test_a_template_can_not_reach_the_machine(tokenizer: PreTrainedTokenizerFast) -> None:
    evil = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        chat_template="{{ messages.__class__.__mro__[-1].__subclasses__() }}",
    )
    with pytest.raises(InvalidRequest, match="refuses these messages"):
        asyncio.run(Text(evil, frozenset()).encode_chat([{"role": "user", "content": "x"}]))


def test_without_tokenizer_or_template(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write(tmp_path / "config.json", model_type="mixtral")
    bare = Text(*load_tokenizer(tmp_path))
    assert not bare.has_tokenizer and bare.decode([1, 2]) == "" and bare.show(1) == ""
    with pytest.raises(InvalidRequest, match="send token ids"):
        asyncio.run(bare.encode("x"))
    no_template = Text(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer), frozenset())
    with pytest.raises(InvalidRequest, match="no chat template") as caught:
        asyncio.run(no_template.encode_chat([{"role": "user", "content": "x"}]))
    assert caught.value.parameter == "messages"
