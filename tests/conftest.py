"""The demo model, built once for all tests of a run, or found in the folder that MOEHIVE_TEST_DEMO_DIR names."""

import os
from pathlib import Path

import pytest

from moehive.coordinator.demo.build import build

# Without a GPU its kernels are interpreted. Triton reads this when it is imported, which other tests may cause.
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is kept in the user's own directory; what one test's coordinator finds out of a model, others use."""
    os.environ["MOEHIVE_HOME"] = str(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint's directory; do not write to it."""
    given = os.environ.get("MOEHIVE_TEST_DEMO_DIR")
    out = Path(given) if given else tmp_path_factory.mktemp("demo") / "model"
    build(out)
    return out
