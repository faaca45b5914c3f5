"""The instruction sets agree bit for bit: one program, built for this machine and for aarch64.

What can't run here is at least compiled: the x86 build contains the AVX-512 kernels. The scalar kernel rounds its
products and so differs from the fused ones, but is itself the same everywhere.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CPU = ROOT / "kernels" / "cpu"
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx2", "-mfma", "-mf16c"]
X86 = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_vnni": ["-mavx512vnni", *AVX512],
    "avx512_bf16": ["-mavx512bf16", "-mavx512vbmi", "-mavx512vnni", *AVX512],
}
ARM: dict[str, list[str]] = {"scalar": [], "neon": []}


def build(compiler: str, sources: dict[str, list[str]], folder: Path, made: Path | None = None) -> Path:
    """The program with these kernels, linked statically so that an emulator needs no foreign libraries.

    `made`: where CMake has compiled them already.
    """

    def compiled(name: str, source: Path, flags: list[str]) -> str:
        made = str(folder / f"{name}.o")
        run([compiler, *FLAGS, f"-I{CPU}", *flags, "-c", str(source), "-o", made])
        return made

    files = [
        ("same_bits", HERE / "same_bits.cc", []),
        ("kernel", CPU / "kernel.cc", []),
        *((name, CPU / f"{name}.cc", sources[name]) for name in sources if made is None),
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the kernels, some ten seconds each, on all processors
        objects = list(pool.map(lambda file: compiled(*file), files))
    if made is not None:
        objects += [str(made / f"kernels/CMakeFiles/moehive_kernels.dir/cpu/{name}.cc.o") for name in sources]
    program = folder / "same_bits"
    run([compiler, "-static", *objects, "-o", str(program)])
    return program


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def hashes(output: str) -> dict[str, str]:
    return dict(line.split() for line in output.splitlines())


def built_here() -> Path | None:
    """CMake's folder of this machine's library, unless a source is newer: its kernels take a minute to compile."""
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for made in ROOT.glob("build/*/build.ninja"):
        told = ninja and subprocess.run(
            [ninja, "-C", str(made.parent), "-n", "moehive_kernels"], capture_output=True, text=True, timeout=60
        )
        if told and told.stdout.endswith("no work to do.\n"):
            return made.parent
    return None


@pytest.fixture(scope="module")
def here(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Kernel → hash of its results on this processor."""
    kernels = X86 if platform.machine() == "x86_64" else ARM
    return hashes(run([str(build(compiler, kernels, tmp_path_factory.mktemp("here"), built_here()))]))


def test_the_kernels_of_this_processor_agree(here: dict[str, str]) -> None:
    fused = set(here.values()) - {here["scalar"]}
    assert len(fused) <= 1, here
    if len(here) > 1:
        assert fused, "the scalar kernel can't have the fused kernels' bits: the hash sees nothing"


def test_neon_has_the_bits_of_avx2(
    here: dict[str, str], cross_compiler: str, emulator: str, aarch64_build: Path, tmp_path: Path
) -> None:
    there = hashes(run([emulator, str(build(cross_compiler, ARM, tmp_path, aarch64_build))]))
    assert there["scalar"] == here["scalar"]
    if "avx2" in here:
        assert there["neon"] == here["avx2"]
