"""A process that was told to end does end, whatever hangs in it: a thread, a disk, a library."""

import faulthandler
import sys

END_SECONDS = 20.0  # systemd's units give 30 before they kill, and a killed process does not say where it hung


def end_soon() -> None:
    """From now on this process has END_SECONDS to end; then it says where each thread is and ends, exit code 1.

    It needs no lock of the interpreter's: native code that never returns is ended, too. Call it once there is nothing
    left to be done but to stop.
    """
    faulthandler.dump_traceback_later(END_SECONDS, exit=True, file=sys.__stderr__ or sys.stderr)
