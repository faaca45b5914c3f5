"""Texts and chats as llama.cpp's own code writes them (llama_cpp/text.py), and chats as transformers does."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from by_path import load

from moehive.coordinator.checkpoints.gguf.file import open_gguf
from moehive.coordinator.checkpoints.gguf.tokenizer import load_tokenizer

HERE = Path(__file__).with_name("llama_cpp")
text, make, archives = load(HERE / "text.py"), load(HERE / "make.py"), load(HERE / "archives.py")
DAY = re.compile(r"\d{4}-\d{2}-\d{2}|\d{1,2} \w{3} \d{4}")  # that some templates write


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the archive's files."""
    folder: Path = archives.unpack("text", tmp_path_factory.mktemp("text"))
    return folder


@pytest.mark.parametrize("split", text.SPLITS)
def test_tokens_are_llama_cpps(split: str, written: Path) -> None:
    tokenizer, stops = load_tokenizer(open_gguf(written / f"{split}.gguf"))
    known = json.loads((written / "tokens.json").read_text())
    assert tokenizer.convert_ids_to_tokens(sorted(stops)) == [text.ENDING]
    for each, ids in zip(known["texts"], known["ids"][split], strict=True):
        assert tokenizer(each)["input_ids"] == ids, each
        assert tokenizer.decode(ids).removeprefix(text.BEGINNING) == each


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives a family's tokenizer, from its file."""
    found: dict[str, Any] = {}

    def load(family: str) -> Any:
        if family not in found:
            folder = archives.unpack(family, tmp_path_factory.mktemp(family), "Q8_0.gguf")
            found[family] = load_tokenizer(open_gguf(folder / "Q8_0.gguf"))[0]
        return found[family]

    return load


@pytest.mark.parametrize("chat", list(text.CHATS))
@pytest.mark.parametrize("family", list(make.OF_FAMILY))
def test_chats_are_llama_cpps(family: str, chat: str, file: Any, written: Path) -> None:
    theirs = json.loads((written / "chats.json").read_text())[family]
    messages, values = text.CHATS[chat]
    ours = file(family).apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **values)
    assert DAY.sub("DAY", ours) == DAY.sub("DAY", theirs[chat])
