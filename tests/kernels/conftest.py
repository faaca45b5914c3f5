"""Random experts whose numbers have the size that trained ones have, and the native parts built for aarch64."""

import fcntl
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moehive.kernels.blob import build_blob
from moehive.kernels.geometry import ExpertSpec
from moehive.kernels.ops import ExpertWeights, load_expert

ROOT = Path(__file__).parents[2]
MakeExpert = Callable[[ExpertSpec, int], ExpertWeights]


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_expert() -> MakeExpert:
    """(spec, seed) → an expert with weights of variance 1 / columns, so that each layer keeps its input's size."""

    def make(spec: ExpertSpec, seed: int) -> ExpertWeights:
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for place in spec.tensors:
            numbers = torch.randn(place.shape, generator=generator)
            if len(place.shape) == 2:
                numbers /= place.shape[1] ** 0.5
            tensors[place.name] = numbers
        return load_expert(spec, build_blob(spec, tensors))

    return make


def program(*names: str, package: str) -> str:
    """The path of the first of these programs that there is. Skips the test without one, or, where nothing may be
    left out (MOEHIVE_NO_SKIPS=1, as in CI), fails it."""
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        sentence = f"needs {names[0]} (Debian: {package})"
        if os.environ.get("MOEHIVE_NO_SKIPS") == "1":
            pytest.fail(sentence)
        pytest.skip(sentence)
    return path


@pytest.fixture(scope="session")
def compiler() -> str:
    """This machine's C++ compiler."""
    return program("g++", "c++", package="g++")


@pytest.fixture(scope="session")
def cross_compiler() -> str:
    """A compiler for aarch64, on x86-64."""
    if platform.machine() != "x86_64":
        pytest.skip("compares x86-64 with aarch64, which this machine can't run")
    return program("aarch64-linux-gnu-g++", package="g++-aarch64-linux-gnu")


@pytest.fixture(scope="session")
def emulator(cross_compiler: str) -> str:
    """What runs programs that the cross compiler makes."""
    return program("qemu-aarch64-static", package="qemu-user-static")


@pytest.fixture(scope="session")
def aarch64_build(cross_compiler: str) -> Path:
    """CMake's folder of all native libraries, built for aarch64 with a wheel's flags: a minute, the first time."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
    assert cmake is not None and ninja is not None, "what builds this package is not there"
    folder = ROOT / "build" / "tests" / "aarch64"
    folder.mkdir(parents=True, exist_ok=True)
    target = [
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={cross_compiler}",
    ]
    target += ["-DCMAKE_BUILD_TYPE=Release", "-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the same run may build there
        for command in (
            [cmake, "-S", str(ROOT), "-B", str(folder), *target],
            [cmake, "--build", str(folder), "--parallel", str(os.cpu_count())],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stdout + done.stderr
    return folder
