"""Tokenizer, chat template and end-of-text ids as a checkpoint's directory has them."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from moehive.coordinator.serving.text import INLINE_CHARACTERS, Text, end_tokens
from moehive.coordinator.types import CoordinatorError, InvalidRequest


def write(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(values))


def test_end_tokens(tmp_path: Path) -> None:
    assert end_tokens(tmp_path) == frozenset()
    write(tmp_path / "config.json", text_config={"eos_token_id": 7})
    assert end_tokens(tmp_path) == {7}
    write(tmp_path / "config.json", eos_token_id=5, text_config={"eos_token_id": 7})
    assert end_tokens(tmp_path) == {5}
    write(tmp_path / "generation_config.json", eos_token_id=[1, 2])
    assert end_tokens(tmp_path) == {1, 2}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CoordinatorError, match=r"generation_config\.json can't be read"):
        end_tokens(tmp_path)


def test_a_checkpoint_with_a_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(tmp_path)
    write(tmp_path / "config.json", model_type="mixtral", eos_token_id=2)
    text = Text.load(tmp_path)
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
    bare = Text.load(tmp_path)
    assert not bare.has_tokenizer and bare.decode([1, 2]) == "" and bare.show(1) == ""
    with pytest.raises(InvalidRequest, match="send token ids"):
        asyncio.run(bare.encode("x"))
    no_template = Text(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer), frozenset())
    with pytest.raises(InvalidRequest, match="no chat template") as caught:
        asyncio.run(no_template.encode_chat([{"role": "user", "content": "x"}]))
    assert caught.value.parameter == "messages"


def test_a_broken_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path / "config.json", model_type="mixtral")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"ty')
    with pytest.raises(CoordinatorError, match=r"can't be read .* remove the tokenizer's files"):
        Text.load(tmp_path)
