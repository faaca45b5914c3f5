"""The pool's threads keep out of the way of the thread that calls them."""

import os
from pathlib import Path

import torch

from moehive.kernels.blob import empty_blob
from moehive.kernels.geometry import tensor_bytes
from moehive.kernels.linear import LinearOps, LinearWeights

TASKS = Path("/proc/self/task")


def threads() -> set[int]:
    return {int(task.name) for task in TASKS.iterdir()}


def test_a_thread_that_is_pinned_where_the_caller_runs_changes_places() -> None:
    """As many threads as processors: wherever the caller is, the others have the other processors."""
    cpus = os.sched_getaffinity(0)
    before = threads()
    ops = LinearOps(len(cpus))
    pool = threads() - before
    weights = LinearWeights("f32", 1024, 1024, empty_blob(tensor_bytes("f32", 1024, 1024)).zero_())
    x = torch.ones(1, 1024)
    assert len(pool) == len(cpus) - 1
    try:
        for cpu in [*sorted(cpus), *sorted(cpus)]:
            os.sched_setaffinity(0, {cpu})  # of this thread only; it moves at once
            assert not ops.linear(weights, x).any()
            pinned = [os.sched_getaffinity(thread) for thread in pool]
            assert sorted(next(iter(one)) for one in pinned) == sorted(cpus - {cpu})
            assert all(len(one) == 1 for one in pinned)
    finally:
        os.sched_setaffinity(0, cpus)
