"""`moehive up --model` of a pack and of a GGUF of each family: a client gets what the file gives in this process."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from by_path import load

from moehive.client import Client
from moehive.coordinator.checkpoints.opening import open_model
from moehive.coordinator.checkpoints.pack.convert import convert

PROMPT = [3, 1, 4, 1, 5]
STEPS = 8
# A file of llama.cpp's for each family (tests/checkpoints/llama_cpp/make.py), and the formats of its experts.
FILES = {
    "qwen3_moe": ("Q4_K_M", {"q4_k"}),
    "mixtral": ("Q3_K_M", {"q3_k"}),
    "qwen3_5_moe_text": ("mixed", {"iq4_xs"}),
    "deepseek_v3": ("Q4_K_M", {"q4_k"}),
    "gpt_oss": ("published", {"mxfp4"}),
    "glm4_moe": ("Q8_0", {"q8_0"}),
}
TIE = 0.1  # logits that differ by less may fall either way: a whole text and single steps round a little differently


CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
reading, archives = load(CHECKPOINTS / "reading.py"), load(CHECKPOINTS / "llama_cpp" / "archives.py")


def test_the_text_is_that_of_the_pack(up: Any, tiny_moe: Path, tmp_path: Path) -> None:
    convert(open_model(str(tiny_moe)), tmp_path / "pack", "q4_k", workers=1)
    opened = open_model(str(tmp_path / "pack"))
    assert {layer.spec.format for layer in opened.manifest.layers} == {"q4_k"}
    running = up("--model", str(tmp_path / "pack"), "--nodes", "1", "--port", "0", "--http-port", "0")
    with Client(running.address) as client:
        text = client.generate(token_ids=PROMPT, max_tokens=STEPS, temperature=0).token_ids
    assert len(text) == STEPS
    scores = reading.logits(opened, [*PROMPT, *text])
    assert list(text) == scores.argmax(-1)[len(PROMPT) - 1 : -1].tolist()


@dataclass(frozen=True)
class Served:
    """A folder with a family's file and what llama.cpp says of it, and where the file is served."""

    folder: Path
    address: str


@pytest.fixture(scope="module")
def served(up_together: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    """All families' files, served at once, for most of a start is waiting."""
    folders, arguments = {}, {}
    for family, (kind, _) in FILES.items():
        folder = tmp_path_factory.mktemp(family)
        folders[family] = archives.unpack(family, folder, f"{kind}.gguf", "logits.npz")
        model = str(folder / f"{kind}.gguf")
        arguments[family] = ["--model", model, "--nodes", "1", "--port", "0", "--http-port", "0"]
    running = up_together(arguments)
    return {family: Served(folders[family], running[family].address) for family in FILES}


@pytest.mark.parametrize("family", list(FILES))
def test_the_text_is_that_of_llama_cpps_file(family: str, served: dict[str, Served], tmp_path: Path) -> None:
    kind, formats = FILES[family]
    folder = served[family].folder
    archives.unpack("text", tmp_path, "chats.json")
    chat = json.loads((tmp_path / "chats.json").read_text())[family]["question"]
    said = np.load(folder / "logits.npz")
    with Client(served[family].address) as client:
        answer = client.generate(str(said["texts"][0]), max_tokens=STEPS, temperature=0)
        asked = client.generate(messages=[{"role": "user", "content": "Hi"}], max_tokens=1).usage.prompt_tokens
    opened = open_model(str(folder / f"{kind}.gguf"))
    assert opened.family == family and {layer.spec.format for layer in opened.manifest.layers} == formats
    tokenizer, stops = opened.tokenizer()
    assert asked == len(tokenizer(chat, add_special_tokens=False)["input_ids"])
    prompt, tokens = said["tokens 0"].tolist(), list(answer.token_ids)  # the prompt's as llama.cpp has them
    assert len(tokens) == STEPS or (answer.finish_reason == "stop" and tokens[-1] in stops)
    assert answer.text == tokenizer.decode(tokens, skip_special_tokens=True)
    scores = reading.logits(opened, [*prompt, *tokens])[len(prompt) - 1 : -1]
    for row, token in zip(scores, tokens, strict=True):
        assert row.max() - row[token] < TIE
