"""Every native library builds for aarch64, loads there with no symbol missing, and computes what it computes here."""

import os
import subprocess
from importlib.resources import files
from pathlib import Path

import torch

from moehive.kernels.native import FORMAT_NUMBERS
from moehive.kernels.quantizers.feedback import SUB_BLOCKS

HERE = Path(__file__).parent
SYSROOT = "/usr/aarch64-linux-gnu"  # of Debian's cross compiler
# Of a package, its library, and where CMake builds it.
LIBRARIES = (
    ("kernels", "kernels", "kernels"),
    ("proto", "proto", "proto/cpp"),
    ("coordinator.dispatch", "dispatch", "coordinator/dispatch/cpp"),
    ("coordinator.placement", "planner", "coordinator/placement/cpp"),
    ("expert_node.tiers", "disk", "expert_node/tiers/cpp"),
    ("coordinator.bench", "slow_link", "coordinator/bench/cpp"),
)


def results(compiler: str, emulator: list[str], libraries: list[str], folder: Path) -> dict[str, list[str]]:
    """What the calls of native_calls.cc give: by name a hash, or numbers."""
    program, file = folder / "native_calls", folder / "file"
    source = [str(HERE / "native_calls.cc"), f"-I{HERE.parents[1] / 'kernels' / 'cpu'}"]
    subprocess.run([compiler, "-std=c++17", *source, "-o", str(program), "-ldl", "-pthread"], check=True, timeout=120)
    file.write_bytes(bytes(range(250)) * 160)
    command = [*emulator, str(program), *libraries, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {name: values for _, name, *values in map(str.split, done.stdout.splitlines())}


def test_every_library_is_built(aarch64_build: Path) -> None:
    for _, name, folder in LIBRARIES:
        header = (aarch64_build / folder / f"libmoehive_{name}.so").read_bytes()[:20]
        assert header[:4] == b"\x7fELF" and header[18:20] == (183).to_bytes(2, "little")  # EM_AARCH64


def test_they_load_and_compute_the_same(
    aarch64_build: Path, compiler: str, cross_compiler: str, emulator: str, tmp_path: Path
) -> None:
    folders = tmp_path / "here", tmp_path / "there"
    for folder in folders:
        folder.mkdir()
    installed = [os.fspath(files(f"moehive.{package}") / f"libmoehive_{name}.so") for package, name, _ in LIBRARIES]  # type: ignore[call-overload]
    built = [str(aarch64_build / folder / f"libmoehive_{name}.so") for _, name, folder in LIBRARIES]
    here = results(compiler, [], installed, folders[0])
    there = results(cross_compiler, [emulator, "-L", SYSROOT], built, folders[1])
    assert {"layer-q4_0-neon", "layer-bf16-neon", "packed", "rounded", "chosen"} <= there.keys()
    assert {"pairs", "file", "network"} <= there.keys()
    assert {f"{what}-{FORMAT_NUMBERS[name]}" for what in ("codes", "factors") for name in SUB_BLOCKS} <= there.keys()
    ours, theirs = (torch.tensor([float(number) for number in one.pop("linear")]) for one in (here, there))
    torch.testing.assert_close(ours, theirs)  # the trunk's bits are those of its processor
    for name, value in there.items():
        assert here.get(name.replace("neon", "avx2"), value) == value, name  # where this processor has AVX2
