"""Quantized checkpoints as other projects' code writes them, and helpers of the reader's tests."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from by_path import load

COORDINATOR = Path(__file__).parents[1] / "coordinator"


families = load(COORDINATOR / "families.py")
quantizers, reading = (load(Path(__file__).with_name(f"{name}.py")) for name in ("quantizers", "reading"))


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


@pytest.fixture(scope="session", name="reading")
def reading_module() -> ModuleType:
    """reading.py: `decoded(checkpoint, expert)`, `check_text(model, checkpoint)`."""
    return reading


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
def families_module() -> ModuleType:
    """tests/coordinator/families.py."""
    return families
