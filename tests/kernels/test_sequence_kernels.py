"""The DeltaNet and attention kernels of each instruction set compute the same, as far as rounding lets them.

They run on one machine, so unlike the experts' their bits may differ: aarch64's plain code has fused multiply-adds,
x86's has not, and the C library's exponential is not the same everywhere.
"""

import platform
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CPU = HERE.parent.parent / "kernels" / "cpu"
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
X86 = {
    "sequence_plain": [],
    "trunk_plain": [],
    "sequence_avx2": ["-mavx2", "-mfma"],
    "trunk_avx2": ["-mavx2", "-mfma"],
    "trunk_avx512": ["-mavx512f", "-mavx2", "-mfma"],
}
ARM: dict[str, list[str]] = {"sequence_plain": [], "trunk_plain": []}


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.returncode}: {done.stderr}"
    return done.stdout


def results(
    compiler: str, sources: dict[str, list[str]], folder: Path, emulator: list[str]
) -> dict[str, torch.Tensor]:
    """Kernel → all its results, of the program built for one architecture."""
    objects = []
    for name, flags in sources.items():
        objects.append(str(folder / f"{name}.o"))
        run([compiler, *FLAGS, *flags, "-c", str(CPU / f"{name}.cc"), "-o", objects[-1]])
    program = str(folder / "sequence_numbers")
    run([compiler, *FLAGS, "-static", f"-I{CPU}", str(HERE / "sequence_numbers.cc"), *objects, "-o", program])
    lines = [line.split() for line in run([*emulator, program]).splitlines()]
    return {line[0]: torch.tensor([float(number) for number in line[1:]]) for line in lines}


@pytest.fixture(scope="module")
def here(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return results(compiler, X86 if platform.machine() == "x86_64" else ARM, tmp_path_factory.mktemp("here"), [])


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Nearly all within f32's rounding; a latent may fall on the other side of a rounding to bf16."""
    assert len(ours) > 1000 and torch.isfinite(ours).all()
    difference = (ours - theirs).abs() / theirs.abs().mean()
    assert difference.max() < 1e-2
    assert difference.median() < 1e-6
    assert (difference > 1e-4).sum() < len(ours) // 50


def test_the_kernels_of_this_processor_agree(here: dict[str, torch.Tensor]) -> None:
    """All but the one that multiplies bf16 and rounds queries: test_trunk_ops.py has that where it runs."""
    for results_of_one in here.values():
        same(results_of_one, here["plain"])


def test_neon_agrees(here: dict[str, torch.Tensor], cross_compiler: str, emulator: str, tmp_path: Path) -> None:
    same(results(cross_compiler, ARM, tmp_path, [emulator])["plain"], here["plain"])
