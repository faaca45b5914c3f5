"""The pool's threads: out of the caller's way, awake while a step runs, asleep when there is none."""

import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter, thread_time

import pytest
import torch

from moehive.kernels.blob import empty_blob
from moehive.kernels.geometry import tensor_bytes
from moehive.kernels.linear import LinearOps, LinearWeights
from moehive.kernels.trunk_ops import TrunkOps

TASKS = Path("/proc/self/task")
CALLS = 200
GAP_S = 0.0003  # between two calls, as the trunk's part of a layer; longer than a thread watches without a reason
IDLE_S = 0.1  # of the caller's own processor time


@pytest.mark.parametrize("case", ["places", "awake", "idle"])
def test_in_a_process_of_its_own(case: str) -> None:
    """All who compute in one share a pool, and its threads are told by their coming."""
    subprocess.run([sys.executable, __file__, case], check=True, timeout=120)


def threads() -> set[int]:
    return {int(task.name) for task in TASKS.iterdir()}


def some_work() -> tuple[LinearWeights, torch.Tensor]:
    """A product that is cut into pieces for all threads."""
    weights = LinearWeights("f32", 1024, 1024, empty_blob(tensor_bytes("f32", 1024, 1024)).zero_())
    return weights, torch.ones(1, 1024)


def pool_of(count: int) -> tuple[LinearOps, set[int]]:
    """With `count` threads, of which one is the caller's; the numbers of the others."""
    before = threads()
    ops = LinearOps(count)
    pool = threads() - before
    assert len(pool) == count - 1
    return ops, pool


def sleeps(thread: int) -> int:
    """How often a thread has gone to sleep by itself so far; that it gives way to others does not count."""
    lines = (TASKS / str(thread) / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


def run_ns(thread: int) -> int:
    """Nanoseconds for which a thread has had a processor."""
    return int((TASKS / str(thread) / "schedstat").read_text().split()[0])


def wait_until_asleep(thread: int) -> None:
    while (TASKS / str(thread) / "stat").read_text().rpartition(")")[2].split()[0] != "S":
        pass


def work_for(seconds: float) -> None:
    """Keeps the caller's thread busy for so long, by its own clock."""
    end = thread_time() + seconds
    while thread_time() < end:
        pass


def places() -> None:
    """Pinned where the caller runs, a thread changes places; as many threads as processors, so all are pinned."""
    cpus = os.sched_getaffinity(0)
    weights, x = some_work()
    ops, pool = pool_of(len(cpus))
    for cpu in [*sorted(cpus), *sorted(cpus)]:
        os.sched_setaffinity(0, {cpu})  # of this thread only; it moves at once
        assert not ops.linear(weights, x).any()
        pinned = [os.sched_getaffinity(thread) for thread in pool]
        assert all(len(one) == 1 for one in pinned)
        assert set().union(*pinned) == cpus - {cpu}


def awake() -> None:
    """Between the calls of a step nobody goes to sleep, but when the caller says that the next one is not near."""
    weights, x = some_work()
    ops, (thread,) = pool_of(2)
    trunk = TrunkOps(2)  # the same pool
    ops.linear(weights, x)
    # Where others take the processors a gap may be longer than anybody should watch, and the next one is watched for
    # less: what counts are gaps after gaps, both as short as they should be.
    counted = slept = 0
    short = False
    for _ in range(10 * CALLS):
        ops.linear(weights, x)
        before, begin = sleeps(thread), perf_counter()
        work_for(GAP_S)
        after, was_short = sleeps(thread), short
        short = perf_counter() - begin < 1.5 * GAP_S
        if short and was_short:
            counted += 1
            slept += after > before
        if counted == CALLS:
            break
    assert slept <= counted // 5, (
        slept,
        counted,
    )  # some 10 of 200 where others are busy; 100 and more unless it watches
    before = sleeps(thread)
    for _ in range(CALLS):
        ops.linear(weights, x)
        trunk.rest()
        wait_until_asleep(thread)
    assert sleeps(thread) - before >= CALLS - 1  # the last one may not be counted yet


def idle() -> None:
    """A thread without work sleeps, and takes no processor time at all from then on."""
    weights, x = some_work()
    ops, (thread,) = pool_of(2)
    for _ in range(CALLS):
        ops.linear(weights, x)
        work_for(GAP_S)  # so that it has a reason to watch
    wait_until_asleep(thread)
    work_for(IDLE_S / 100)  # until its last moments are counted
    asleep = run_ns(thread)
    work_for(IDLE_S)
    assert run_ns(thread) == asleep
    ops.linear(weights, x)  # and it is there again
    assert not ops.linear(weights, x).any()


if __name__ == "__main__":
    {"places": places, "awake": awake, "idle": idle}[sys.argv[1]]()
