"""A node waits for its turn on the coordinator's own machine, and nowhere else."""

import os
import threading

import pytest

from moehive.expert_node.courtesy import give_way, own_and_other

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="the system has no such policy")
ELSEWHERE = "198.51.100.1:7700"  # RFC 5737: nobody's


def policy_after(coordinator: str) -> int:
    """Of a thread that a thread that gave way has started."""
    found: list[int] = []

    def first() -> None:
        give_way(coordinator)
        second = threading.Thread(target=lambda: found.append(os.sched_getscheduler(0)))
        second.start()
        second.join()

    thread = threading.Thread(target=first)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("coordinator", ["127.0.0.1:7700", "localhost:7700", "127.8.8.8:7700"])
def test_on_the_coordinators_machine(coordinator: str) -> None:
    own, other = own_and_other("127.0.0.1:7700")
    assert own == other == "127.0.0.1"
    assert policy_after(coordinator) == os.SCHED_BATCH


@pytest.mark.parametrize("coordinator", [ELSEWHERE, "no-such-host.invalid:7700"])
def test_elsewhere_nothing_changes(coordinator: str) -> None:
    assert policy_after(coordinator) == os.sched_getscheduler(0)
