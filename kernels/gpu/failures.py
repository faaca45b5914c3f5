"""What went wrong on a GPU, in words: of torch, the driver, or Triton, which compiles kernels at their first use."""

import subprocess

import torch


def why(error: Exception) -> str:
    """The end of a sentence that says what failed, and what to do where a person can do something."""
    if isinstance(error, torch.OutOfMemoryError):
        return "its memory is full"
    if isinstance(error, subprocess.CalledProcessError) or "Failed to find C" in str(error):
        return (
            "Triton builds what starts its kernels with a C compiler and Python's headers, and one of them is "
            "missing (on Debian and Ubuntu: sudo apt install gcc python3-dev)"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return (
            f"Triton can't keep its kernels in {error.filename} ({error.strerror}); set TRITON_CACHE_DIR to a folder "
            "that this user may write to"
        )
    said = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
