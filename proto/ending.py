"""A process that was told to end does end, whatever its threads do: make a plan, read a disk that does not answer."""

import atexit
import contextlib
import faulthandler
import os
import sys
from typing import NoReturn

END_SECONDS = 20.0  # systemd's units give 30 before they kill, and a killed process does not say where it hung


def end_soon() -> None:
    """From now on this process has END_SECONDS to end; then it says where each thread is and ends, exit code 1.

    It needs no lock of the interpreter's: native code that never returns is ended, too.
    """
    faulthandler.dump_traceback_later(END_SECONDS, exit=True, file=sys.__stderr__ or sys.stderr)


def ended() -> None:
    """A part has ended; its process may go on."""
    faulthandler.cancel_dump_traceback_later()


def end_now(code: int = 0) -> NoReturn:
    """Ends this process with this exit code, once everything that others see has been closed.

    Python would wait for all threads first, and some take minutes: a plan in the making, a model that is being read.
    What they do is of no use any more, and what they write is whole or not there, as when a process is killed. Nor
    are modules taken apart, at which Triton's complains of all that is still in use.
    """
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):  # nobody reads any more, or it is closed
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
