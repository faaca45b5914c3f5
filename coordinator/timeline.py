"""Where the microseconds of a token go: spans of time, written as a Chrome trace that Perfetto opens.

`current` is what every part calls; it does nothing until `recording` puts a Recorder there:

    with timeline.current.span("router"):        # some synchronous or awaited piece of work
        ...
    timeline.current.hop(node, layer, reply, trip_of)   # a message to a node, answered by a future

Call it through the module (`timeline.current`), never `from … import current`. When nothing is recorded a span costs
three calls that do nothing (0.2 to 0.4 µs), so it may stand in each layer, not in each element of a loop; what would
cost more asks `timeline.current.on` first.

Names in use: `attention` (with the norms around it, and for few tokens with the router), `router`, `sending` (split
and send), `shared expert`, `dense`, `foresee`, `local experts`, `waiting` (for one node after the other, so the first
one's span is the longest), `reading` (a reply), `adding up`, `lm head`, `sample`. What lies between them in a pass is
the trunk's remaining time.

A track is a row of the trace, in which spans lie inside each other. Passes that take turns need one each: `track`
takes a free one for as long as the block runs. Nodes have tracks by pass: for each layer a `round trip` as the
coordinator saw it, and in it, without a gap, what the node says of it: `link` (the way there), `reading` (the
request), `waiting for its turn`, `experts`, `writing` (the reply), `link` (the way back). A node knows how long it
writes a reply only when it writes the next one, so the last one's writing counts as link.

A node that runs on this machine has the coordinator's clock: its times are where they were. Another node's clock says
nothing here, so its times are put into the middle of the round trip, the way there and back equally long.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from time import perf_counter_ns
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TypeVar

from .whole_file import whole_file

T = TypeVar("T")

MAX_SPANS = 1_000_000  # about 200 MB in memory and 100 MB written; later ones are counted only
COORDINATOR = "coordinator"
_WAY_IN = "link", "reading", "waiting for its turn", "experts"  # of a round trip, up to the reply
ENGINE = 0  # the track of what belongs to no pass


class Trip(NamedTuple):
    """When a node was asked and answered, nanoseconds: the first three of `perf_counter_ns`, `began` of the node's
    own monotonic clock; the others are what the node says it took (ComputeReply of proto/experts.proto).
    """

    sent: int  # nothing had left yet
    read: int  # the reading of the reply began
    came: int  # the reply was there
    began: int  # the node began to compute
    reading: int
    waited: int
    computed: int
    wrote: int  # the reply before this one


class Timeline(Protocol):
    """What parts of the hot path may call; see the module's text."""

    @property
    def on(self) -> bool:
        """Whether anything is recorded."""
        ...

    def span(self, name: str) -> AbstractContextManager[None]:
        """Records the block's time under `name`, on the track of the pass that runs."""
        ...

    def track(self, name: str) -> AbstractContextManager[None]:
        """As `span`, and the block, awaits included, has a track of its own."""
        ...

    def beside(self, name: str, start: int, end: int) -> None:
        """Records what another thread did for the pass that runs, nanoseconds of `perf_counter_ns`."""
        ...

    def hop(self, node: str, layer: int, reply: "asyncio.Future[T]", trip: Callable[[T], Trip]) -> None:
        """Records a message to `node` about a layer, once `reply` is there; `trip` reads its times."""
        ...


class _Nothing:
    """A block that is not recorded."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


_NOTHING = _Nothing()


class Off:
    """The Timeline that records nothing."""

    on = False

    def span(self, name: str) -> _Nothing:
        """Nothing."""
        return _NOTHING

    track = span

    def beside(self, name: str, start: int, end: int) -> None:
        """Nothing."""

    def hop(self, node: str, layer: int, reply: "asyncio.Future[T]", trip: Callable[[T], Trip]) -> None:
        """Nothing."""


class Ending(NamedTuple):
    """The end of a round trip, of which it is not known yet how long the node wrote the reply."""

    track: int
    layer: int
    computed: int  # when the experts were done
    came: int


class Span(NamedTuple):
    """One recorded piece of time, nanoseconds of `perf_counter_ns`."""

    process: str  # COORDINATOR or a node's name
    track: int
    name: str
    start: int
    end: int
    layer: int | None = None  # that a node was asked for


class Recorder:
    """The Timeline that records, for one event loop and its thread."""

    on = True

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.dropped = 0  # spans after MAX_SPANS
        self._track: ContextVar[int] = ContextVar("track", default=ENGINE)
        self._taken: set[int] = set()
        self._endings: dict[str, Ending] = {}  # of each node's latest round trip

    def span(self, name: str) -> "_Running":
        """See Timeline.span."""
        return _Running(self, self._track.get(), name)

    @contextmanager
    def track(self, name: str) -> Iterator[None]:
        """See Timeline.track."""
        number = next(n for n in range(ENGINE + 1, len(self._taken) + ENGINE + 2) if n not in self._taken)
        self._taken.add(number)
        token = self._track.set(number)
        try:
            with _Running(self, number, name):
                yield
        finally:
            self._track.reset(token)
            self._taken.remove(number)

    def beside(self, name: str, start: int, end: int) -> None:
        """See Timeline.beside."""
        self.add(COORDINATOR, -self._track.get(), name, start, end)

    def hop(self, node: str, layer: int, reply: "asyncio.Future[T]", trip: Callable[[T], Trip]) -> None:
        """See Timeline.hop."""
        track = self._track.get()

        def answered(reply: "asyncio.Future[T]") -> None:
            if not reply.cancelled() and reply.exception() is None:
                self._add_trip(node, track, layer, trip(reply.result()))

        reply.add_done_callback(answered)

    def _add_trip(self, node: str, track: int, layer: int, trip: Trip) -> None:
        """Records a round trip; the node's times are cut where they do not lie within it."""
        if (before := self._endings.get(node)) is not None:
            self._end_trip(node, before, trip.wrote)
        begun = trip.began - trip.waited - trip.reading
        if not trip.sent <= trip.began <= trip.began + trip.computed <= trip.came:  # another machine's clock
            begun = (trip.sent + trip.came - trip.reading - trip.waited - trip.computed) // 2
        read, waited = begun + trip.reading, begun + trip.reading + trip.waited
        times = [trip.sent]
        for time in (begun, read, waited, waited + trip.computed):
            times.append(max(times[-1], min(time, trip.came)))
        self.add(node, track, "round trip", trip.sent, trip.came, layer)
        for name, start, end in zip(_WAY_IN, times, times[1:], strict=False):
            self.add(node, track, name, start, end, layer)
        self._endings[node] = Ending(track, layer, times[-1], trip.came)
        self.add(COORDINATOR, track, "reading", max(trip.sent, trip.read), trip.came, layer)

    def _end_trip(self, node: str, ending: Ending, wrote: int) -> None:
        """Records the end of a round trip, whose reply the node wrote in so many nanoseconds."""
        # A node may return from the call that sends only after the reply has come here.
        written = max(ending.computed, min(ending.computed + wrote, ending.came))
        self.add(node, ending.track, "writing", ending.computed, written, ending.layer)
        self.add(node, ending.track, "link", written, ending.came, ending.layer)

    def finish(self) -> None:
        """Nothing more will be recorded."""
        for node, ending in self._endings.items():
            self._end_trip(node, ending, 0)
        self._endings.clear()

    def add(self, process: str, track: int, name: str, start: int, end: int, layer: int | None = None) -> None:
        """Records one span, if it is one, unless there are MAX_SPANS."""
        if end <= start:
            return
        if len(self.spans) < MAX_SPANS:
            self.spans.append(Span(process, track, name, start, end, layer))
        else:
            self.dropped += 1

    def seconds(self) -> dict[tuple[str, str], float]:
        """Time under each (process, name), added up; spans inside others count under both names."""
        total: dict[tuple[str, str], float] = {}
        for span in self.spans:
            key = span.process, span.name
            total[key] = total.get(key, 0.0) + (span.end - span.start) / 1e9
        return total

    def write(self, path: Path) -> None:
        """Writes the Chrome trace (JSON object format) beside `path` and renames it. Raises OSError."""
        with whole_file(path) as file:
            trace = {"traceEvents": self._events(), "otherData": {"dropped": self.dropped}}
            file.writelines(part.encode() for part in json.JSONEncoder().iterencode(trace))

    def _events(self) -> list[dict[str, Any]]:
        """Metadata, then complete events; times in microseconds from the first span's start."""
        names = [COORDINATOR, *sorted({span.process for span in self.spans} - {COORDINATOR})]
        process = {name: number for number, name in enumerate(names, 1)}
        zero = min((span.start for span in self.spans), default=0)
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "process_name", "pid": number, "args": {"name": name}}
            for name, number in process.items()
        ]
        for name, track in sorted({(span.process, span.track) for span in self.spans}):
            title = f"pass {abs(track)}" if track != ENGINE else "engine"
            if track < ENGINE:
                title += ", other threads"
            events.append(
                {"ph": "M", "name": "thread_name", "pid": process[name], "tid": track, "args": {"name": title}}
            )
        for span in self.spans:
            events.append(
                {
                    "ph": "X",
                    "name": span.name,
                    "pid": process[span.process],
                    "tid": span.track,
                    "ts": (span.start - zero) / 1000,
                    "dur": (span.end - span.start) / 1000,
                    **({} if span.layer is None else {"args": {"layer": span.layer}}),
                }
            )
        return events


class _Running:
    """A span between its start and its end."""

    __slots__ = ("_name", "_recorder", "_start", "_track")

    def __init__(self, recorder: Recorder, track: int, name: str) -> None:
        self._recorder, self._track, self._name = recorder, track, name

    def __enter__(self) -> None:
        self._start = perf_counter_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._recorder.add(COORDINATOR, self._track, self._name, self._start, perf_counter_ns())


current: Timeline = Off()  # replaced only by `recording`


@contextmanager
def recording() -> Iterator[Recorder]:
    """Records all that happens in this process during the block, for `Recorder.write` or `Recorder.seconds`."""
    global current  # one a process: parts need not pass it on to each other
    before, recorder = current, Recorder()
    current = recorder
    try:
        yield recorder
    finally:
        current = before
        recorder.finish()
