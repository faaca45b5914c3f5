"""Which builds can talk: every internal call carries the protocol number and the build's version as metadata.

A mismatch is FAILED_PRECONDITION with a sentence that names both versions, so that the person who reads it
knows which machine to update.
"""

from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version

PROTOCOL = 4  # grows when an older build could misread a message
PROTOCOL_KEY = "moehive-protocol"
VERSION_KEY = "moehive-version"


@cache
def software_version() -> str:
    """The installed version of this build, for example `0.1.0`. Finding it out takes half a millisecond."""
    try:
        return version("moehive")
    except PackageNotFoundError:
        return "unknown"


def metadata() -> tuple[tuple[str, str], ...]:
    """What a caller sends with each call."""
    return ((PROTOCOL_KEY, str(PROTOCOL)), (VERSION_KEY, software_version()))


def mismatch(received: Iterable[tuple[str, str | bytes]]) -> str | None:
    """None when a caller with this metadata can be talked to, else the sentence that says why not."""
    values = dict(received)
    theirs = values.get(PROTOCOL_KEY)
    if theirs == str(PROTOCOL):
        return None
    build = values.get(VERSION_KEY, "an unknown version")
    shown = str(build)[:64] if isinstance(build, str) else "an unknown version"
    number = theirs[:16] if isinstance(theirs, str) else "none"
    return (
        f"The caller runs moehive {shown} (protocol {number}), this machine runs moehive {software_version()} "
        f"(protocol {PROTOCOL}); install the same version on both."
    )
