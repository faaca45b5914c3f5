"""`moehive up --model ORGANIZATION/NAME`: it downloads from a hub, serves, and needs the hub no more."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from by_path import load
from hub_server import HubServer

from moehive.client import Client
from moehive.coordinator.checkpoints.opening import open_model

NAME = "organization/tiny-moe"
PROMPT = [3, 1, 4, 1, 5]
STEPS = 8
ONE_NODE = ["--nodes", "1", "--port", "0", "--http-port", "0"]


TESTS = Path(__file__).parents[1]
reading, gguf_writer = load(TESTS / "checkpoints/reading.py"), load(TESTS / "coordinator/gguf_writer.py")


@pytest.fixture
def hub(environment: dict[str, str], tmp_path: Path) -> Any:
    """A hub without repositories, not open yet; `moehive` asks it, and keeps what it gets in the test's own cache."""
    server = HubServer({})
    environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1"}
    return server


def test_a_model_of_a_hub_is_downloaded_and_served(hub: Any, up: Any, tiny_moe: Path) -> None:
    held = {path.name: path.read_bytes() for path in tiny_moe.iterdir()}
    hub.repositories[NAME] = held | {"README.md": b"x", "pytorch_model.bin": b"x", "original/model.safetensors": b"x"}
    with hub:
        check_text(up("--model", NAME, *ONE_NODE), NAME, tiny_moe)
    assert {name for name, count in hub.sent.items() if count} == held.keys()


def test_a_model_of_a_hub_is_downloaded_and_converted(hub: Any, moehive: Any, tiny_moe: Path, tmp_path: Path) -> None:
    hub.repositories[NAME] = {path.name: path.read_bytes() for path in tiny_moe.iterdir()}
    with hub:
        done = moehive("convert", NAME, str(tmp_path / "pack"), "--format", "q8_0")
        told = moehive("verify", str(tmp_path / "pack"))
    assert done.code == 0 and told.code == 0, (done, told)
    download, converting = done.sentence.splitlines()  # how far each is
    assert download.startswith(NAME) and converting.startswith("Converting")
    assert "0.00 GB" not in done.stdout + told.stdout and "kB" in done.stdout


def test_a_model_that_was_pulled_is_served_without_the_hub(
    hub: Any, moehive: Any, up: Any, tiny_moe: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_moe)
    gguf_writer.write(model, model.config, tmp_path / "tiny.gguf", "Q8_0")
    hub.repositories[NAME] = {"Tiny-Q8_0.gguf": (tmp_path / "tiny.gguf").read_bytes(), "Tiny-Q4_0.gguf": b"x"}
    with hub:
        assert moehive("pull", f"{NAME}:Q8_0").code == 0
    check_text(up("--model", f"{NAME}:Q8_0", *ONE_NODE), f"{NAME}:Q8_0", tmp_path / "tiny.gguf")


def check_text(running: Any, name: str, source: Path) -> None:
    """The model goes by its id, and its text is that of the files in `source`."""
    with Client(running.address) as client:
        assert [each.id for each in client.models()] == [name]
        text = client.generate(token_ids=PROMPT, max_tokens=STEPS, temperature=0).token_ids
    assert len(text) == STEPS
    scores = reading.logits(open_model(str(source)), [*PROMPT, *text])
    assert list(text) == scores.argmax(-1)[len(PROMPT) - 1 : -1].tolist()


def test_a_download_that_fails_is_one_sentence(hub: Any, moehive: Any, tiny_moe: Path, home: Path) -> None:
    with hub:
        nobody = moehive("up", "--model", NAME, *ONE_NODE)
        hub.repositories[NAME] = {path.name: path.read_bytes() for path in tiny_moe.iterdir()}
        hub.cut_after, hub.replies_until_cut = 10_000, 1
        cut = moehive("up", "--model", NAME, *ONE_NODE)
    assert nobody.code == 1 and f"neither a directory {NAME} nor such a model" in nobody.sentence
    assert cut.code == 1 and "broke off" in cut.sentence and "run it again" in cut.sentence
    assert not home.exists()  # no cluster was begun
