"""What tests of all parts share: the demo model, a disk that gets full, and users who may not.

The demo model is built once for all tests of a run, or found in the folder that MOEHIVE_TEST_DEMO_DIR names.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from loops import servers_stop_with_their_loop

from moehive.coordinator.bench.small_disk import fill as fill_disk
from moehive.coordinator.bench.small_disk import small_disk as mount_small_disk
from moehive.coordinator.demo.build import build
from moehive.expert_node import measure

__all__ = ["servers_stop_with_their_loop"]  # a fixture

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
    own = tmp_path_factory.getbasetemp()
    run = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own  # the folder of all processes of a run
    out = Path(given) if given else run / "demo" / "model"
    build(out)  # whoever comes second waits
    return out


@pytest.fixture(scope="session")
def speed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """speed.json of a node of one thread here, which then need not measure for half a second."""
    folder = tmp_path_factory.mktemp("speed")
    measure.speed(folder, 1)
    return (folder / "speed.json").read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 20 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with mount_small_disk(folder, 20 << 20) as mounted:
        if not mounted:
            pytest.skip("mounting a tmpfs is not permitted here")
        yield folder


@pytest.fixture
def fill() -> Callable[[Path, int], Path]:
    """Writes a file that leaves so many bytes of a folder's disk free."""

    def fill(folder: Path, leave: int) -> Path:
        ballast = folder / "ballast"
        fill_disk(ballast, leave)
        return ballast

    return fill


@pytest.fixture
def as_nobody() -> Callable[[], AbstractContextManager[None]]:
    """A context in which this process is no superuser, who may write anywhere."""

    @contextmanager
    def as_nobody() -> Iterator[None]:
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield
        finally:
            if root:
                os.seteuid(0)

    return as_nobody


@pytest.fixture
def unprivileged() -> list[str]:
    """What a command begins with so that it may read and write only what files' modes say, the superuser's too."""
    if os.geteuid() != 0:
        return []
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Processes that a test starts heed SIGINT, also where a shell started this one in the background without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
