"""A part that is told to end does so, whatever hangs in it, and says where it hung."""

import asyncio
from pathlib import Path

import pytest

from moehive.coordinator.bench.process_cluster import Supervised
from moehive.coordinator.cluster.store import Store
from moehive.coordinator.cluster.trust import Authority

# A disk that never answers, in a thread, as soon as the part starts.
HANGING_DISK = """
import asyncio, pathlib, threading
from moehive.proto import ending
def a_disk_that_hangs():
    pathlib.Path(FILE).touch()
    threading.Event().wait()
"""
READS_IT = {
    "moehive.coordinator.cli.main": """
from moehive.coordinator import app
app.open_model = lambda *_: a_disk_that_hangs()
""",
    "moehive.expert_node": """
from moehive.expert_node import node
async def obtain(*arguments):
    await asyncio.to_thread(a_disk_that_hangs)
node.obtain = obtain
""",
}
HANGS_AS_IT_STOPS = """
ending.END_SECONDS = 1.0
async def a_stop_that_hangs(_):
    threading.Event().wait()
app.Coordinator.stop = a_stop_that_hangs
"""


def told_to_end(module: str, folder: Path, more: str = "") -> list[str]:
    """Starts a part, tells it to end when a thread of it hangs, and returns its crashes; `more` is prelude."""
    state, hung = folder / "state", folder / "hung"
    state.mkdir()
    Authority.create(state / "ca")
    Store(state / "coordinator.sqlite").close()
    arguments = ["--state-dir", str(state)]
    if module != "moehive.expert_node":
        arguments = ["coordinator", *arguments, "--model", str(folder), "--port", "0", "--http-port", "0"]
    prelude = HANGING_DISK.replace("FILE", repr(str(hung))) + READS_IT[module] + more

    async def run() -> list[str]:
        part = Supervised("part", [module, *arguments], folder / "log", prelude=prelude)
        part.start()
        while not hung.exists():
            assert not part.crashes, part.crashes
            await asyncio.sleep(0.05)
        await part.stop()
        return part.crashes

    return asyncio.run(run())


@pytest.mark.parametrize("module", READS_IT)
def test_a_part_does_not_wait_for_its_threads(module: str, tmp_path: Path) -> None:
    assert told_to_end(module, tmp_path) == []


def test_a_part_that_hangs_as_it_stops_ends_and_says_where(tmp_path: Path) -> None:
    (crash,) = told_to_end("moehive.coordinator.cli.main", tmp_path, HANGS_AS_IT_STOPS)
    assert "ended by itself, with exit code 1" in crash and "a_stop_that_hangs" in crash
