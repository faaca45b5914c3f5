"""What lies in a pack's folder before the pack is whole.

    journal           which experts are finished (journal.py)
    choice.msgpack    of a conversion within a budget: the formats that were chosen, for which source and options
    calibration/      and what its quantizer needs of the calibration text

The choice stays when the pack is whole, so that nothing is chosen again; the other two go.
"""

import shutil
from pathlib import Path

from ...types import CoordinatorError

JOURNAL = "journal"
CHOICE = "choice.msgpack"
CALIBRATION = "calibration"


def is_begun(folder: Path) -> bool:
    """Whether a conversion has left something in `folder`."""
    return any((folder / name).exists() for name in (JOURNAL, CHOICE, CALIBRATION))


def finish(folder: Path) -> None:
    """After the pack is whole. Raises OSError."""
    (folder / JOURNAL).unlink(missing_ok=True)
    if (folder / CALIBRATION).exists():
        shutil.rmtree(folder / CALIBRATION)


def check_way(folder: Path, whole: bool, chosen: bool) -> None:
    """Raises CoordinatorError if the pack in `folder` was made the other way: with formats `chosen`, or given."""
    kept = (folder / CHOICE).exists()
    if whole and chosen and not kept:
        raise another_pack(folder)
    if not whole and is_begun(folder) and chosen != (kept or (folder / CALIBRATION).exists()):
        raise another_beginning(folder)


def another_pack(folder: Path) -> CoordinatorError:
    """The folder's pack is whole, and not the one that is wanted."""
    return CoordinatorError(f"{folder} is the pack of another model or format; name another directory.")


def another_beginning(folder: Path) -> CoordinatorError:
    """The folder's pack is not whole, and not the one that is wanted."""
    return CoordinatorError(f"{folder} holds the beginning of another pack; delete that directory, or name another.")
