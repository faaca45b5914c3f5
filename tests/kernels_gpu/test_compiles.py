"""The trunk's kernels compile for a GPU: what the interpreter takes is more than what Triton's compiler does."""

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_become_assembly(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, str(script), "80"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == [
        *("_add_norm", "_attend", "_convolve", "_copy_pages", "_gate", "_gated_norm", "_keep_inputs"),
        *("_place_heads", "_place_latents", "_put_together", "_recur", "_route", "linear"),
    ]
