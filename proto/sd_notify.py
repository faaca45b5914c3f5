"""Tells systemd how this service is doing (`Type=notify`), with nothing but the standard library.

Source: sd_notify(3) and sd_watchdog_enabled(3). Away from systemd, that is without NOTIFY_SOCKET, all of it does
nothing. Left out: file descriptor store, `vsock:` sockets, reload.
"""

import logging
import os
import socket

_log = logging.getLogger(__name__)

_SEND_TIMEOUT = 1.0  # seconds; systemd reads at once, so a full queue means that it is in trouble itself


def notify(*, ready: bool = False, stopping: bool = False, watchdog: bool = False, status: str | None = None) -> bool:
    """Sends one message to the service manager; True when it was handed over.

    `ready`: start-up is over and requests are answered. `stopping`: shutting down. `watchdog`: still alive, to be
    sent at least once every `watchdog_interval()` seconds. `status`: one line for `systemctl status`.
    Never raises for a socket that is missing or refuses: that is logged, since a service works without its manager.
    Raises ValueError when there is nothing to say.
    """
    lines = [
        name for name, wanted in (("READY=1", ready), ("STOPPING=1", stopping), ("WATCHDOG=1", watchdog)) if wanted
    ]
    if status is not None:
        lines.append("STATUS=" + " ".join(status.split()))  # a line break would begin another assignment
    if not lines:
        raise ValueError("notify() needs something to say: ready, stopping, watchdog or status.")
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        if path:
            _log.warning("NOTIFY_SOCKET is %r, which is neither a path nor an abstract socket: not notified.", path)
        return False
    # '@' stands for the NUL byte that an abstract socket's name begins with.
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.settimeout(_SEND_TIMEOUT)
        try:
            sender.sendto("\n".join(lines).encode(), address)
        except OSError as error:
            _log.warning("The service manager could not be told %s: %s", lines, error)
            return False
    return True


def watchdog_interval() -> float | None:
    """Seconds between two `notify(watchdog=True)`: half of what systemd allows. None when it does not watch us.

    WATCHDOG_PID guards against a child that inherits the environment of a watched parent.
    """
    allowed = os.environ.get("WATCHDOG_USEC", "")
    watched = os.environ.get("WATCHDOG_PID", "")
    if not allowed.isascii() or not allowed.isdigit() or int(allowed) == 0:
        return None
    if watched and watched != str(os.getpid()):
        return None
    return int(allowed) / 2e6
