"""`moehive up --model` of a pack and of a GGUF: a client gets what the same file gives in this process."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers

from moehive.client import Client
from moehive.coordinator.checkpoints.opening import open_model
from moehive.coordinator.checkpoints.pack.convert import convert

PROMPT = [3, 1, 4, 1, 5]
STEPS = 8


def _module(path: str) -> ModuleType:
    file = Path(__file__).parents[1] / path
    spec = importlib.util.spec_from_file_location(f"moehive_up_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reading, gguf_writer = _module("checkpoints/reading.py"), _module("coordinator/gguf_writer.py")


def _pack(source: Path, folder: Path) -> Path:
    convert(open_model(str(source)), folder / "pack", "q4_k", workers=1)
    return folder / "pack"


def _gguf(source: Path, folder: Path) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    gguf_writer.write(model, model.config, folder / "tiny.gguf", "Q8_0")
    return folder / "tiny.gguf"


@pytest.mark.parametrize("make", [_pack, _gguf])
def test_the_text_is_that_of_the_file(
    make: Callable[[Path, Path], Path], up: Any, tiny_moe: Path, tmp_path: Path
) -> None:
    model = make(tiny_moe, tmp_path)
    opened = open_model(str(model))
    assert {layer.spec.format for layer in opened.manifest.layers} == {"q4_k" if make is _pack else "q8_0"}
    running = up("--model", str(model), "--nodes", "1", "--port", "0", "--http-port", "0")
    with Client(running.address) as client:
        text = client.generate(token_ids=PROMPT, max_tokens=STEPS, temperature=0).token_ids
    assert len(text) == STEPS
    scores = reading.logits(opened, [*PROMPT, *text])
    assert list(text) == scores.argmax(-1)[len(PROMPT) - 1 : -1].tolist()
