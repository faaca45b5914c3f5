"""The kernels compile for GPUs: what the interpreter takes is more than what Triton's compiler does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Every format in every tile, for more kinds of GPU: one to two minutes of a processor each.
EVERY = "MOEHIVE_EVERY_KERNEL" in os.environ


def compiled(cache: Path, *arguments: str) -> list[str]:
    """The kernels that compile_kernels.py compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.split()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["80", "90", "gfx942"] if EVERY else ["80"])
def test_kernels_become_assembly(kind: str, tmp_path: Path) -> None:
    assert compiled(tmp_path, *(["--every"] if EVERY else []), kind) == [
        *("_add_norm", "_attend", "_convolve", "_copy_pages", "_gate", "_gated_norm", "_keep_inputs"),
        *("_place_heads", "_place_latents", "_put_together", "_recur", "_route"),
        *("down_projection", "linear", "sum_pairs", "up_projection"),
    ]


@pytest.mark.timeout(900)
def test_addresses_keep_their_64_bits_on_amd(tmp_path: Path) -> None:
    """Experts, pages and states lie anywhere in a GPU's memory, and kernels find them from one small tensor."""
    assert {"up_projection", "_attend", "_recur"} <= set(compiled(tmp_path, "--anchored", "gfx942"))
