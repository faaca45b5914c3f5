"""The memory that a measured process took, and what a node may take."""

from pathlib import Path

_SLICE_SHARE, _NODE_BYTES = 1.05, 200 * 10**6  # what a node's peak may be: its slice, and Python with its libraries


def peak_bytes(pid: int) -> int:
    """A process's largest resident size so far. Not getrusage's: that counts the parent's before exec, too."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def node_peak_limit_bytes(slice_bytes: int) -> int:
    """What the peak may be of a node that holds experts of `slice_bytes`."""
    return int(_SLICE_SHARE * slice_bytes) + _NODE_BYTES
