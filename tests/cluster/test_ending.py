"""A part that is told to end does so, whatever hangs in it, and says where it hung."""

import asyncio
from pathlib import Path

import pytest

from moehive.coordinator.bench.process_cluster import Supervised
from moehive.coordinator.cluster.store import Store
from moehive.coordinator.cluster.trust import Authority

# A disk that never answers, in a thread, as soon as the part starts.
PRELUDE = """
import asyncio, pathlib, threading
from moehive.proto import ending
ending.END_SECONDS = 1.0
def a_disk_that_hangs():
    pathlib.Path(FILE).touch()
    threading.Event().wait()
"""
HANGS = {
    "moehive.coordinator.cli.main": """
from moehive.coordinator import app
app.open_model = lambda path: a_disk_that_hangs()
""",
    "moehive.expert_node": """
from moehive.expert_node import node
async def obtain(*arguments):
    await asyncio.to_thread(a_disk_that_hangs)
node.obtain = obtain
""",
}


@pytest.mark.parametrize("module", HANGS)
def test_a_part_in_which_a_thread_hangs_ends_and_says_where(module: str, tmp_path: Path) -> None:
    state, hung = tmp_path / "state", tmp_path / "hung"
    state.mkdir()
    Authority.create(state / "ca")
    Store(state / "coordinator.sqlite").close()
    arguments = ["--state-dir", str(state)]
    if module != "moehive.expert_node":
        arguments = ["coordinator", *arguments, "--model", str(tmp_path), "--port", "0", "--http-port", "0"]
    prelude = PRELUDE.replace("FILE", repr(str(hung))) + HANGS[module]

    async def run() -> list[str]:
        part = Supervised("part", [module, *arguments], tmp_path / "log", prelude=prelude)
        part.start()
        while not hung.exists():
            assert not part.crashes, part.crashes
            await asyncio.sleep(0.05)
        await part.stop()
        return part.crashes

    (crash,) = asyncio.run(run())
    assert "ended by itself, with exit code 1" in crash and "a_disk_that_hangs" in crash
