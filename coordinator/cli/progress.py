"""Progress on standard error: of bytes, and of work that has stages."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, Task


def byte_bars(transient: bool = False, disable: bool = False) -> "Progress":
    """A context that shows bars of bytes done, their rate and the time left; `transient`: they go when they end.

    Each is one line of a terminal of any width: the bar and the end of the description give way.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.table import Column
    from rich.text import Text

    class Description(TextColumn):
        def render(self, task: "Task") -> Text:
            text = super().render(task)
            text.no_wrap, text.overflow = True, "ellipsis"
            return text

    columns = (
        Description("{task.description}", markup=False, table_column=Column(overflow="ellipsis")),
        BarColumn(),
        DownloadColumn(table_column=Column(no_wrap=True)),
        TransferSpeedColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
    )
    return Progress(*columns, console=Console(stderr=True), transient=transient, disable=disable)


@contextmanager
def byte_bar(words: str, quiet: bool) -> Iterator[Callable[..., None]]:
    """Gives what is called with bytes done, bytes in all (None: not known yet) and, if need be, other words.

    The bar is there from the first call on; of one whose total never became known nothing is left. `quiet`: nothing
    is shown.
    """
    bars = byte_bars(disable=quiet)
    task = bars.add_task(words, total=None)

    def show(done: int, total: int | None, name: str = "") -> None:
        bars.update(task, description=name or words, completed=done, total=total)
        if total is not None or bars.console.is_terminal:  # elsewhere each would leave a line
            bars.start()

    try:
        yield show
    finally:
        if bars.tasks[0].total is None:
            bars.update(task, visible=False)
        if bars.live.is_started:
            bars.stop()


@contextmanager
def stages(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Gives what is called with the stage's name, how much is done, and of how much. `quiet`: nothing is shown."""
    if quiet:
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda name, done, total: bar.update(task, description=name, completed=done, total=total)
