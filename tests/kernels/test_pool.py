"""The pool's threads keep out of the way of the thread that calls them."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from moehive.kernels.blob import empty_blob
from moehive.kernels.geometry import tensor_bytes
from moehive.kernels.linear import LinearOps, LinearWeights

TASKS = Path("/proc/self/task")


def test_a_thread_that_is_pinned_where_the_caller_runs_changes_places() -> None:
    """In a process of its own: all who compute in one share a pool, and its threads are told by their coming."""
    subprocess.run([sys.executable, __file__], check=True)


def threads() -> set[int]:
    return {int(task.name) for task in TASKS.iterdir()}


def main() -> None:
    """As many threads as processors: wherever the caller is, the others have the other processors."""
    cpus = os.sched_getaffinity(0)
    weights = LinearWeights("f32", 1024, 1024, empty_blob(tensor_bytes("f32", 1024, 1024)).zero_())
    x = torch.ones(1, 1024)
    before = threads()
    ops = LinearOps(len(cpus))
    pool = threads() - before
    assert len(pool) == len(cpus) - 1
    for cpu in [*sorted(cpus), *sorted(cpus)]:
        os.sched_setaffinity(0, {cpu})  # of this thread only; it moves at once
        assert not ops.linear(weights, x).any()
        pinned = [os.sched_getaffinity(thread) for thread in pool]
        assert all(len(one) == 1 for one in pinned)
        assert set().union(*pinned) == cpus - {cpu}


if __name__ == "__main__":
    main()
