"""What a recorded timeline holds, and that nothing is held when none is recorded."""

import asyncio
import json
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.coordinator import timeline
from moehive.coordinator.engine.engine import Engine
from moehive.coordinator.timeline import Trip
from moehive.coordinator.types import GenerationRequest, SamplingParams


def test_off_by_default_and_after_a_recording() -> None:
    on = [timeline.current.on]
    with timeline.recording() as recorder, timeline.current.span("inside"):
        on.append(timeline.current.on)
    assert on == [False, True]
    with timeline.current.span("outside"):
        pass
    assert [span.name for span in recorder.spans] == ["inside"]


def test_passes_that_take_turns_have_tracks_of_their_own(tmp_path: Path) -> None:
    async def one(name: str) -> None:
        with timeline.current.track(name):
            for layer in range(3):
                with timeline.current.span(f"layer {layer}"):
                    await asyncio.sleep(0)

    async def both() -> None:
        await asyncio.gather(one("first"), one("second"))
        await one("third")

    with timeline.recording() as recorder:
        asyncio.run(both())
    tracks = {span.name: span.track for span in recorder.spans if "layer" not in span.name}
    assert tracks == {"first": 1, "second": 2, "third": 1}
    for track in (1, 2):
        spans = sorted((s for s in recorder.spans if s.track == track), key=lambda s: (s.start, -s.end))
        open_until: list[int] = []
        for span in spans:  # a viewer needs each to lie wholly inside, or wholly after, the one before
            while open_until and open_until[-1] <= span.start:
                open_until.pop()
            assert not open_until or span.end <= open_until[-1]
            open_until.append(span.end)


def shown(*trips: Trip) -> list[tuple[str, int, int]]:
    """What a node's track has after these round trips, name, start and end; one more was given up."""

    async def run() -> None:
        lost: asyncio.Future[Trip] = asyncio.get_running_loop().create_future()
        timeline.current.hop("cellar", 7, lost, lambda trip: trip)
        lost.cancel()
        for trip in trips:
            reply: asyncio.Future[Trip] = asyncio.get_running_loop().create_future()
            timeline.current.hop("attic", 7, reply, lambda trip: trip)
            reply.set_result(trip)
            await asyncio.sleep(0)

    with timeline.recording() as recorder:
        asyncio.run(run())
    assert {span.process for span in recorder.spans} <= {"attic", timeline.COORDINATOR}
    return [(span.name, span.start, span.end) for span in recorder.spans if span.process == "attic"]


def test_times_of_a_node_with_another_clock_are_in_the_middle_of_the_round_trip() -> None:
    first = Trip(sent=1000, read=1990, came=2000, began=77, reading=50, waited=150, computed=400, wrote=3)
    assert shown(first) == [
        ("round trip", 1000, 2000), ("link", 1000, 1200), ("reading", 1200, 1250),
        ("waiting for its turn", 1250, 1400), ("experts", 1400, 1800), ("link", 1800, 2000),
    ]  # fmt: skip


def test_times_of_a_node_with_the_same_clock_are_where_they_were() -> None:
    first = Trip(sent=1000, read=1990, came=2000, began=1100, reading=30, waited=0, computed=400, wrote=0)
    second = first._replace(sent=3000, came=4000, began=3100, wrote=70)
    later = [
        ("round trip", 3000, 4000), ("link", 3000, 3070), ("reading", 3070, 3100), ("experts", 3100, 3500),
        ("link", 3500, 4000),
    ]  # fmt: skip
    assert shown(first, second) == [
        ("round trip", 1000, 2000), ("link", 1000, 1070), ("reading", 1070, 1100), ("experts", 1100, 1500),
        ("writing", 1500, 1570), ("link", 1570, 2000), *later,
    ]  # fmt: skip


times = st.integers(0, 10_000) | st.integers(0, 2**64 - 1)


@given(st.lists(st.tuples(times, times, times, times, times), min_size=1, max_size=4))
def test_a_node_that_says_nonsense_stays_inside(said: list[tuple[int, ...]]) -> None:
    trips = [Trip(n * 5000, n * 5000 + 3990, n * 5000 + 4000, *numbers) for n, numbers in enumerate(said)]
    spans = shown(*trips)
    for trip in trips:
        parts = [part for part in spans if part[0] != "round trip" and trip.sent <= part[1] < trip.came]
        assert parts[0][1] == trip.sent and parts[-1][2] == trip.came
        assert all(before[2] == after[1] for before, after in pairwise(parts))


def test_the_file_is_a_chrome_trace(tmp_path: Path, fakes: ModuleType) -> None:
    async def run() -> None:
        engine = Engine(fakes.FakeTrunk(max_sequences=4), fakes.FakeExperts(), 100_000)
        for name in "ab":
            sampling = SamplingParams(temperature=0)
            request = GenerationRequest(request_id=name, prompt=(1, 2), max_tokens=3, sampling=sampling)
            async for _ in engine.generate(request):
                pass

    with timeline.recording() as recorder:
        asyncio.run(run())
    recorder.write(tmp_path / "out.json")
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]
    trace = json.loads((tmp_path / "out.json").read_text())
    events = trace["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert [event["name"] for event in complete].count("sample") == 6
    assert [event["name"] for event in complete].count("1 sequences, 1 tokens") == 4
    assert min(event["ts"] for event in complete) == 0 and all(event["dur"] >= 0 for event in complete)
    named = {(event["pid"], event.get("tid")): event["args"]["name"] for event in events if event["ph"] == "M"}
    assert named[1, None] == "coordinator" and named[1, 0] == "engine" and named[1, 1] == "pass 1"


def test_spans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MAX_SPANS", 10)
    with timeline.recording() as recorder:
        for _ in range(15):
            with timeline.current.span("x"):
                pass
    assert len(recorder.spans) == 10 and recorder.dropped == 5


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "out.json").mkdir()
    with pytest.raises(OSError):
        timeline.Recorder().write(tmp_path / "out.json")
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]
