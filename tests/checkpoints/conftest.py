"""Quantized checkpoints as other projects' code writes them, and helpers of the reader's tests."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

COORDINATOR = Path(__file__).parents[1] / "coordinator"


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"moehive_checkpoints_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


families, gguf_writer = _module(COORDINATOR / "families.py"), _module(COORDINATOR / "gguf_writer.py")
quantizers = _module(Path(__file__).with_name("quantizers.py"))


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def modules() -> dict[str, ModuleType]:
    """The plain modules `families`, `gguf_writer` and `quantizers`."""
    return {"families": families, "gguf_writer": gguf_writer, "quantizers": quantizers}


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the directory of a family's random bf16 checkpoint whose rows are whole blocks; do not write to it."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("wide") / family
            quantizers.make_wide(families, family, made[family])
        return made[family]

    return make


@pytest.fixture(scope="session")
def greedy() -> Callable[..., Any]:
    """See `quantizers.greedy`."""
    return quantizers.greedy  # type: ignore[no-any-return]
