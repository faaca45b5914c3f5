"""Takes most of the processor away from a running process, as a game or a video call on the same machine would."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .control_group import control_group

PERIOD_SECONDS = 0.02  # in each of these the process gets its share


@contextmanager
def throttled(pid: int, share: float) -> Iterator[str]:
    """The process gets `share` of one core within the block; gives the means, for a person.

    A control group's quota where this user may make one, else the process is stopped and continued by turns.
    """
    period = round(PERIOD_SECONDS * 1e6)
    quota = str(round(share * period))
    limits_v1 = {"cpu.cfs_period_us": str(period), "cpu.cfs_quota_us": quota}
    with control_group("cpu", limits_v1, {"cpu.max": f"{quota} {period}"}) as group:
        if group is not None:
            (group.folder / "cgroup.procs").write_text(str(pid))
            yield f"cpu quota of a control group, version {group.version}"
            return
    with _by_turns(pid, share):
        yield "SIGSTOP and SIGCONT by turns"


@contextmanager
def _by_turns(pid: int, share: float) -> Iterator[None]:
    over = threading.Event()

    def turns() -> None:
        with suppress(ProcessLookupError):
            while not over.is_set():
                os.kill(pid, signal.SIGSTOP)
                over.wait((1 - share) * PERIOD_SECONDS)
                os.kill(pid, signal.SIGCONT)
                over.wait(share * PERIOD_SECONDS)

    thread = threading.Thread(target=turns, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
