"""loops.py: a run of tests ends, whatever they leave open."""

import subprocess
import sys
from pathlib import Path

import pytest

_LEAVES = """
import asyncio
import grpc.aio
import pytest
from loops import loop_in_a_thread

async def serve():
    server = grpc.aio.server()
    server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server

def test_on_its_own_loop():
    async def main():
        server = await serve()
        pytest.fail("as it should")
    asyncio.run(main())

@pytest.fixture
def elsewhere():
    with loop_in_a_thread() as loop:
        yield loop

def test_on_a_loop_in_a_thread(elsewhere):
    server = elsewhere.run(serve())
    pytest.fail("as it should")
"""


def test_a_failing_test_that_leaves_a_server_open_ends_and_so_does_the_run(tmp_path: Path) -> None:
    file = tmp_path / "test_leaves.py"
    file.write_text(_LEAVES)
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "-p", "no:cacheprovider", "-p", "loops", str(file)]
    environment = {"PYTHONPATH": str(Path(__file__).parent), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd=tmp_path)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stderr
    assert done.stdout.count("Failed: as it should") >= 2 and "2 failed" in done.stdout, done.stdout
